"""Every family is trained as Stable Diffusion is: a LoRA, alone or stacked, or all weights; what was
stopped goes on, and the file that is written is one that diffusers loads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_lora_families import denoiser_of
from test_training import distance, same
from tiny_families import make_pipeline, make_root

import unlearn
from unlearn.attribution.estimation import draw_samples
from unlearn.attribution.losses import sample_losses
from unlearn.models.lora_files import read_header
from unlearn.models.pipelines import load_model, replaced_weights
from unlearn.retraining.lora import first_matrices, list_targets, save_lora, with_fresh_lora
from unlearn.retraining.recipes import Recipe, initial_weights
from unlearn.retraining.training import train

RECIPE = Recipe(2, 1e-2, 2, "constant", 0, "no")
LORA = replace(RECIPE, lora_rank=2, lora_alpha=4.0, lora_targets="linear")
TARGETS = {
    "sdxl": (64, 88),
    "pixart": (16, 20),
    "sd3": (15, 25),
    "flux": (19, 34),
    "qwen": (16, 28),
    "klein": (18, 26),
    "zimage": (16, 31),
    "sana": (16, 20),
    "lumina2": (16, 31),
}
FLOW = {
    "sd3": {"density", "loss_weight"},
    "flux": {"density", "guidance"},
    "qwen": {"density"},
    "klein": {"density"},
    "zimage": {"density"},
    "sana": {"density"},
    "lumina2": {"density"},
}
WITHOUT_ONE, ALL = np.array([[1, 1, 0, 1]], bool), np.ones((1, 4), bool)
LAST = "transformer_blocks.1"
UNREAD = {  # layers of the last block's text, which nothing reads
    "sd3": {f"{LAST}.attn.add_q_proj"},
    "qwen": {f"{LAST}.attn.add_q_proj", f"{LAST}.attn.to_add_out"}
    | {f"{LAST}.txt_mlp.net.{layer}" for layer in ("0.proj", "2")},
}


class Trained:
    """A family's tiny pipeline with a fresh LoRA, four images, and the matrices trained on three."""

    def __init__(self, name, folder):
        self.name, self.folder, self.pipeline = name, folder / "pipeline", make_pipeline(name)
        self.pipeline.save_pretrained(self.folder)
        self.root = make_root(folder / "root", self.folder)
        self.plain = load_model(self.folder, "cpu")
        self.images = unlearn.open_training_set(self.root, self.plain)
        self.fresh = with_fresh_lora(load_model(self.folder, "cpu"), 2, 4.0, "linear")
        self.matrices = train(self.fresh, self.images, WITHOUT_ONE, LORA)[0]

    @torch.no_grad()
    def losses(self, model):
        """Of three samples."""
        return sample_losses(model, *draw_samples(self.images, [0, 1, 2], 1000, seed=0))


LATER = ["qwen", "klein", "zimage", "sana", "lumina2"]
FAMILIES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in LATER else []) for name in TARGETS
]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    return Trained(request.param, tmp_path_factory.mktemp(request.param))


def test_a_lora_starts_as_the_model_and_training_moves_what_the_loss_reads(trained):
    fresh, plain = trained.losses(trained.fresh), trained.losses(trained.plain)
    torch.testing.assert_close(fresh, plain, rtol=1e-6, atol=1e-8)
    moved = {name for name, value in trained.matrices.items() if ".lora_B." in name and value.any()}
    layers = {name.partition(".lora_B.")[0] for name in moved}
    expected = list_targets(trained.plain.denoiser, "linear").keys()
    assert layers == expected - UNREAD.get(trained.name, set())
    attention = list_targets(trained.plain.denoiser, "attention").keys()
    assert attention < expected and (len(attention), len(expected)) == TARGETS[trained.name]


def test_a_lora_without_an_image_is_the_same_alone_or_stacked(trained):
    members = np.concatenate([ALL, WITHOUT_ONE])
    together = train(trained.fresh, trained.images, members, LORA)[1]
    for name, value in trained.matrices.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)


class Killed(Exception):
    """Ends a training in its second epoch of two steps."""


def kill_in_the_second_epoch():
    seen = []

    def kill(count):
        seen.append(count)
        if sum(seen) == 3:
            raise Killed

    return kill


def test_beside_weights_in_bfloat16_a_lora_is_trained_in_float32_and_a_killed_run_goes_on(
    trained, tmp_path
):
    half = load_model(trained.folder, "cpu", weights="bf16")
    half = with_fresh_lora(half, 2, 4.0, "linear")
    alone, path = train(half, trained.images, WITHOUT_ONE, LORA)[0], tmp_path / "x.checkpoint"
    assert {value.dtype for value in alone.values()} == {torch.float32}
    _, stacked = train(half, trained.images, np.concatenate([ALL, WITHOUT_ONE]), LORA)
    # FLUX rounds timesteps and guidance, so that it is trained at others.
    least = {"flux": 0.6, "klein": 0.8}.get(trained.name, 0.97)
    assert cosine_of_ups(alone, trained.matrices) > least
    assert cosine_of_ups(alone, stacked) > 0.97
    with pytest.raises(Killed):
        train(half, trained.images, WITHOUT_ONE, LORA, path, kill_in_the_second_epoch())
    assert path.exists()
    assert same(train(half, trained.images, WITHOUT_ONE, LORA, path)[0], alone)


def cosine_of_ups(one, other):
    """Of what training moved from zero."""
    ups = [
        torch.cat([value.flatten() for name, value in weights.items() if ".lora_B." in name])
        for weights in (one, other)
    ]
    return float(torch.nn.functional.cosine_similarity(*ups, dim=0))


def test_the_identity_holds_what_the_family_s_loss_depends_on(trained):
    identity, flow = LORA.identity(trained.fresh, trained.images), FLOW.get(trained.name, set())
    assert flow <= identity.keys()
    assert not {"density", "loss_weight", "guidance"} - flow & identity.keys()


def test_a_lora_s_file_is_what_diffusers_writes_and_loads(trained, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(trained.fresh, path, trained.matrices, 2, 4.0)
    with replaced_weights(trained.fresh.denoiser, trained.matrices):
        expected = trained.losses(trained.fresh)
    ours = load_model(trained.folder, "cpu", lora=[str(path)])
    assert torch.equal(trained.losses(ours), expected)
    if trained.name == "pixart":
        return  # diffusers has no loader for it
    pipeline = make_pipeline(trained.name)
    pipeline.load_lora_weights(tmp_path)
    theirs = replace(trained.plain, pipeline=pipeline)
    trained.plain.family.prepare(denoiser_of(pipeline))
    denoiser_of(pipeline).eval()
    found = trained.losses(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (found - trained.losses(trained.plain)).abs().max() > 1e-6


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_lora_s_file_holds_what_diffusers_own_saver_writes(family, tmp_path):
    model = load_model_of(family, tmp_path)
    weights = first_matrices(model.denoiser, 2, "attention", 0)
    save_lora(model, tmp_path / "ours.safetensors", weights, 2, 4.0)
    part = model.family.denoiser
    settings = {"r": 2, "lora_alpha": 4.0}
    settings["target_modules"] = sorted(list_targets(model.denoiser, "attention"))
    model.pipeline.save_lora_weights(
        tmp_path,
        weight_name="theirs.safetensors",
        **{
            f"{part}_lora_layers": {
                name.replace(".lora0.", "."): value for name, value in weights.items()
            },
            f"{part}_lora_adapter_metadata": settings,
        },
    )
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs"))
    assert read_header(ours) == read_header(theirs) and same(load_file(ours), load_file(theirs))


def load_model_of(family, folder):
    """A family's tiny pipeline with a fresh LoRA."""
    make_pipeline(family).save_pretrained(folder / "pipeline")
    return with_fresh_lora(load_model(folder / "pipeline", "cpu"), 2, 4.0, "attention")


def test_all_weights_are_trained_from_scratch_and_a_killed_run_goes_on(trained, tmp_path):
    model, path = trained.plain, tmp_path / "x.checkpoint"
    whole = train(model, trained.images, ALL, RECIPE)[0]
    first = initial_weights(model.denoiser, 0)
    assert whole.keys() == first.keys() == dict(model.denoiser.named_parameters()).keys()
    assert distance(whole, first) > 1e-3
    with pytest.raises(Killed):
        train(model, trained.images, ALL, RECIPE, path, kill_in_the_second_epoch())
    assert path.exists()
    assert same(train(model, trained.images, ALL, RECIPE, path)[0], whole)
