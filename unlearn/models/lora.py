"""LoRA on a pipeline: its layers found, its matrices added beside the UNet's weights or fused into
them.

Beside the weights, through diffusers and PEFT, the matrices themselves can be unlearned
(`--weight_selection lora`): they are what the images trained. Fused, the model is a plain one. What
a LoRA changes of the text encoder is always fused, for nothing is ever unlearned there.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import is_peft_available
from diffusers.utils import logging as diffusers_logging

from ..errors import UserError
from ..storage.hashes import hash_tensors
from .lora_files import LoraFile, Pair, read_lora, tell_base
from .lora_names import parse_name

SELECTION = "lora"
MATRICES = r"\.lora_[AB]\."  # in the names of a UNet's parameters
Placed = dict[str, dict[str, Pair]]  # by part of the pipeline, then by layer


def choose_selection(given: str | None, lora: Sequence[object], default: str) -> str:
    """The weights that are unlearned where nobody says: a LoRA's own, where there is one."""
    return given or (SELECTION if lora else default)


def is_fused(selection: str | None) -> bool:
    """Whether a LoRA is fused into the weights, so that those which are selected can be unlearned;
    where none are, its matrices stay apart."""
    return selection not in (None, SELECTION)


def has_matrices(denoiser: torch.nn.Module) -> bool:
    """Whether a LoRA's matrices stand beside the weights of a denoiser."""
    return any(".base_layer." in name for name, _ in denoiser.named_parameters())


def check_selection(denoiser: torch.nn.Module, selection: str) -> None:
    """Raises UserError where the weights that are selected are not those of a denoiser as its LoRA
    stands: beside the weights, or fused into them."""
    if selection == SELECTION and not has_matrices(denoiser):
        raise UserError(
            f"--weight_selection {selection}: the model has no LoRA on its UNet whose matrices could "
            f"be unlearned; give one by --lora or, where it changes the text encoder alone, give "
            f"--weight_selection cross-attn-kv"
        )
    if selection != SELECTION and has_matrices(denoiser):
        raise UserError(
            f"--weight_selection {selection}: the LoRA stands beside these weights; load the model "
            f"with it fused (fuse_lora=True), or select {SELECTION}"
        )


def list_layers(module: torch.nn.Module) -> dict[str, tuple[str, Any]]:
    """The layers that a LoRA may change, by every name that a file may give them: with underscores
    for dots, as kohya does, and of a text encoder with `text_model.` before it or without: {name:
    (its name in the module, layer)}."""
    layers = {}
    for name, layer in module.named_modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            bare = name.removeprefix("text_model.")
            for known in (name, bare, f"text_model.{bare}"):
                layers[known] = layers[known.replace(".", "_")] = (name, layer)
    return layers


def place(lora: LoraFile, pipeline: Any) -> Placed:
    """The pairs of a LoRA by the layers of a pipeline. Raises UserError where one matches no layer,
    or is of another shape."""
    placed: Placed = {part: {} for part in ("unet", "text_encoder")}
    known = {part: list_layers(getattr(pipeline, part)) for part in placed}
    for (part, layer), pair in lora.pairs.items():
        if layer not in known[part]:
            raise UserError(
                f"--lora {lora.named.path}: {layer:.100} is no layer of this model's {part}: it is "
                f"a LoRA of another model{tell_base(lora.header)}"
            )
        name, module = known[part][layer]
        if name in placed[part]:
            raise UserError(f"--lora {lora.named.path}: names {name} of the {part} twice")
        check_shape(lora, part, name, module.weight, pair)
        placed[part][name] = pair
    return placed


def check_shape(lora: LoraFile, part: str, layer: str, weight: torch.Tensor, pair: Pair) -> None:
    """Raises UserError where a pair does not fit a layer's weight."""
    expected = [weight.shape[0], *weight.shape[1:]]
    found = [pair.up.shape[0], *pair.down.shape[1:]]
    if found != expected or pair.up[0, 0].numel() != 1:
        raise UserError(
            f"--lora {lora.named.path}: {layer} of the {part}: its change is {found}, this model's "
            f"weight {expected}: it was trained on another base model{tell_base(lora.header)}"
        )


def hash_lora(placed: Placed) -> str:
    """Hash of what a LoRA does: the same in whichever form its file is written."""
    return hash_tensors(
        {
            f"{part}.{layer}.{kind}": tensor
            for part, pairs in placed.items()
            for layer, pair in pairs.items()
            for kind, tensor in (
                ("down", pair.down),
                ("up", pair.up),
                ("scale", torch.tensor(pair.scale, dtype=torch.float64)),
            )
        }
    )


@torch.no_grad()
def fuse(module: torch.nn.Module, pairs: Mapping[str, Pair], weight: float) -> None:
    """Adds a LoRA's changes to the weights of a module, in place."""
    for layer, pair in pairs.items():
        target: Any = module.get_submodule(layer).weight
        change = pair.up.flatten(1) @ pair.down.flatten(1)
        target += (weight * pair.scale * change).reshape(target.shape).to(target)


def adapter_name(number: int) -> str:
    """What PEFT calls the number-th LoRA: a part of the names of its matrices."""
    return f"lora{number}"


def add_beside(pipeline: Any, loras: Sequence[tuple[Placed, float]]) -> None:
    """Adds LoRAs' matrices beside the weights of a pipeline's UNet, by diffusers. Raises UserError
    where it did not take a layer."""
    for number, (placed, weight) in enumerate(loras):
        tensors = {}
        for layer, pair in placed["unet"].items():
            tensors[f"unet.{layer}.lora_A.weight"] = pair.down
            tensors[f"unet.{layer}.lora_B.weight"] = pair.up
        if not tensors:
            continue
        diffusers_logging.set_verbosity_error()  # it warns that the text encoder has none
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of a second LoRA
            pipeline.load_lora_weights(tensors, adapter_name=adapter_name(number))
        set_scales(pipeline.unet, placed["unet"], adapter_name(number), weight)
    tuned: list[Any] = [module for module in pipeline.unet.modules() if hasattr(module, "lora_A")]
    for module in tuned:
        module.set_adapter(list(module.lora_A))
    pipeline.unet.eval().requires_grad_(False)


def set_scales(
    denoiser: torch.nn.Module, pairs: Mapping[str, Pair], adapter: str, weight: float
) -> None:
    """Sets the scale of each layer of a LoRA, and checks that each is what its file says."""
    for layer, pair in pairs.items():
        module: Any = denoiser.get_submodule(layer)
        held = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if not all(
            adapter in matrices and torch.equal(matrices[adapter].weight.cpu(), tensor)
            for matrices, tensor in zip(held, (pair.down, pair.up))
        ):
            raise UserError(f"--lora: {layer} was not taken over by diffusers and PEFT as it is")
        module.scaling[adapter] = weight * pair.scale


def acting(
    denoiser: torch.nn.Module,
    parameters: Mapping[str, torch.Tensor],
    change: Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """Parameters and a change of them, {name: tensor}, as they act on the weights of their layers:
    as they are or, of a LoRA's matrices, as small matrices of the norms of scale B A and, to first
    order, scale (B dA + dB A). How a LoRA's norm is shared between A and B, and what of it stands in
    its alpha, is a matter of its trainer alone."""
    if not any(re.search(MATRICES, name) for name in change):
        return parameters, change
    weights, changes = {}, {}
    for name in [name for name in change if ".lora_A." in name]:
        layer, _, rest = name.partition(".lora_A.")
        module: Any = denoiser.get_submodule(layer)
        scale = module.scaling[rest.removesuffix(".weight")]
        names = name, f"{layer}.lora_B.{rest}"
        (down, up), (down_change, up_change) = (
            [
                tensors[each].detach().to(parameters[name].device).double().flatten(1)
                for each in names
            ]
            for tensors in (parameters, change)
        )
        weights[name] = scale * compress(up, down)
        both = torch.cat([up, up_change], dim=1), torch.cat([down_change, down])
        changes[name] = scale * compress(*both)
    return weights, changes


def compress(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """A small matrix of the norm of up @ down, which is as large as a layer's weight."""
    first, second = (torch.linalg.qr(matrix, mode="r").R for matrix in (up, down.T))
    return first @ second.T


def check_peft() -> None:
    """Raises UserError where PEFT is not installed."""
    if not is_peft_available():
        raise UserError(
            "--lora: needs PEFT to hold a LoRA's matrices apart: pip install 'peft>=0.17', or give "
            "--weight_selection cross-attn-kv, which fuses them into the model"
        )


def read_files(names: Sequence[str], is_fused: bool) -> list[LoraFile]:
    """The LoRAs of FILE_OR_FOLDER[:WEIGHT], before a model is loaded. Raises UserError where one
    cannot be used, or PEFT is missing."""
    loras = [read_lora(parse_name(name)) for name in names]
    if loras and not is_fused:
        check_peft()
    return loras


def apply(
    pipeline: Any, loras: Sequence[LoraFile], is_fused: bool
) -> tuple[tuple[str, float], ...]:
    """Puts LoRAs on a pipeline, in place: fused into its weights, or the UNet's beside them.
    Returns what tells each apart: (hash of its content, its weight). Raises UserError where one does
    not fit."""
    if not loras:
        return ()
    placed = [(place(lora, pipeline), lora.named.weight) for lora in loras]
    for parts, weight in placed:
        fuse(pipeline.text_encoder, parts["text_encoder"], weight)
        if is_fused:
            fuse(pipeline.unet, parts["unet"], weight)
    if not is_fused:
        add_beside(pipeline, placed)
    return tuple((hash_lora(parts), weight) for parts, weight in placed)
