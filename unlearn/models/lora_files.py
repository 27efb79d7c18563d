"""LoRA files as people have them: read without trust, and brought to one form.

A LoRA adds scale * B A to some weights, A [rank, in] and B [out, rank]. The ways to name the two in a
file that are known (`lora_keys`): kohya's (lora_unet_..._to_k.lora_down.weight, with an alpha of each
layer), PEFT's (unet....to_k.lora_A.weight, with the alphas in the file's header, as diffusers writes
it, or in the adapter_config.json beside it, as PEFT does), that of older diffusers
(unet....processor.to_k_lora.down.weight), and XLabs' of FLUX. What else a file may hold (DoRA, LoHa,
LoKr, whole differences) is refused by name: nothing of a file is left out in silence, as it is by
loaders that guess from some names how the others are meant.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import UserError
from ..storage.reading import make_object, read_json, read_tensors
from .lora_keys import (
    ADAPTER,
    ALPHA,
    DOWN,
    EMBEDDING,
    OTHER_KINDS,
    UP,
    find_other_kind,
    read_key,
)
from .lora_names import Named

MOST_HEADER = 16 << 20  # bytes of text in a file's header
PEFT_HEADER = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
PEFT_FILE = "adapter_config.json"  # where PEFT itself keeps them
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
    pairs: dict[tuple[str, str], Pair]  # by part and layer as the file calls them, see `Key`
    keys: tuple[str, ...] = field(repr=False)  # names of its tensors
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


def check_kind(path: Path, keys: tuple[str, ...]) -> None:
    """Raises UserError, by name, where a file's tensors are those of something else than a plain
    LoRA."""
    if not (found := find_other_kind(keys)):
        return
    key, kind = found
    if kind == OTHER_KINDS[EMBEDDING]:
        raise UserError(
            f"--lora {path}: {kind} ({key:.100}); take them apart and give each by its own flag "
            f"(--lora, --textual_inversion): python -c {shlex.quote(write_parting(path))}"
        )
    raise UserError(
        f"--lora {path}: {kind} ({key:.100}), which cannot be used: diffusers would leave it out "
        f"or change it; merge it into its base model by the program that trained it, and give "
        f"that as the model"
    )


def write_parting(path: Path) -> str:
    """Python that writes the LoRA of a file, and each embedding in it, as files of their own."""
    return (
        "from safetensors import safe_open; from safetensors.torch import save_file; "
        f"f = safe_open({str(path)!r}, 'pt'); t = {{k: f.get_tensor(k) for k in f.keys()}}; "
        "words = {k.split('.')[1] for k in t if k.startswith('bundle_emb.')}; "
        "save_file({k: v for k, v in t.items() if not k.startswith('bundle_emb.')}, "
        f"{str(path.with_name(path.stem + '-lora.safetensors'))!r}, f.metadata()); "
        "[save_file({'emb_params' if k.endswith('*') else k.split('.')[-1]: v for k, v in t.items() "
        "if k.startswith(f'bundle_emb.{w}.')}, "
        f"{str(path.parent)!r} + f'/{{w}}.safetensors') for w in words]"
    )


def tell_base(header: Mapping[str, str]) -> str:
    """What a header says of the base model, for a message."""
    said = header.get("modelspec.architecture") or header.get("ss_base_model_version")
    return f" (its header says {said!a:.60})" if said else ""


def read_alphas(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings by part of the pipeline that say a layer's alpha: {part: settings}. Raises
    UserError where they say that it is no plain LoRA."""
    found, parts = read_object(header.get(PEFT_HEADER)), {}
    for key, value in found.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    for settings in parts.values():
        check_settings(path, settings, "its header")
    return parts


def check_settings(path: Path, settings: Mapping[str, Any], whose: str) -> None:
    """Raises UserError where PEFT's settings are those of no plain LoRA."""
    for flag in ("use_dora", "use_rslora", "use_qalora", "lora_bias"):
        if settings.get(flag):
            raise UserError(
                f"--lora {path}: {whose} says {flag}: no plain LoRA, which cannot be used"
            )


def read_adapter_settings(path: Path, key: str) -> dict[str, Any]:
    """PEFT's settings beside an adapter that it saved itself. Raises UserError where there are none,
    or they are those of no plain LoRA. key: one of its tensors."""
    beside = path.with_name(PEFT_FILE)
    settings = read_json(beside, "--lora") if beside.is_file() else None
    if not isinstance(settings, dict):
        raise UserError(
            f"--lora {path}: an adapter as PEFT saves it ({key:.100}), without the {PEFT_FILE} "
            f"beside it that says its alpha; give the folder that holds both, or {RESAVE}"
        )
    check_settings(path, settings, PEFT_FILE)
    return settings


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
    plain LoRA."""
    path = named.path
    header = read_header(path)
    tensors = read_tensors(path, "--lora")
    if not tensors:
        raise UserError(f"--lora {path}: holds no tensors")
    check_kind(path, tuple(tensors))
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    settings = read_alphas(path, header)
    for name, tensor in tensors.items():
        if (key := read_key(name)) is None:
            raise UserError(
                f"--lora {path}: {name:.100}: is not how a LoRA names its tensors (kohya's, PEFT's or "
                f"diffusers' way); if it is a whole model, give it as the model"
            )
        check_numbers(path, name, tensor)
        if key.part == ADAPTER and ADAPTER not in settings:
            settings[ADAPTER] = read_adapter_settings(path, name)
        kinds = found.setdefault((key.part, key.layer), {})
        if key.kind in kinds:
            raise UserError(f"--lora {path}: {name:.100}: names the {key.kind} of its layer twice")
        kinds[key.kind] = tensor
    pairs = {
        (part, layer): make_pair(path, layer, kinds, settings.get(part, {}))
        for (part, layer), kinds in found.items()
    }
    return LoraFile(named, pairs, tuple(tensors), header)
