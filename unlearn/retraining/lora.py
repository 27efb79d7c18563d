"""LoRA trained on a base model: fresh matrices to start from, and the file that diffusers writes."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..errors import UserError
from ..models.families import find_denoiser_family
from ..models.lora import adapter_name, add_beside, check_peft
from ..models.lora_files import PEFT_HEADER, Pair, read_lora
from ..models.lora_names import Named
from ..models.pipelines import Model
from ..storage.artifacts import write_bytes
from ..storage.hashes import digest

ADAPTER = adapter_name(0)


def list_targets(denoiser: torch.nn.Module, targets: str) -> dict[str, torch.Size]:
    """The layers of a denoiser that get matrices, {name: shape of the weight}."""
    found, pattern = {}, find_denoiser_family(denoiser).lora_targets[targets]
    for name, module in denoiser.named_modules():
        if re.search(pattern, name):
            layer: Any = module
            found[name] = layer.weight.shape
    return found


def draw_matrices(layer: str, shape: torch.Size, rank: int, seed: int) -> Pair:
    """The matrices that the training of a layer starts from: A as a linear layer's own weight is
    drawn, by seed and layer; B zero, so that the model is the base model still."""
    generator = torch.Generator().manual_seed(int(digest(seed, layer)[:12], 16))
    bound = shape[1:].numel() ** -0.5
    down = (2 * torch.rand(rank, *shape[1:], generator=generator) - 1) * bound
    return Pair(down, torch.zeros(shape[0], rank, *(1 for _ in shape[2:])), 1.0)


def with_fresh_lora(model: Model, rank: int, alpha: float, targets: str) -> Model:
    """A model with matrices beside its weights that change nothing yet, in place. Raises UserError
    where PEFT is missing, or no layer is a target's."""
    check_peft()
    shapes = list_targets(model.denoiser, targets)
    if not shapes:
        raise UserError(f"train_lora_targets {targets}: matches no layer of this model")
    pairs = {
        layer: replace(draw_matrices(layer, shape, rank, 0), scale=alpha / rank)
        for layer, shape in shapes.items()
    }
    place = next(model.denoiser.parameters()).device
    add_beside(model.denoiser, [(pairs, 1.0)])
    model.denoiser.to(place)  # the matrices were made on the CPU
    return model


def first_matrices(
    denoiser: torch.nn.Module, rank: int, targets: str, seed: int
) -> dict[str, torch.Tensor]:
    """The matrices that training starts from, by their names in a denoiser that has such."""
    weights = {}
    for layer, shape in list_targets(denoiser, targets).items():
        pair = draw_matrices(layer, shape, rank, seed)
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = pair.down
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = pair.up
    return weights


def save_lora(
    model: Model, path: Path, weights: Mapping[str, torch.Tensor], rank: int, alpha: float
) -> str:
    """Writes trained matrices as diffusers' own saver does, which not every pipeline has, whole or not
    at all; returns the file's hash."""
    part = model.family.denoiser
    tensors = {
        f"{part}.{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for name, value in weights.items()
    }
    layers = sorted({name.removeprefix(f"{part}.").partition(".lora_")[0] for name in tensors})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": layers}
    said = json.dumps(
        {f"{part}.{name}": value for name, value in settings.items()}, indent=2, sort_keys=True
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, save(tensors, {"format": "pt", PEFT_HEADER: said}))


def read_matrices(path: Path) -> dict[str, torch.Tensor]:
    """Trained matrices of a file, by their names in a denoiser that has such."""
    weights = {}
    for (_, layer), pair in read_lora(Named(path, 1.0)).pairs.items():
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = pair.down
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = pair.up
    return weights
