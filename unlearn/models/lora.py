"""LoRA on a pipeline: its matrices added beside the denoiser's weights or fused into them.

Beside the weights, through PEFT, the matrices themselves can be unlearned (`--weight_selection lora`):
they are what the images trained. Fused, the model is a plain one. What a LoRA changes of a text encoder
is always fused, for nothing is ever unlearned there.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import is_peft_available

from ..errors import UserError
from .families import Family
from .lora_files import LoraFile, Pair, read_lora
from .lora_layers import hash_lora, place
from .lora_names import parse_name

SELECTION = "lora"
MATRICES = r"\.lora_[AB]\."  # in the names of a denoiser's parameters


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
            f"--weight_selection {selection}: the model has no LoRA beside its weights whose matrices "
            f"could be unlearned; give one by --lora or, where it changes the text encoder alone, give "
            f"--weight_selection cross-attn-kv"
        )
    if selection != SELECTION and has_matrices(denoiser):
        raise UserError(
            f"--weight_selection {selection}: the LoRA stands beside these weights; load the model "
            f"with it fused (fuse_lora=True), or select {SELECTION}"
        )


def select_matrices(denoiser: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The matrices that stand beside the weights of a denoiser, by name in its order, without those of
    layers whose B is zero: nothing trained them. So are some of every LoRA of Stable Diffusion 3, in
    whose last block nothing reads the text's queries. Raises UserError where none is left."""
    found = {
        name: value for name, value in denoiser.named_parameters() if re.search(MATRICES, name)
    }
    ups = {name: found[name.replace(".lora_A.", ".lora_B.")] for name in found}
    selected = {  # without numbers, on `meta`, all
        name: value for name, value in found.items() if ups[name].is_meta or bool(ups[name].any())
    }
    if not selected:
        raise UserError(
            f"--weight_selection {SELECTION}: the B of every layer of the LoRA is zero: it changes "
            f"nothing of {type(denoiser).__name__}"
        )
    return selected


@torch.no_grad()
def fuse(module: torch.nn.Module, pairs: Mapping[str, Pair], weight: float) -> None:
    """Adds a LoRA's changes to the weights of a module, in place; these are float32 then."""
    for layer, pair in pairs.items():
        target: Any = module.get_submodule(layer).weight
        target.data = target.data.float()
        change = pair.up.flatten(1) @ pair.down.flatten(1)
        target += (weight * pair.scale * change).reshape(target.shape).to(target)


def adapter_name(number: int) -> str:
    """What PEFT calls the number-th LoRA: a part of the names of its matrices."""
    return f"lora{number}"


def add_beside(
    denoiser: torch.nn.Module, loras: Sequence[tuple[Mapping[str, Pair], float]]
) -> None:
    """Adds LoRAs' matrices, each {layer: pair} and its weight, beside the weights of a denoiser, by
    PEFT. Raises UserError where it did not take a layer."""
    for number, (pairs, weight) in enumerate(loras):
        if pairs:
            inject(denoiser, pairs, adapter_name(number))
            set_scales(denoiser, pairs, adapter_name(number), weight)
    tuned: list[Any] = [module for module in denoiser.modules() if hasattr(module, "lora_A")]
    for module in tuned:
        module.set_adapter(list(module.lora_A))
    denoiser.eval().requires_grad_(False)


def inject(denoiser: torch.nn.Module, pairs: Mapping[str, Pair], adapter: str) -> None:
    """Gives layers of a denoiser matrices of a LoRA, which do not act until `set_scales`."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    tensors = {}
    for layer, pair in pairs.items():
        tensors[f"{layer}.lora_A.weight"] = pair.down.clone()  # several layers may have one A
        tensors[f"{layer}.lora_B.weight"] = pair.up.clone()
    # Anchored, because PEFT takes a pattern for the end of a name.
    ranks = {f"^{re.escape(layer)}": len(pair.down) for layer, pair in pairs.items()}
    config = LoraConfig(r=max(ranks.values()), rank_pattern=ranks, target_modules=list(pairs))
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of a second LoRA
        # Empty until they are given theirs: nothing random is drawn.
        inject_adapter_in_model(
            config, denoiser, adapter, low_cpu_mem_usage=True, state_dict=tensors
        )
        set_peft_model_state_dict(denoiser, tensors, adapter, low_cpu_mem_usage=True)
    for layer, pair in pairs.items():
        module: Any = denoiser.get_submodule(layer)
        for kind, tensor in (("lora_A", pair.down), ("lora_B", pair.up)):
            matrices = getattr(module, kind, {})
            if adapter in matrices and matrices[adapter].weight.dtype != tensor.dtype:
                # PEFT gave them the precision of the layer's weight, which may be half.
                matrices[adapter].weight.data = tensor.clone()


def set_scales(
    denoiser: torch.nn.Module, pairs: Mapping[str, Pair], adapter: str, weight: float
) -> None:
    """Sets the scale of each layer of a LoRA. Raises UserError where a layer has other matrices than
    its file says, or another than its layers has any."""
    tuned = {
        name
        for name, module in denoiser.named_modules()
        if adapter in getattr(module, "lora_A", ())
    }
    if odd := sorted(tuned ^ pairs.keys()):
        raise UserError(f"--lora: {odd[0]} was not taken over by PEFT as it is")
    for layer, pair in pairs.items():
        module: Any = denoiser.get_submodule(layer)
        held = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
        if not all(
            adapter in matrices and torch.equal(matrices[adapter].weight.cpu(), tensor)
            for matrices, tensor in zip(held, (pair.down, pair.up))
        ):
            raise UserError(f"--lora: {layer} was not taken over by PEFT as it is")
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
    pipeline: Any, family: Family, loras: Sequence[LoraFile], is_fused: bool
) -> tuple[tuple[str, float], ...]:
    """Puts LoRAs on a pipeline, in place: fused into its weights, or the denoiser's beside them.
    Returns what tells each apart: (hash of its content, its weight). Raises UserError where one does
    not fit."""
    placed = [(place(lora, pipeline, family), lora.named.weight) for lora in loras]
    for parts, weight in placed:
        for part, pairs in parts.items():
            if is_fused or part != family.denoiser:
                fuse(getattr(pipeline, part), pairs, weight)
    if placed and not is_fused:
        add_beside(
            getattr(pipeline, family.denoiser),
            [(parts[family.denoiser], weight) for parts, weight in placed],
        )
    return tuple((hash_lora(parts), weight) for parts, weight in placed)
