"""A checkpoint file of Stable Diffusion XL gives the weights of its pipeline, and what a file says of
its training is obeyed."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_attribute import UNET_NAMES, VAE_NAMES, rename
from tiny_families import make_pipeline

from unlearn.errors import UserError
from unlearn.front.models import find_model
from unlearn.models.pipelines import load_model

# Names of diffusers' weights -> those of the original program, as in test_attribute.py; of a UNet
# whose second block attends, and a VAE of two blocks.
XL_NAMES = [
    (r"^add_embedding\.linear_1", "label_emb.0.0"),
    (r"^add_embedding\.linear_2", "label_emb.0.2"),
    (r"^down_blocks\.1\.attentions\.0", "input_blocks.3.1"),
    (r"^up_blocks\.0\.attentions\.(\d)", r"output_blocks.\1.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.2.conv"),
    *UNET_NAMES,
]
XL_VAE_NAMES = [
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{1 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{1 - int(found[1])}.upsample"),
    *VAE_NAMES,
]
OPEN_CLIP_NAMES = [
    (r"^text_model\.", ""),
    (r"^embeddings\.token_embedding", "token_embedding"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^encoder\.layers", "transformer.resblocks"),
    (r"^final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn", "attn"),
]


def join_projections(tensors):
    """OpenCLIP's tensors with queries, keys and values in one, and its projection turned."""
    joined = {name: value for name, value in tensors.items() if not re.search(r"[qkv]_proj", name)}
    for name in [name for name in tensors if ".q_proj." in name]:
        own = [tensors[name.replace(".q_proj.", f".{one}_proj.")] for one in "qkv"]
        joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(own)
    joined["text_projection"] = joined.pop("text_projection.weight").T
    return joined


def to_checkpoint(folder):
    """A tiny pipeline's weights as the original program's single file has them."""
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    unet, vae, text, second = (
        load_file(next((folder / part).glob("*.safetensors"))) for part in parts
    )
    text = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.items()}
    second = join_projections(rename(second, OPEN_CLIP_NAMES, ""))
    tensors = {
        **rename(unet, XL_NAMES, "model.diffusion_model."),
        **{
            name: value[..., None, None] if "attn_1" in name and value.ndim == 2 else value
            for name, value in rename(vae, XL_VAE_NAMES, "first_stage_model.").items()
        },
        **rename(text, [], "conditioner.embedders.0.transformer."),
        **rename(second, [], "conditioner.embedders.1.model."),
    }
    return {name: value.contiguous() for name, value in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny pipeline of Stable Diffusion XL."""
    folder = tmp_path_factory.mktemp("xl") / "pipeline"
    make_pipeline("sdxl").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_of_xl_gives_the_weights_of_its_pipeline(suffix, folder, tmp_path):
    path, tensors = tmp_path / f"xl{suffix}", to_checkpoint(folder)
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    source = find_model(path, folder, tmp_path / "place")
    expected, found = load_model(folder, "cpu"), load_model(source.pipeline, "cpu")
    assert found.weights_hash == expected.weights_hash and found.identity == expected.identity


def test_marks_of_a_checkpoint_that_predicts_v_are_obeyed(folder, tmp_path):
    tensors = to_checkpoint(folder) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, tmp_path / "v.safetensors")
    source = find_model(tmp_path / "v.safetensors", folder, tmp_path / "place")
    model = load_model(source.pipeline, "cpu")
    assert model.prediction_type == "v_prediction" and model.alpha_bars[-1] == 0
    said = json.loads(Path(source.pipeline, "scheduler/scheduler_config.json").read_text())
    assert said["rescale_betas_zero_snr"] is True


def test_the_refiner_s_checkpoint_is_refused_by_name(folder, tmp_path):
    tensors = {"conditioner.embedders.0.model.ln_final.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "refiner.safetensors")
    with pytest.raises(UserError, match="refiner, which only changes pictures"):
        find_model(tmp_path / "refiner.safetensors", folder, tmp_path / "place")


def test_without_a_model_of_its_kind_the_way_on_names_the_class_of_xl(folder, tmp_path):
    names = ("conditioner.embedders.0.transformer.x", "model.diffusion_model.x")
    save_file({name: torch.ones(1) for name in names}, tmp_path / "xl.safetensors")
    with pytest.raises(UserError, match="StableDiffusionXLPipeline as P.*--model converted"):
        find_model(tmp_path / "xl.safetensors", folder, tmp_path / "place")
