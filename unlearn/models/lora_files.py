"""LoRA files as people have them: read without trust, and brought to one form.

A LoRA adds scale * B A to some weights, A [rank, in] and B [out, rank]. Three ways to name the two in
a file are known: kohya's (lora_unet_..._to_k.lora_down.weight, with an alpha of each layer), PEFT's
(unet....to_k.lora_A.weight, with the alphas in the file's header, as diffusers writes it) and that of
older diffusers (unet....processor.to_k_lora.down.weight). What else a file may hold (DoRA, LoHa, LoKr,
whole differences) is refused by name: nothing of a file is left out in silence, as it is by loaders
that guess from some names how the others are meant.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import UserError
from ..storage.reading import make_object, read_tensors
from .lora_names import Named

MOST_HEADER = 16 << 20  # bytes of text in a file's header
PEFT_HEADER = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
KOHYA = re.compile(r"lora_(unet|te|te1)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")
PEFT = re.compile(r"(unet|text_encoder)\.([\w.]+?)\.lora_([AB])(?:\.\w+)?\.weight")
OLDER = re.compile(
    r"(unet|text_encoder)\.([\w.]+?)(?:\.processor)?"
    r"(?:\.(to_q|to_k|to_v|to_out)_lora|\.lora|\.lora_linear_layer)\.(down|up)\.weight"
)
DOWN, UP, ALPHA = "down", "up", "alpha"
PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder"}  # of a pipeline, by kohya
OLDER_LAYERS = {
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "out_proj",
    },
}
# what a name tells of a file that is no plain LoRA
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA (weights scaled by magnitudes)",
    r"\.hada_": "LoHa (Hadamard products)",
    r"\.lokr_": "LoKr (Kronecker products)",
    r"\.oft_|oft_blocks": "OFT (orthogonal rotations)",
    r"\.lora_mid\.|\.lora_t[12]\b": "LoRA of convolutions in Tucker form",
    r"\.on_input|\.ia3_": "(IA)^3 (scaled activations)",
    r"\.diff(_b)?$|\.w_norm|\.b_norm": "whole differences of weights beside LoRA",
    r"^bundle_emb|emb_params": "an embedding of a new token beside LoRA",
    r"\.bias$": "LoRA with biases",
}
OTHER_FAMILIES = {
    r"^lora_te2_|^text_encoder_2\.|^lora_unet_(label_emb|add_embedding)": "Stable Diffusion XL",
    r"^(lora_)?transformer[._]|^diffusion_model\.|^lora_unet_(double|single|joint)_blocks|^lora_te3_": (
        "a model with a transformer, such as Stable Diffusion 3, FLUX or PixArt"
    ),
}
RESAVE = "save it by diffusers' own pipeline.save_lora_weights"


@dataclass
class Pair:
    """A LoRA's change of one layer: scale * up @ down."""

    down: torch.Tensor  # A [rank, in] or of a convolution [rank, in, height, width], float32
    up: torch.Tensor  # B [out, rank] or [out, rank, 1, 1], float32
    scale: float  # alpha / rank


@dataclass
class LoraFile:
    """A LoRA as it stands in its file."""

    named: Named
    pairs: dict[tuple[str, str], Pair]  # by part of the pipeline and name of the layer there
    header: dict[str, str] = field(repr=False)  # what its trainer wrote


def read_header(path: Path) -> dict[str, str]:
    """What stands in the header of a safetensors file beside its tensors, {} where nothing does.
    Raises UserError where it is none, or has absurdly much."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"--lora {path}: not a whole safetensors file ({reason:.100})") from None
    if sum(len(key) + len(value) for key, value in found.items()) > MOST_HEADER:
        raise UserError(f"--lora {path}: its header has more than {MOST_HEADER >> 20} MB")
    return dict(found)


def read_object(text: str | None) -> dict[str, Any]:
    """A JSON object in a header's field, {} where it is something else."""
    try:
        found = json.loads(text or "", object_pairs_hook=make_object)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_kind(path: Path, keys: Iterable[str], header: Mapping[str, str]) -> None:
    """Raises UserError, by name, where a file's tensors are those of something else than a LoRA of
    a Stable Diffusion 1 or 2."""
    for key in keys:
        for pattern, kind in OTHER_KINDS.items():
            if re.search(pattern, key):
                raise UserError(
                    f"--lora {path}: {kind} ({key:.100}), which cannot be used: diffusers would "
                    f"leave it out; merge it into its base model by the program that trained it, "
                    f"and give that as the model"
                )
        for pattern, family in OTHER_FAMILIES.items():
            if re.search(pattern, key):
                raise UserError(
                    f"--lora {path}: a LoRA of {family} ({key:.100}); supported are those of "
                    f"Stable Diffusion 1 and 2{tell_base(header)}"
                )
        if key.startswith("base_model.model."):
            raise UserError(
                f"--lora {path}: an adapter as PEFT saves it ({key:.100}), which does not say the "
                f"part of the pipeline that it changes; {RESAVE}"
            )


def tell_base(header: Mapping[str, str]) -> str:
    """What a header says of the base model, for a message."""
    said = header.get("modelspec.architecture") or header.get("ss_base_model_version")
    return f" (its header says {said!a:.60})" if said else ""


def name_layer(key: str) -> tuple[str, str, str] | None:
    """What a tensor of a LoRA file is: (part of the pipeline, layer, one of down, up and alpha), by
    its name; None where the name is of no known form. Of kohya's files the layer's dots are
    underscores."""
    if match := KOHYA.fullmatch(key):
        kind = match[3].removeprefix("lora_").removesuffix(".weight")
        return PARTS[match[1]], match[2], kind
    if match := PEFT.fullmatch(key):
        return match[1], match[2], DOWN if match[3] == "A" else UP
    if match := OLDER.fullmatch(key):
        part, layer, projection, kind = match.groups()
        if not projection:
            return part, layer, kind
        return part, f"{layer}.{OLDER_LAYERS[part].get(projection, projection)}", kind
    return None


def read_alphas(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings by part of the pipeline that say a layer's alpha: {part: settings}. Raises
    UserError where they say that it is no plain LoRA."""
    found, parts = read_object(header.get(PEFT_HEADER)), {}
    for key, value in found.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    for settings in parts.values():
        for flag in ("use_dora", "use_rslora", "use_qalora", "lora_bias"):
            if settings.get(flag):
                raise UserError(
                    f"--lora {path}: its header says {flag}: no plain LoRA, which cannot be used"
                )
    return parts


def alpha_of(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """The alpha of a layer by PEFT's settings; its rank, so a scale of 1, where they do not say."""
    patterns = settings.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^")
        if layer == name or (not pattern.startswith("^") and layer.endswith(f".{name}")):
            return value
    return settings.get("lora_alpha", rank)


def check_numbers(path: Path, key: str, tensor: torch.Tensor) -> None:
    """Raises UserError where a tensor of a LoRA file cannot be one."""
    if not tensor.is_floating_point():
        raise UserError(f"--lora {path}: {key:.100}: expected floats, found {tensor.dtype}")
    if tensor.numel() == 0:
        raise UserError(
            f"--lora {path}: {key:.100} has the shape {list(tensor.shape)}: a LoRA of rank 0 "
            f"changes nothing"
        )
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"--lora {path}: {key:.100} has NaN or infinite entries: its training diverged, or "
            f"the file is damaged"
        )


def make_pair(
    path: Path, layer: str, found: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> Pair:
    """The Pair of a layer from its tensors. Raises UserError where they do not fit each other."""
    for kind in (DOWN, UP):
        if kind not in found:
            raise UserError(f"--lora {path}: {layer:.100} has no {kind} matrix: half a LoRA")
    down, up = found[DOWN].float(), found[UP].float()
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != len(down):
        raise UserError(
            f"--lora {path}: {layer:.100}: its two matrices do not fit each other "
            f"({list(down.shape)} and {list(up.shape)})"
        )
    alpha = found[ALPHA].flatten()[0] if ALPHA in found else alpha_of(settings, layer, len(down))
    try:
        scale = float(alpha) / len(down)
    except (TypeError, ValueError):
        scale = math.nan
    if not math.isfinite(scale) or scale == 0:
        raise UserError(
            f"--lora {path}: {layer:.100}: its alpha is {alpha!s:.40}: expected a number other than 0"
        )
    return Pair(down.contiguous(), up.contiguous(), scale)


def read_lora(named: Named) -> LoraFile:
    """A LoRA's file. Raises UserError, in one line that says what it is, where it is damaged or no
    plain LoRA of Stable Diffusion 1 or 2."""
    path = named.path
    header = read_header(path)
    tensors = read_tensors(path, "--lora")
    if not tensors:
        raise UserError(f"--lora {path}: holds no tensors")
    check_kind(path, tensors, header)
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if (place := name_layer(key)) is None:
            raise UserError(
                f"--lora {path}: {key:.100}: is not how a LoRA names its tensors (kohya's, PEFT's or "
                f"diffusers' way); if it is a whole model, give it as the model"
            )
        check_numbers(path, key, tensor)
        part, layer, kind = place
        found.setdefault((part, layer), {})[kind] = tensor
    settings = read_alphas(path, header)
    pairs = {
        (part, layer): make_pair(path, layer, kinds, settings.get(part, {}))
        for (part, layer), kinds in found.items()
    }
    return LoraFile(named, pairs, header)
