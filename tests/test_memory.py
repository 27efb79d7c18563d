"""Memory: what is on the device when, what is loaded once, and what happens where it is short."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import PARITY
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny_families import make_root

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.commands import encode, fisher
from unlearn.commands.advice import encode_command
from unlearn.front import loading
from unlearn.front.models import Source
from unlearn.models import model as models
from unlearn.models import pipelines
from unlearn.models.pipelines import load_model
from unlearn.models.precision import check_scoring
from unlearn.models.residence import Residence

TINY = PARITY / "fixture/sd-tiny"


@pytest.mark.parametrize(("size", "expected"), [(80e9, "fp32"), (1.054e9, "bf16"), (1e6, "fp32")])
def test_weights_are_halved_where_float32_alone_does_not_fit(size, expected, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, size))
    needed = {"fp32": 20e6, "bf16": 1e6}
    found = lambda *given, weights, **named: SimpleNamespace(least_bytes=needed[weights])
    monkeypatch.setattr(loading, "find_needs", found)
    assert loading.choose_weights(Source(str(TINY)), torch.device("cuda")) == expected
    assert ("weights in bfloat16: in float32 20 MB" in caplog.text) is (expected == "bf16")
    assert loading.choose_weights(Source(str(TINY)), torch.device("cpu")) == "fp32"


def test_differences_are_refused_with_weights_in_half_precision():
    with pytest.raises(UserError, match="--scoring exact: differences of two nearly equal numbers"):
        check_scoring("exact", "bf16")
    for scoring, weights in (("exact", "fp32"), ("removal", "bf16"), ("midpoint", "bf16")):
        check_scoring(scoring, weights)


@pytest.mark.parametrize("said", ["fp32", "bf16"])
@pytest.mark.parametrize("program", [compute_influence, compute_training_loss, encode, fisher])
def test_every_program_takes_the_precision_of_weights(program, said, tmp_path):
    """As a flag, else as dataset.json says it; what is advised carries the flag."""
    root = make_root(tmp_path / "root", TINY, weights=said)
    flags = ["--dataroot", str(root), "--device", "cpu"]
    flags += ["--task_json", "tasks.json"] if program.__name__.startswith("compute") else []
    read = lambda *more: first(program.parse_arguments([*flags, *more]))
    assert read().weights == said
    own = read("--weights", "bf16")
    assert own.weights == "bf16"
    assert ("--weights bf16" in encode_command(own)) is (said == "fp32")


def first(parsed):
    """The flags, where a program gives its settings beside them."""
    return parsed[0] if isinstance(parsed, tuple) else parsed


@pytest.mark.parametrize("before, after", [("bf16", "fp32"), ("fp32", "bf16")])
def test_losses_under_weights_of_another_precision_are_refused(before, after, tmp_path):
    root = PARITY / "fixture/abc"
    flags = ["--dataroot", str(root), "--sd_version", str(TINY), "--device", "cpu"]
    flags += ["--task_json", str(PARITY / "fixture/tasks.json"), "--result_dir", str(tmp_path)]
    flags += ["--time_samples", "1", "--laion_subset_size", "3", "--weights"]
    compute_training_loss.main([*flags, before])
    said = f"weights_precision is '{before}', expected '{after}' .precision of the weights"
    with pytest.raises(UserError, match=said):
        compute_training_loss.main([*flags, after])


class Part:
    """A part of a pipeline that tells where it is."""

    def __init__(self):
        self.place = "cpu"

    def to(self, device):
        self.place = str(device)


class Parts:
    def __init__(self):
        self.unet, self.vae, self.text_encoder, self.text_encoder_2 = Part(), Part(), Part(), None

    @property
    def places(self):
        return self.unet.place, self.vae.place, self.text_encoder.place


def test_denoiser_and_what_encodes_are_never_on_the_device_together():
    parts = Parts()
    names = ("vae", "text_encoder", "text_encoder_2")
    residence = Residence(parts, "unet", names, "cuda")
    assert parts.places == ("cpu", "cpu", "cpu")
    with residence.encoding():
        assert parts.places == ("cpu", "cpu", "cpu")  # nothing is encoded yet
        for _ in range(2):
            with residence.visited():
                assert parts.places == ("cpu", "cuda", "cuda")
        assert parts.places == ("cpu", "cuda", "cuda")  # more may come
    assert parts.places == ("cuda", "cpu", "cpu")
    with residence.encoding():
        assert parts.places == ("cuda", "cpu", "cpu")  # all was encoded before
    with pytest.raises(ZeroDivisionError), residence.visited():
        1 / 0
    assert parts.places == ("cuda", "cpu", "cpu")


def test_on_a_cpu_nothing_moves():
    parts = Parts()
    residence = Residence(parts, "unet", ("vae", "text_encoder"), "cpu")
    parts.unet.place = parts.vae.place = "where it was"
    with residence.visited():
        pass
    assert parts.places == ("where it was", "where it was", "cpu")


def test_a_model_encodes_with_its_parts_there_and_predicts_with_its_denoiser_there(monkeypatch):
    model, seen = load_model(TINY, "cpu"), []
    model.residence.device = torch.device("cuda")
    monkeypatch.setattr(
        model.residence, "place", lambda names, device: seen.append((tuple(names), str(device)))
    )
    encoders = ("vae", "text_encoder")
    with model.encoding():
        model.encode_prompts(["red"])
        model.encode_pixels(torch.zeros(1, 3, 64, 64))
    away = [(("unet",), "cpu"), (encoders, "cuda")]
    assert seen == [*away, (encoders, "cpu"), (("unet",), "cuda")]
    assert model.device == torch.device("cuda")


def test_text_encoders_are_read_once(monkeypatch):
    calls, load = [], transformers.CLIPTextModel.from_pretrained

    def count(*given, **named):
        calls.append(given)
        return load(*given, **named)

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", count)
    load_model(TINY, "cpu")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "stored", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_weights_in_half_precision_are_read_as_they_stand_and_are_those_of_float32(
    stored, tmp_path, monkeypatch
):
    """With a LoRA that changes denoiser and text encoder: the same bits and the same identity as where
    all of it was read in float32 and rounded at the end."""
    pipeline = DiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.to(stored).save_pretrained(tmp_path)
    layers = {
        "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_q",
        "text_encoder": "encoder.layers.0.self_attn.q_proj",
    }
    tensors = {}
    for part, layer in layers.items():
        size = getattr(pipeline, part).get_submodule(layer).weight.shape
        down, up = torch.randn(2, size[1]), torch.randn(size[0], 2)
        name = f"{part}.{layer}.lora_"
        tensors |= {f"{name}A.weight": down, f"{name}B.weight": up}
    save_file(tensors, tmp_path / "lora.safetensors")
    read, halve = [], pipelines.halve

    def see(own, *more):
        read.append((own.unet.conv_in.weight.dtype, own.text_encoder.dtype, own.vae.dtype))
        halve(own, *more)

    monkeypatch.setattr(pipelines, "halve", see)
    how = {"lora": [str(tmp_path / "lora.safetensors")], "weights": "bf16"}
    found = load_model(tmp_path, "cpu", **how)
    monkeypatch.setattr(pipelines, "stored_type", lambda *given: torch.float32)
    load = pipelines.load_text_encoders
    monkeypatch.setattr(
        pipelines,
        "load_text_encoders",
        lambda *given: {part: each.float() for part, each in load(*given).items()},
    )
    expected = load_model(tmp_path, "cpu", **how)
    assert read == [(stored, stored, torch.float32), (torch.float32,) * 3]
    assert found.identity == expected.identity
    for part in layers:
        own, other = (getattr(each.pipeline, part).state_dict() for each in (found, expected))
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert own[name].dtype == value.dtype and torch.equal(own[name], value), name


def test_a_sample_that_fills_the_memory_goes_on_with_checkpointing(monkeypatch, caplog):
    model, settings = load_model(TINY, "cpu"), RemovalSettings(timesteps=(350,), sketch_size=64)
    images = images_of(model)
    maker = FeatureMaker(model, images.latents.shape[2:], settings)
    expected = maker.make(images, [0])
    predict = models.Model.predict

    def fill(self, *given, **named):
        if not self.is_saving_memory:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, *given, **named)

    monkeypatch.setattr(models.Model, "predict", fill)
    assert (maker.make(images, [0]) == expected).all()
    assert "out of memory: going on with gradients computed in parts" in caplog.text


def images_of(model):
    """One image, of seeded numbers."""
    from unlearn.datasets.training_sets import TrainingSet

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).numpy()
    latents = draw(1, 1, *model.latent_shape(model.own_resolution))
    return TrainingSet("one", ["0"], ["red"], [None], latents, draw(1, 1, *model.embedding_shape))
