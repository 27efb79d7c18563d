"""The file of a transformer alone, as FLUX.1 and Stable Diffusion 3 are passed on, gives with the folder
of the rest the weights of its pipeline; what cannot be used is refused by name."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import PARITY
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from test_attribute import rename
from tiny_families import make_pipeline

from unlearn.commands import convert
from unlearn.errors import UserError
from unlearn.front import transformer_files
from unlearn.front.models import find_model
from unlearn.models.pipelines import load_model

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
# diffusers' names -> those of the authors' programs (black-forest-labs/flux, Stability-AI/sd3.5), as
# their published files have them, without layers that are joined there
FLUX_NAMES = [
    (r"^time_text_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
    (r"^time_text_embed\.text_embedder\.linear_1", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2", "vector_in.out_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_1", "guidance_in.in_layer"),
    (r"^time_text_embed\.guidance_embedder\.linear_2", "guidance_in.out_layer"),
    (r"^context_embedder", "txt_in"),
    (r"^x_embedder", "img_in"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "double_blocks"),
    (r"^single_transformer_blocks", "single_blocks"),
    (r"norm1\.linear", "img_mod.lin"),
    (r"norm1_context\.linear", "txt_mod.lin"),
    (r"(single_blocks\.\d+)\.norm\.linear", r"\1.modulation.lin"),
    (r"(single_blocks\.\d+)\.attn\.norm_q\.weight", r"\1.norm.query_norm.scale"),
    (r"(single_blocks\.\d+)\.attn\.norm_k\.weight", r"\1.norm.key_norm.scale"),
    (r"(single_blocks\.\d+)\.proj_out", r"\1.linear2"),
    (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
    (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
    (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
    (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
    (r"ff\.net\.0\.proj", "img_mlp.0"),
    (r"ff\.net\.2", "img_mlp.2"),
    (r"ff_context\.net\.0\.proj", "txt_mlp.0"),
    (r"ff_context\.net\.2", "txt_mlp.2"),
    (r"attn\.to_out\.0", "img_attn.proj"),
    (r"attn\.to_add_out", "txt_attn.proj"),
]
SD3_NAMES = [
    (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"^pos_embed\.pos_embed", "pos_embed"),
    (r"^pos_embed\.proj", "x_embedder.proj"),
    (r"^proj_out", "final_layer.linear"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"),
    (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
    (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
    (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
    (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"attn\.to_add_out", "context_block.attn.proj"),
]
# those that are joined: the first of each, the others, and the name of all
FLUX_JOINED = [
    (r"^(single_blocks\.\d+\.)attn\.to_q\.", r"\1linear1.", ("attn.to_k", "attn.to_v", "proj_mlp")),
    (r"^(double_blocks\.\d+\.)attn\.to_q\.", r"\1img_attn.qkv.", ("attn.to_k", "attn.to_v")),
    (
        r"^(double_blocks\.\d+\.)attn\.add_q_proj\.",
        r"\1txt_attn.qkv.",
        ("attn.add_k_proj", "attn.add_v_proj"),
    ),
]
SD3_JOINED = [
    (r"^(joint_blocks\.\d+\.)attn\.to_q\.", r"\1x_block.attn.qkv.", ("attn.to_k", "attn.to_v")),
    (r"^(joint_blocks\.\d+\.)attn2\.to_q\.", r"\1x_block.attn2.qkv.", ("attn2.to_k", "attn2.to_v")),
    (
        r"^(joint_blocks\.\d+\.)attn\.add_q_proj\.",
        r"\1context_block.attn.qkv.",
        ("attn.add_k_proj", "attn.add_v_proj"),
    ),
]
NAMES = {"flux": (FLUX_NAMES, FLUX_JOINED), "sd3": (SD3_NAMES, SD3_JOINED)}
LAST_TEXT = "joint_blocks.1.context_block.adaLN_modulation.1."


def to_authors(family, folder):
    """The weights of a tiny pipeline's transformer as the authors' program keeps them."""
    names, joined = NAMES[family.partition("-")[0]]
    tensors = rename(load_file(folder / TRANSFORMER), names, "")
    found = {}
    for name, value in tensors.items():
        for pattern, target, others in joined:
            if match := re.match(pattern, name):
                kind = name[match.end() :]
                parts = [value, *(tensors[f"{match[1]}{other}.{kind}"] for other in others)]
                name, value = match.expand(target) + kind, torch.cat(parts)
        found[name] = value
    gone = r"(attn2?\.(to_[qkv]|add_[qkv]_proj)|single_blocks\.\d+\.proj_mlp)\."
    found = {name: value for name, value in found.items() if not re.search(gone, name)}
    for name, value in found.items():  # scale before shift
        if name.startswith(("final_layer.adaLN", LAST_TEXT)):
            found[name] = torch.cat(value.chunk(2)[::-1])
    return found


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
every_family = of("flux", slow("flux-schnell"), slow("sd3"), "sd3-medium35")


@every_family
def test_these_names_are_those_that_diffusers_converts(world, monkeypatch):
    """Its converter of FLUX.1 takes the published width for granted."""
    split = torch.split

    def split_alike(tensor, sizes, dim=0):
        return split(tensor, [len(tensor) * size // sum(sizes) for size in sizes], dim)

    monkeypatch.setattr(torch, "split", split_alike)
    name = f"convert_{world.family.partition('-')[0]}_transformer_checkpoint_to_diffusers"
    converted = getattr(single_file_utils, name)(dict(world.tensors))
    assert converted.keys() == world.own.keys()
    assert all(torch.equal(converted[name], value) for name, value in world.own.items())


@every_family
@pytest.mark.parametrize("form", ["bare", "ComfyUI", "diffusers"])
def test_the_file_of_a_transformer_gives_its_weights_beside_the_other_parts(
    world, form, tmp_path, monkeypatch
):
    """Written in several shards too."""
    monkeypatch.setattr(transformer_files, "SHARD_BYTES", 20_000 if form == "ComfyUI" else 1 << 30)
    prefix = "model.diffusion_model." if form == "ComfyUI" else ""
    tensors = world.own if form == "diffusers" else world.tensors
    path = tmp_path / "mine.safetensors"
    save_file({f"{prefix}{name}": value for name, value in tensors.items()}, path)
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
    "whole": (
        lambda own: {
            **{f"model.diffusion_model.{name}": value for name, value in own.items()},
            "text_encoders.clip_l.logit_scale": torch.zeros(1),
        },
        "holds other parts beside the transformer.*FluxPipeline as P",
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
    torch.save(world.tensors, tmp_path / "mine.pth")
    with pytest.raises(
        UserError, match="beside FluxPipeline .* expected its transformer alone, as .s"
    ):
        find_model(tmp_path / "mine.pth", world.base, tmp_path / "place")
