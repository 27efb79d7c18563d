"""How LoRA files name their tensors: which layer, and which of its two matrices, each one is; and what
a name tells of a file that is no plain LoRA, or one of another family."""

import re
from collections.abc import Iterable
from typing import NamedTuple

DOWN, UP, ALPHA = "down", "up", "alpha"
DENOISER = "denoiser"  # a file's word for a UNet or transformer of whatever family
ADAPTER = "adapter"  # of a file that does not say which part of the pipeline it changes

MATRIX = (
    r"\.(?:lora_(?P<letter>[AB])(?:\.\w+)?\.weight|lora_(?P<kind>down|up)\.weight|(?P<alpha>alpha))"
)
PARTS = r"unet|transformer|text_encoder(?:_[23])?"  # of a pipeline
# kohya's and OneTrainer's: the layer's dots are underscores
KOHYA = re.compile(rf"lora_(?P<part>unet|transformer|te[123]?)_(?P<layer>[\w-]+){MATRIX}")
# PEFT's as diffusers and others write them; those of ComfyUI; an adapter that PEFT saved itself
PEFT = re.compile(
    rf"(?P<part>{PARTS}|diffusion_model|base_model\.model)\.(?P<layer>[\w.-]+?){MATRIX}"
)
BARE = re.compile(  # PEFT's or kohya's of a transformer, without a word for it
    r"(?P<layer>(?:(?:single_)?transformer_blocks|double_blocks|single_blocks|layers|"
    r"(?:context|noise)_refiner)\.\d+\.[\w.]+?)"
    rf"{MATRIX}"
)
OLDER = re.compile(  # diffusers' before PEFT
    r"(unet|text_encoder(?:_2)?)\.([\w.]+?)(?:\.processor)?"
    r"(?:\.(to_q|to_k|to_v|to_out)_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight"
)
XLABS = re.compile(  # of FLUX
    r"(?:diffusion_model\.)?((?:double|single)_blocks\.\d+\.processor\.\w+)\.(down|up)\.weight"
)
WORDS = {"diffusion_model": DENOISER, "base_model.model": ADAPTER}  # for a part of a pipeline
OLDER_LAYERS = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "out_proj",
    },
}
EMBEDDING = r"^bundle_emb\.|emb_params"  # kohya's files hold bundle_emb.WORD.KEY
# what a name tells of a file that is no plain LoRA
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA (weights scaled by magnitudes)",
    r"\.hada_": "LoHa (Hadamard products)",
    r"\.lokr_": "LoKr (Kronecker products)",
    r"\.oft_|oft_blocks": "OFT (orthogonal rotations)",
    r"\.lora_mid\.|\.lora_t[12]\b": "LoRA of convolutions in Tucker form",
    r"\.on_input|\.ia3_": "(IA)^3 (scaled activations)",
    r"_norm\.scale$": "a control LoRA of FLUX, which takes a picture beside the text",
    r"\.diff(_b)?$|\.w_norm|\.b_norm": "whole differences of weights beside LoRA",
    EMBEDDING: "an embedding of a new token beside LoRA",
    r"\.bias$": "LoRA with biases",
}
# what names tell of the family whose LoRA a file is, the first that is found
FAMILY_NAMES = {
    r"(context|noise)_refiner|(^|[._])layers[._]\d+[._](attention|attn)[._]": "Z-Image or Lumina2",
    r"(img|txt)_(mlp[._]net|mod[._]1)": "Qwen-Image",
    r"to_qkv_mlp_proj|_stream_modulation": "FLUX.2-dev or FLUX.2-klein",
    r"single_transformer_blocks[._]\d+[._](attn[._]to_[qkv]|proj_|norm)|\.processor\.": "FLUX.1",
    r"double_blocks|single_blocks|single_transformer_blocks": (
        "FLUX.1, FLUX.2-dev or FLUX.2-klein"
    ),
    r"cross_attn[._](q|kv)_linear": "PixArt or Sana",
    r"joint_blocks|^lora_te3_|^text_encoder_3\.": "Stable Diffusion 3",
    r"^(lora_)?transformer[._]|^diffusion_model\.": (
        "a model with a transformer, such as Stable Diffusion 3, FLUX or PixArt"
    ),
    r"^lora_te2_|^text_encoder_2\.|label_emb|add_embedding|_1_transformer_blocks_[1-9]": (
        "Stable Diffusion XL"
    ),
    r"down_blocks|up_blocks|mid_block": "Stable Diffusion 1 and 2",
}


class Key(NamedTuple):
    """What a tensor of a LoRA file is."""

    part: str  # the file's word for a part of the pipeline: a part's own name, DENOISER, te1, ...
    layer: str  # of kohya's files with underscores for dots
    kind: str  # DOWN, UP or ALPHA


def read_key(key: str) -> Key | None:
    """What a tensor is by its name; None where the name is of no known form."""
    if match := XLABS.fullmatch(key):
        return Key(DENOISER, match[1], match[2])
    if match := KOHYA.fullmatch(key):
        # All trainers of this form call every family's denoiser a UNet.
        part = DENOISER if match["part"] == "unet" else match["part"]
        return Key(part, match["layer"], kind_of(match))
    if match := PEFT.fullmatch(key):
        return Key(WORDS.get(match["part"], match["part"]), match["layer"], kind_of(match))
    if match := BARE.fullmatch(key):
        return Key(DENOISER, match["layer"], kind_of(match))
    if match := OLDER.fullmatch(key):
        part, layer, projection, kind = match.groups()
        if projection:
            names = OLDER_LAYERS[part.removesuffix("_2")]
            layer = f"{layer}.{names.get(projection, projection)}"
        return Key(part, layer, kind)
    return None


def kind_of(match: re.Match) -> str:
    """Which of a layer's tensors a name that matches MATRIX is."""
    if match["letter"]:
        return DOWN if match["letter"] == "A" else UP
    return match["kind"] or ALPHA


def find_other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a tensor's name, what it is) of the first that no plain LoRA has; None where there is none."""
    for key in keys:
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                return key, kind
    return None


def guess_family(keys: Iterable[str]) -> tuple[str, str] | None:
    """(a tensor's name, the family that it tells of); None where no name tells of one."""
    keys = list(keys)
    for pattern, family in FAMILY_NAMES.items():
        if found := next((key for key in keys if re.search(pattern, key)), None):
            return found, family
    return None
