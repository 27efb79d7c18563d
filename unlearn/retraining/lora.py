"""LoRA trained on a base model: fresh matrices to start from, and the file that diffusers writes."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import UserError
from ..models.lora import adapter_name, add_beside, check_peft
from ..models.lora_files import Pair, read_lora
from ..models.lora_names import Named
from ..models.pipelines import Model, check_trainable
from ..storage.artifacts import write_bytes
from ..storage.hashes import digest

TARGETS = {  # layers that get matrices, by name
    "attention": r"\.attn[12]\.to_(q|k|v|out\.0)$",  # as diffusers' training scripts choose
    "linear": r"\.attn[12]\.to_(q|k|v|out\.0)$|\.ff\.net\.(0\.proj|2)$|\.proj_(in|out)$",  # kohya's
}
ADAPTER = adapter_name(0)


def list_targets(denoiser: torch.nn.Module, targets: str) -> dict[str, torch.Size]:
    """The layers of a denoiser that get matrices, {name: shape of the weight}."""
    found = {}
    for name, module in denoiser.named_modules():
        if re.search(TARGETS[targets], name):
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
    check_trainable("retrain lora", model.family)
    shapes = list_targets(model.denoiser, targets)
    if not shapes:
        raise UserError(f"train_lora_targets {targets}: matches no layer of this model")
    pairs = {
        layer: replace(draw_matrices(layer, shape, rank, 0), scale=alpha / rank)
        for layer, shape in shapes.items()
    }
    add_beside(model.pipeline, [({"unet": pairs, "text_encoder": {}}, 1.0)])
    model.pipeline.to(model.device)
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
    """Writes trained matrices as diffusers does, whole or not at all; returns the file's hash."""
    tensors = {name.replace(f".{ADAPTER}.", "."): value for name, value in weights.items()}
    layers = sorted({name.partition(".lora_")[0] for name in tensors})
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": layers}
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        model.pipeline.save_lora_weights(
            folder,
            unet_lora_layers=tensors,
            weight_name=path.name,
            unet_lora_adapter_metadata=settings,
        )
        return write_bytes(path, (Path(folder) / path.name).read_bytes())


def read_matrices(path: Path) -> dict[str, torch.Tensor]:
    """Trained matrices of a file, by their names in a denoiser that has such."""
    weights = {}
    for (_, layer), pair in read_lora(Named(path, 1.0)).pairs.items():
        weights[f"{layer}.lora_A.{ADAPTER}.weight"] = pair.down
        weights[f"{layer}.lora_B.{ADAPTER}.weight"] = pair.up
    return weights
