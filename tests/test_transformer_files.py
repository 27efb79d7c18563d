"""The file of a transformer alone, as its authors' program and ComfyUI have it, gives with the folder of
the rest the weights of its pipeline; what cannot be used is refused by name."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from authors_names import TRANSFORMER, kind_of, to_authors
from conftest import PARITY
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from tiny_families import make_pipeline

from unlearn.commands import convert
from unlearn.errors import UserError
from unlearn.front import transformer_files
from unlearn.front.models import find_model
from unlearn.models.pipelines import load_model
from unlearn.storage.weight_files import open_weights, read_torch


class World:
    """A tiny pipeline's folder, its file by the authors' names, and a pipeline that lends the rest, whose
    transformer has other weights."""

    def __init__(self, family, folder):
        self.family, self.folder, self.base = family, folder / "pipeline", folder / "base"
        make_pipeline(family).save_pretrained(self.folder)
        self.own = load_file(self.folder / TRANSFORMER)
        self.tensors = to_authors(family, self.folder)
        shutil.copytree(self.folder, self.base)
        save_file({name: value + 1 for name, value in self.own.items()}, self.base / TRANSFORMER)


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


def of(*families):
    """A test of these tiny pipelines' worlds."""
    return pytest.mark.parametrize("world", families, indirect=True, scope="module")


def read_transformer(pipeline):
    """The weights of a pipeline's transformer, in one file or several, and how many there are."""
    paths = sorted(Path(pipeline, "transformer").glob("*.safetensors"))
    return {name: value for path in paths for name, value in load_file(path).items()}, len(paths)


slow = lambda family: pytest.param(family, marks=pytest.mark.slow)
CONVERTED = [
    "flux",
    slow("flux-schnell"),
    slow("sd3"),
    "sd3-medium35",
    "klein",
    "zimage",
    "lumina2",
    "sana",
]
OTHERS = [slow("flux2"), "pixart", slow("pixart-sized"), slow("pixart-sigma"), "sana-euler", "qwen"]
CONVERTERS = {
    "klein": "flux2_transformer_checkpoint",
    "zimage": "z_image_transformer_checkpoint",
    "lumina2": "lumina2",
    "sana": "sana_transformer",
}


@of(*CONVERTED)
def test_these_names_are_those_that_diffusers_converts(world, monkeypatch):
    """Its converters of FLUX.1 and Lumina2 take the published widths for granted."""
    split = torch.split

    def split_alike(tensor, sizes, dim=0):
        shares = [2, 1, 1] if world.family == "lumina2" else sizes  # of queries, keys and values
        return split(tensor, [len(tensor) * share // sum(shares) for share in shares], dim)

    monkeypatch.setattr(torch, "split", split_alike)
    kind = kind_of(world.family)
    name = f"convert_{CONVERTERS.get(kind, f'{kind}_transformer_checkpoint')}_to_diffusers"
    converted = getattr(single_file_utils, name)(dict(world.tensors))
    assert converted.keys() == world.own.keys()
    assert all(torch.equal(converted[name], value) for name, value in world.own.items())


@of(*CONVERTED, *OTHERS)
@pytest.mark.parametrize("form", ["bare", "ComfyUI", "diffusers", "torch"])
def test_the_file_of_a_transformer_gives_its_weights_beside_the_other_parts(
    world, form, tmp_path, monkeypatch
):
    """Written in several shards too."""
    monkeypatch.setattr(transformer_files, "SHARD_BYTES", 20_000 if form == "ComfyUI" else 1 << 30)
    prefix = "model.diffusion_model." if form == "ComfyUI" else ""
    tensors = world.own if form == "diffusers" else world.tensors
    tensors = {f"{prefix}{name}": value for name, value in tensors.items()}
    path = tmp_path / f"mine.{'pth' if form == 'torch' else 'safetensors'}"
    torch.save({"state_dict": tensors}, path) if form == "torch" else save_file(tensors, path)
    source = find_model(path, world.base, tmp_path / "place")
    found, count = read_transformer(source.pipeline)
    assert found.keys() == world.own.keys() and (count > 2) is (form == "ComfyUI")
    assert all(torch.equal(found[name], value) for name, value in world.own.items())
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "place").rglob("*"))
    assert find_model(path, world.base, tmp_path / "place") == source, "it is made once"
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "place").rglob("*"))


@of("flux", slow("sd3-medium35"))
def test_what_convert_makes_of_it_is_the_model_that_it_was(world, tmp_path, capsys):
    half = {name: value.bfloat16() for name, value in world.tensors.items()}
    save_file(half, tmp_path / "mine.safetensors")
    convert.main(
        [
            str(tmp_path / "mine.safetensors"),
            *("--base", str(world.base), "--out", str(tmp_path / "out")),
        ]
    )
    made = Path(capsys.readouterr().out.removeprefix("Pipeline: ").strip())
    found, _ = read_transformer(made)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    model = load_model(made, "cpu")
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, world.own[name].bfloat16().float()), name
    assert model.weights_hash != load_model(world.base, "cpu").weights_hash


@of("flux")
def test_a_base_needs_no_weights_of_the_transformer(world, tmp_path):
    (shutil.copytree(world.base, tmp_path / "base") / TRANSFORMER).unlink()
    save_file(world.tensors, tmp_path / "mine.safetensors")
    source = find_model(tmp_path / "mine.safetensors", tmp_path / "base", tmp_path / "place")
    assert read_transformer(source.pipeline)[0].keys() == world.own.keys()


def joined(tensors, **more):
    return {**tensors, **{name.replace("__", "."): value for name, value in more.items()}}


FAULTS = {  # what is done to the tensors of a file, and what is said of it
    "fp8": (
        lambda own: {name: value.to(torch.float8_e4m3fn) for name, value in own.items()},
        r"its weights are quantized \(fp8: .*give the same model in bf16, fp16 or fp32",
    ),
    "scaled fp8": (lambda own: joined(own, scaled_fp8=torch.zeros(2)), "quantized .scaled fp8"),
    "nf4": (
        lambda own: joined(own, txt_in__weight__absmax=torch.zeros(2, dtype=torch.uint8)),
        "quantized .bitsandbytes, nf4 or int8: txt_in.weight.absmax",
    ),
    "int8": (lambda own: joined(own, x=torch.zeros(2, dtype=torch.int8)), "quantized .int8: x"),
    "more": (
        lambda own: joined(own, double_blocks__9__img_mlp__0__bias=torch.zeros(2)),
        r"double_blocks.9.img_mlp.0.bias is no weight of the transformer of this FLUX.1",
    ),
    "less": (
        lambda own: {name: value for name, value in own.items() if "guidance" not in name},
        "lacks 4 weights of the transformer of this FLUX.1, first .*guidance.*--base MODEL",
    ),
    "other": (
        lambda own: joined(own, img_in__weight=torch.zeros(16, 384)),
        r"img_in.weight has the shape \[16, 384\], that of the transformer .* \[16, 32\]",
    ),
    "LoRA": (lambda own: joined(own, double_blocks__0__lora_A__weight=torch.ones(1)), "--lora"),
}


@of("flux")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used_is_refused_by_what_it_is(world, fault, tmp_path):
    change, said = FAULTS[fault]
    path = tmp_path / "mine.safetensors"
    save_file(change(dict(world.tensors)), path)
    with pytest.raises(UserError, match=said) as caught:
        find_model(path, world.base, tmp_path / "place")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "place").exists()


@of("flux")
def test_without_a_folder_of_the_rest_it_is_said_what_the_file_holds(world, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(world.tensors, path)
    for base, said in (
        (None, "the transformer of FLUX.1.* alone .*--base MODEL"),
        (PARITY / "fixture/sd-tiny", "StableDiffusionPipeline has a UNet; .* holds a transformer"),
        ("me/mine", "--base me/mine: expected a folder.*hf download me/mine --local-dir base"),
    ):
        with pytest.raises(UserError, match=said):
            find_model(path, base, tmp_path / "place")


class Hostile:
    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@of("pixart")
def test_a_file_of_pixart_s_authors_runs_no_code(world, tmp_path):
    """Nor is what trainers put beside the weights a hindrance."""
    path, ran = tmp_path / "mine.pth", tmp_path / "ran"
    state = {"state_dict": world.tensors, "optimizer": {"state": {}}, "epoch": 3}
    torch.save({**state, "scheduler": Hostile(ran)}, path)
    with pytest.raises(UserError, match="holds something else than tensors, which is never unpick"):
        find_model(path, world.base, tmp_path / "place")
    assert not ran.exists()
    torch.save(state, path)
    found, _ = read_transformer(find_model(path, world.base, tmp_path / "place").pipeline)
    assert all(torch.equal(found[name], value) for name, value in world.own.items())


def test_a_file_that_holds_itself_ends(tmp_path):
    state: dict = {"a": torch.ones(1)}
    state["state_dict"] = state
    torch.save(state, path := tmp_path / "mine.pth")
    with pytest.raises(UserError, match="expected a dictionary of tensors by name"):
        read_torch(path, "--model")


def test_a_tensor_of_one_number_is_read_as_it_is(tmp_path):
    tensors = {"number": torch.tensor(3.0), "rows": torch.arange(6.0).reshape(3, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.pth")
    for path in tmp_path.iterdir():
        with open_weights(path, "--model") as file:
            assert torch.equal(file.rows("number"), tensors["number"])
            assert torch.equal(file.rows("rows", 1, 2), tensors["rows"][1:2])


@of("pixart")
@pytest.mark.parametrize(
    "name, shape", [("pos_embed", (1, 64, 24)), ("y_embedder.y_embedding", (300, 20))]
)
def test_a_pixart_of_another_size_or_kind_with_the_same_weights_is_told_apart(
    world, name, shape, tmp_path
):
    """Alpha and sigma, and models of 512 and 1024 pixels, differ in these alone."""
    path = tmp_path / "mine.safetensors"
    save_file(world.tensors | {name: torch.zeros(shape)}, path)
    with pytest.raises(UserError, match=rf"{name} has the shape .* of another model; .*--base"):
        find_model(path, world.base, tmp_path / "place")


@of("pixart", "zimage", "qwen", "klein")
def test_a_transformer_without_a_base_is_told_by_its_names(world, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(world.tensors, path)
    kind = {"pixart": "PixArt or", "zimage": "Z-Image or", "qwen": "Qwen-Image", "klein": "FLUX.2-"}
    with pytest.raises(
        UserError, match=rf"the transformer of .*{kind[world.family]}.*--base MODEL"
    ):
        find_model(path, None, tmp_path / "place")
