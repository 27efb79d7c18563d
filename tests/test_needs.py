"""What a run needs, counted by configurations alone: the published models' sizes, tensors alive at
once, and what doctor, the front door and `python -m unlearn needs` tell of it."""

from dataclasses import replace

import pytest
import torch
from conftest import PARITY

from unlearn import UserError
from unlearn.attribution.removal import RemovalSettings
from unlearn.commands import forecast, needs
from unlearn.datasets.settings import PUBLISHED as DEFAULTS
from unlearn.front.needs import count_bytes, count_loaded, find_needs, list_parts
from unlearn.models.architectures import (
    architecture_of,
    build,
    published_architecture,
    read_architecture,
)
from unlearn.models.counting import counting
from unlearn.models.pipelines import load_model, select_parameters
from unlearn.models.published import PUBLISHED

TINY = PARITY / "fixture/sd-tiny"
# Millions of parameters as their makers or diffusers' documentation state them: the denoiser, and
# keys and values of the text.
SIZES = {
    "Stable Diffusion 1.5": (859.5, 19.2),
    "Stable Diffusion 2.1": (865.9, 25.6),
    "Stable Diffusion XL": (2567.5, 340.8),
    "Stable Diffusion 3 medium": (2028.3, 113.2),
    "Stable Diffusion 3.5 medium": (2243.2, 113.2),
    "Stable Diffusion 3.5 large": (8056.6, 449.5),
    "FLUX.1-dev": (11901.4, 358.6),
    "FLUX.1-schnell": (11891.2, 358.6),
    "PixArt-alpha": (611.3, 74.3),
    "PixArt-sigma": (610.9, 74.3),
    "Qwen-Image": (20430.4, 1132.5),
    "FLUX.2-klein-4B": (3875.5, 94.4),
    "FLUX.2-klein-9B": (9078.6, 268.4),
    "FLUX.2-dev": (32223.3, 604.0),
    "Z-Image": (6154.9, 59.0),
    "Z-Image-Turbo": (6154.9, 59.0),
    "Sana 1.6B": (1604.5, 200.7),
    "Sana 0.6B": (591.7, 74.3),
    "Lumina-Image 2.0": (2609.8, 7.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_sizes(name):
    model = build(published_architecture(name))
    selected = select_parameters(model.denoiser, "cross-attn-kv").values()
    counted = (
        sum(value.numel() for value in values) / 1e6
        for values in (model.denoiser.parameters(), selected)
    )
    assert tuple(counted) == pytest.approx(SIZES[name], abs=0.06)
    assert all(value.is_meta for value in model.denoiser.parameters())


def count(work, held):
    """What a piece of work has alive at once, and its operations."""
    with counting(held) as counts:
        kept = work()  # until the end, as who asks for it does
    del kept
    return counts.peak, counts.flops


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_is_what_is_alive_at_once(device):
    """Three products, each of 100 x 100 numbers, of which two at a time are needed; with gradients
    the results of both exp are kept, and the weights never count."""
    first, weight = torch.ones(100, 100, device=device), torch.ones(100, 100, device=device)
    chain = lambda: ((first @ weight).exp() @ weight).exp() @ weight
    assert count(chain, [first, weight]) == (2 * 40_000, 3 * 2 * 100**3)
    assert count(lambda: weight.T[:50].sum(), [first, weight]) == (4, 0)
    weight.requires_grad_(True)
    assert count(chain, [first, weight])[0] == 3 * 40_000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_counted_without_a_matrix_of_all_pairs(device):
    attend = lambda *texts: torch.nn.functional.scaled_dot_product_attention(*texts)
    texts = torch.ones(1, 2, 1000, 8, device=device)
    peak, flops = count(lambda: attend(texts, texts, texts), [texts])
    assert peak < 4 * 1000 * 1000 and flops == 2 * 2 * 2 * 1000 * 1000 * 8


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_s_backward_pass_takes_twice_the_operations_of_its_forward_pass(groups):
    layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=groups, device="meta")
    pixels = torch.ones(1, 8, 10, 10, device="meta", requires_grad=True)
    forward = 2 * 8 * (8 // groups) * 9 * 100
    assert count(lambda: layer(pixels), [pixels])[1] == forward
    assert count(lambda: layer(pixels).sum().backward(), [pixels])[1] == 3 * forward


def test_operations_of_features_are_those_of_their_passes():
    architecture = read_architecture(TINY)
    found = find_needs(architecture)
    passes = 1 + 4, 4 * 2
    expected = found.encoding + passes[0] * found.forward + passes[1] * found.backward
    assert found.features() == expected
    assert found.features(RemovalSettings(timesteps=(350,), probes=1)) == (
        found.encoding + 2 * found.forward + found.backward
    )
    launches = 13 * found.layers * 60e-6
    assert found.seconds(1000, "H100") == pytest.approx(
        1000 * (expected / (0.4 * 67e12) + launches)
    )
    cells = needs.describe("mine", architecture, 0, (1000, 1000), False, "fp32")
    assert cells[:2] + cells[5:6] == [f"mine, {found.resolution} px", "fp32", "12 GB"]
    half = find_needs(architecture, weights="bf16")
    assert half.least_bytes < found.least_bytes
    assert half.host == found.host, "the files of this pipeline are float32"
    assert half.forward == found.forward and half.seconds(9, "H100") < found.seconds(9, "H100")
    assert len(cells) == len(needs.HEADER)


def test_a_model_needs_more_than_a_lora_and_a_larger_picture_more_than_a_small_one(model):
    own, lora = (find_needs(read_architecture(TINY), lora=lora) for lora in (False, True))
    large = find_needs(read_architecture(TINY), 4 * own.resolution)
    assert own.selected == sum(value.numel() for value in model.denoiser.parameters())
    assert lora.selected < own.selected and lora.device["scoring"] < own.device["scoring"]
    assert lora.backward < own.backward and large.forward > 15 * own.forward
    assert large.device["scoring"] > own.device["scoring"] and own.smallest_gpu == 12
    assert find_needs(architecture_of(load_model(str(TINY), "cpu"))) == own


def test_files_in_half_precision_need_half_of_the_memory_but_for_the_vae():
    own, counted = read_architecture(TINY), build(read_architecture(TINY))
    sizes = {name: count_bytes(part) for name, part in list_parts(counted).items()}
    assert count_loaded(counted, replace(own, stored={})) == sum(sizes.values())
    counted.weights = "bf16"
    assert own.stored == dict.fromkeys(("unet", "text_encoder"), torch.float32)
    assert count_loaded(counted, own) == sum(sizes.values())
    halved = (sizes["unet"] + sizes["text_encoder"]) // 2 + sizes["vae"]
    for stored in ({}, {"unet": torch.float16}):
        assert count_loaded(counted, replace(own, stored=stored)) == halved


def test_needs_are_told_of_published_models_and_of_folders(capsys, monkeypatch):
    monkeypatch.setattr(needs, "describe", lambda name, *more: [name, str(more[1:])])
    needs.main(["stable diffusion 1.5", str(TINY), "--images", "10"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        f"| {name} | ({resolution}, (10, 10), {lora}, '{weights}') |"
        for name, resolution in (("stable diffusion 1.5", 512), (TINY, 0))
        for weights in ("fp32", "bf16")
        for lora in (False, True)
    ]
    with pytest.raises(
        UserError, match="nothing-such: neither a pipeline's folder nor a published"
    ):
        needs.main(["nothing-such"])


def test_doctor_tells_what_each_way_of_scoring_needs(monkeypatch):
    args = needs.Namespace(sd_version=str(TINY), lora=None, weights=None, device="cpu")
    findings = forecast.examine_needs(args, DEFAULTS)
    assert [finding.status for finding in findings] == ["ok"] * 2
    assert all("a GPU of 12 GB does it" in finding.text for finding in findings)
    monkeypatch.setattr(forecast, "memory_limit", lambda: 1000)
    assert {finding.status for finding in forecast.examine_needs(args, DEFAULTS)} == {"note"}
