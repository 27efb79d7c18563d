"""The file of all parts of a model with a transformer gives the weights of its pipeline beside a folder
that lends configurations and tokenizers; what does not fit is refused by name."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from authors_names import to_authors
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from test_attribute import rename
from test_checkpoints import XL_VAE_NAMES, to_checkpoint
from tiny_families import make_pipeline

from unlearn.commands import convert
from unlearn.errors import UserError
from unlearn.front.models import find_model
from unlearn.models.pipelines import load_model

ENCODERS = {
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
    "lumina2": {"text_encoder": "gemma2_2b"},
    "zimage": {"text_encoder": "qwen3_4b"},
}
INSIDE = {
    "clip_l": "text_model.",
    "clip_g": "text_model.",
    "gemma2_2b": "model.",
    "qwen3_4b": "model.",
}


def to_whole(family, folder):
    """A tiny pipeline's weights as ComfyUI's file of all parts has them."""
    tensors = {
        f"model.diffusion_model.{name}": own for name, own in to_authors(family, folder).items()
    }
    vae = rename(load_file(folder / "vae/diffusion_pytorch_model.safetensors"), XL_VAE_NAMES, "")
    start = "first_stage_model." if family == "sd3" else "vae."
    tensors |= {
        f"{start}{name}": own[..., None, None] if "attn_1" in name and own.ndim == 2 else own
        for name, own in vae.items()
    }
    for part, name in ENCODERS[family].items():
        own, inside = load_file(folder / part / "model.safetensors"), INSIDE.get(name, "")
        if name == "clip_l":
            own = {key: value for key, value in own.items() if key != "text_projection.weight"}
        for key, value in own.items():
            key = key if key == "text_projection.weight" else f"{inside}{key.removeprefix(inside)}"
            tensors[f"text_encoders.{name}.transformer.{key}"] = value
        tensors[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6)
    if family == "lumina2":
        tensors["text_encoders.gemma2_2b.spiece_model"] = torch.ones(7, dtype=torch.uint8)
    return {name: value.contiguous() for name, value in tensors.items()}


class World:
    """A tiny pipeline's folder, its file of all parts, one that lends configurations, without any
    weights, and one whose weights are others."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder / "pipeline"
        pipeline = make_pipeline(family)
        if family == "sd3":  # as it is published: its program leaves this projection out
            weight = pipeline.text_encoder.text_projection.weight
            weight.data = torch.eye(len(weight))
        pipeline.save_pretrained(self.folder)
        self.tensors = to_whole(family, self.folder)
        self.bare = shutil.copytree(
            self.folder, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors")
        )
        self.other = shutil.copytree(self.folder, folder / "other")
        for path in self.other.rglob("*.safetensors"):
            save_file({name: value + 1 for name, value in load_file(path).items()}, path)


@pytest.fixture(scope="module", params=ENCODERS)
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


def of(*families):
    """A test of these tiny pipelines' worlds."""
    return pytest.mark.parametrize("world", families, indirect=True, scope="module")


def read_part(folder, part):
    """The weights of a part of a pipeline's folder."""
    paths = Path(folder, part).glob("*.safetensors")
    return {name: value for path in paths for name, value in load_file(path).items()}


def is_same(first, second, part):
    """Whether two folders have the same weights of a part."""
    first, second = read_part(first, part), read_part(second, part)
    same = [torch.equal(first[name], second[name]) for name in first.keys() & second.keys()]
    return first.keys() == second.keys() and all(same) and bool(same)


def test_a_file_of_all_parts_gives_the_weights_of_its_pipeline(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "all.safetensors"
    save_file(world.tensors, path)
    source = find_model(path, world.bare, tmp_path / "place")
    for part in ("transformer", "vae", *ENCODERS[world.family]):
        assert is_same(world.folder, source.pipeline, part), part
    assert find_model(path, world.bare, tmp_path / "place") == source, "it is made once"
    expected, found = load_model(world.folder, "cpu"), load_model(source.pipeline, "cpu")
    assert found.weights_hash == expected.weights_hash and found.identity == expected.identity
    one, other = (model.encode_prompts(["a red dog"]) for model in (expected, found))
    assert all(torch.equal(one[name], other[name]) for name in one)


@of("sd3")
def test_diffusers_makes_the_same_of_a_file_of_stable_diffusion_3(world, tmp_path):
    path, start = tmp_path / "all.safetensors", "text_encoders.t5xxl.transformer"
    twice = {
        f"{start}.encoder.embed_tokens.weight": world.tensors[f"{start}.shared.weight"].clone()
    }
    save_file(world.tensors | twice, path)  # without which diffusers makes no T5 of it
    pipeline = StableDiffusion3Pipeline.from_single_file(
        str(path), config=str(world.folder), local_files_only=True
    )
    model = load_model(find_model(path, world.bare, tmp_path / "place").pipeline, "cpu")
    for part in ("transformer", "vae", *ENCODERS["sd3"]):
        theirs, ours = (getattr(own, part).state_dict() for own in (pipeline, model.pipeline))
        assert theirs.keys() == ours.keys(), part
        assert all(torch.equal(theirs[name], value) for name, value in ours.items()), part


@of("sd3", "flux")
def test_parts_that_a_file_lacks_are_those_of_the_base(world, tmp_path, capsys, caplog):
    """As Stable Diffusion 3's file without T5, and without any text encoder; in half precision, which
    stays as it is."""
    path = tmp_path / "some.safetensors"
    some = {
        name: value.half()
        for name, value in world.tensors.items()
        if not name.startswith(("text_encoders.t5xxl", "vae.", "first_stage_model."))
    }
    save_file(some, path)
    with caplog.at_level(logging.INFO, "unlearn"):
        convert.main([str(path), "--base", str(world.other), "--out", str(tmp_path / "place")])
    made = Path(capsys.readouterr().out.removeprefix("Pipeline: ").strip())
    third = "text_encoder_3" if world.family == "sd3" else "text_encoder_2"
    assert f"are configurations, tokenizers, vae, {third}" in caplog.text
    assert is_same(world.other, made, "vae") and is_same(world.other, made, third)
    assert {value.dtype for value in read_part(made, "text_encoder").values()} == {torch.float16}
    with pytest.raises(UserError, match=r"--base .*bare: its vae has no weights"):
        find_model(path, world.bare, tmp_path / "again")


def without(*starts):
    return lambda tensors: {
        name: value for name, value in tensors.items() if not name.startswith(starts)
    }


def more(**tensors):
    return lambda own: own | {name.replace("__", "."): value for name, value in tensors.items()}


FAULTS = {  # what is done to the tensors of a file, and what is said of it
    "lacks": (
        without("text_encoders.clip_l.transformer.text_model.final_layer_norm"),
        r"lacks (text_model\.)?final_layer_norm.weight of the text_encoder of this Stable Diffusion 3",
    ),
    "deeper": (
        more(text_encoders__clip_l__transformer__text_model__encoder__layers__9__x=torch.ones(1)),
        r"layers.9.x is no weight of the text_encoder of this Stable Diffusion 3",
    ),
    "wider": (
        more(text_encoders__t5xxl__transformer__encoder__final_layer_norm__weight=torch.ones(9)),
        r"final_layer_norm.weight has the shape \[9\], that of the text_encoder_3 .* \[32\]",
    ),
    "another encoder": (
        more(text_encoders__llama__transformer__x=torch.ones(1)),
        r"has a text encoder \(text_encoders.llama.transformer.x\) that .* has not",
    ),
    "VAE": (
        without("first_stage_model.decoder.conv_in."),
        r"its VAE is not that of .*--base of its",
    ),
    "transformer": (
        without("model.diffusion_model.context_embedder."),
        "lacks 2 weights of the transformer of this Stable Diffusion 3, first context_embedder.bias",
    ),
    "fp8": (
        lambda own: (
            own
            | {
                name: value.to(torch.float8_e4m3fn)
                for name, value in own.items()
                if "t5xxl.transformer" in name
            }
        ),
        r"its weights are quantized \(fp8: text_encoders.t5xxl",
    ),
}


@of("sd3")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_what_it_is(world, fault, tmp_path):
    change, said = FAULTS[fault]
    path = tmp_path / "all.safetensors"
    save_file(change(dict(world.tensors)), path)
    with pytest.raises(UserError, match=said) as caught:
        find_model(path, world.bare, tmp_path / "place")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "place").exists()


@of("sd3", "flux")
def test_without_a_base_nothing_is_fetched(world, tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", None)
    path = tmp_path / "all.safetensors"
    save_file(world.tensors, path)
    family = {"sd3": "Stable Diffusion 3", "flux": "FLUX.1"}[world.family]
    with pytest.raises(
        UserError, match=rf"a transformer of {family}.* and other parts.*--base MODEL"
    ):
        find_model(path, None, tmp_path / "place")


@of("sd3")
def test_a_base_without_the_file_s_text_encoder_is_refused(world, tmp_path):
    make_pipeline("sd3-without-t5").save_pretrained(tmp_path / "small")
    save_file(world.tensors, tmp_path / "all.safetensors")
    with pytest.raises(UserError, match=r"has a text encoder \(text_encoders.t5xxl.* has not"):
        find_model(tmp_path / "all.safetensors", tmp_path / "small", tmp_path / "place")


def test_a_checkpoint_of_xl_needs_configurations_alone(tmp_path):
    make_pipeline("sdxl").save_pretrained(tmp_path / "whole")
    save_file(to_checkpoint(tmp_path / "whole"), tmp_path / "xl.safetensors")
    no_weights = shutil.ignore_patterns("*.safetensors")
    bare = shutil.copytree(tmp_path / "whole", tmp_path / "bare", ignore=no_weights)
    source = find_model(tmp_path / "xl.safetensors", bare, tmp_path / "place")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert is_same(tmp_path / "whole", source.pipeline, part), part
