"""The layers of a pipeline that a LoRA's file means, and what it adds to each.

A file may name them as diffusers does or as the model's authors do, whose layers may be several of
diffusers' in one: of a fused projection of queries, keys and values each gets its own rows of B, and
the whole of A.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..storage.hashes import hash_tensors
from .families import Family
from .families.interface import Original
from .lora_files import LoraFile, Pair, tell_base
from .lora_keys import ADAPTER, DENOISER, guess_family

Placed = dict[str, dict[str, Pair]]  # by part of the pipeline, then by layer
Known = dict[str, dict[str, Original]]  # by part, then by every name that a file may give a layer


def list_layers(module: torch.nn.Module, originals: Mapping[str, Original]) -> dict[str, Original]:
    """The layers that a LoRA may change, by every name that a file may give them: diffusers' and
    their authors', with underscores for dots, as kohya does, and of a text encoder with
    `text_model.` before it or without."""
    layers, modules = {}, dict(module.named_modules())
    for name, layer in modules.items():
        # Of convolutions in groups, as Sana's, PEFT's matrices mean something else.
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and not is_grouped(layer):
            bare = name.removeprefix("text_model.")
            for known in (name, bare, f"text_model.{bare}"):
                layers[known] = layers[known.replace(".", "_")] = Original((name,))
    for name, original in originals.items():
        if not all(layer in modules for layer in original.layers):
            continue  # of models that are larger, or are told more
        for known in (name, name.replace(".", "_")):
            layers.setdefault(known, original)
    return layers


def is_grouped(layer: torch.nn.Module) -> bool:
    """Whether a layer is a convolution each of whose channels sees some of its input's alone."""
    return isinstance(layer, torch.nn.Conv2d) and layer.groups > 1


def find_part(word: str, family: Family) -> str | None:
    """The part of a family's pipelines that a file's word for it means; None where it has none."""
    if word in (DENOISER, family.denoiser):
        return family.denoiser
    part = family.trainers_encoders.get(word, word)
    return part if part in family.encoders else None


def check_family(lora: LoraFile, family: Family) -> None:
    """Raises UserError where a LoRA changes parts that a family's pipelines do not have: it is one of
    another family's."""
    for part, layer in lora.pairs:
        if part != ADAPTER and find_part(part, family) is None:
            key, other = guess_family(lora.keys) or (f"{part} {layer}", "another family")
            raise UserError(
                f"--lora {lora.named.path}: a LoRA of {other} ({key:.100}), the model is of "
                f"{family.name}{tell_base(lora.header)}"
            )


def place(lora: LoraFile, pipeline: Any, family: Family) -> Placed:
    """The pairs of a LoRA by the layers of a pipeline. Raises UserError where one matches no layer,
    or is of another shape."""
    check_family(lora, family)
    denoiser = getattr(pipeline, family.denoiser)
    known = {family.denoiser: list_layers(denoiser, family.originals(denoiser))}
    for part in family.encoders:
        if encoder := getattr(pipeline, part, None):
            known[part] = list_layers(encoder, {})
    placed: Placed = {part: {} for part in known}
    adapted = find_adapted(lora, known)
    for (word, name), pair in lora.pairs.items():
        part = adapted if word == ADAPTER else find_part(word, family)
        if part not in known:
            raise UserError(f"--lora {lora.named.path}: changes {part}, which this model lacks")
        if name not in known[part]:
            raise UserError(
                f"--lora {lora.named.path}: {name:.100} is no layer of this model's {part}: it is "
                f"a LoRA of {tell_family(lora, family)}{tell_base(lora.header)}"
            )
        for layer, own in divide(lora, part, name, known[part][name], pair, pipeline).items():
            if layer in placed[part]:
                raise UserError(f"--lora {lora.named.path}: names {layer} of the {part} twice")
            placed[part][layer] = own
    return placed


def find_adapted(lora: LoraFile, known: Known) -> str:
    """The part that an adapter changes whose file does not say it: the first that has all of its
    layers, else the denoiser."""
    names = [name for part, name in lora.pairs if part == ADAPTER]
    return next(
        (part for part, layers in known.items() if all(name in layers for name in names)),
        next(iter(known)),
    )


def tell_family(lora: LoraFile, family: Family) -> str:
    """Whose a LoRA is that does not fit a model of this family, for a message."""
    guess = guess_family(lora.keys)
    return "another model" if guess is None or family.name in guess[1] else guess[1]


def divide(
    lora: LoraFile, part: str, name: str, original: Original, pair: Pair, pipeline: Any
) -> dict[str, Pair]:
    """A pair by the layers whose weights are an original one's. Raises UserError where it does not
    fit them."""
    module = getattr(pipeline, part)
    weights = [module.get_submodule(layer).weight for layer in original.layers]
    shown = original.layers[0] if len(weights) == 1 else name
    check_shape(lora, part, shown, weights, pair)
    if original.is_swapped:
        pair = Pair(pair.down, torch.cat(pair.up.chunk(2)[::-1]), pair.scale)
    if len(weights) == 1:
        return {original.layers[0]: pair}
    rows = pair.up.split([len(weight) for weight in weights])
    return dict(zip(original.layers, split_ranks(pair, rows)))


def split_ranks(pair: Pair, rows: Sequence[torch.Tensor]) -> list[Pair]:
    """A pair for each of some blocks of rows of B: all of A, or its own ranks alone where the file
    joins LoRA that were trained apart, so that each rank acts on one block."""
    count, extra = divmod(len(pair.down), len(rows))
    apart = [up.split(max(1, count), dim=1) for up in rows]
    is_joined = not extra and all(
        not blocks[other].any()
        for own, blocks in enumerate(apart)
        for other in range(len(rows))
        if other != own
    )
    if not is_joined:
        return [Pair(pair.down, up.contiguous(), pair.scale) for up in rows]
    return [
        Pair(down.contiguous(), blocks[own].contiguous(), pair.scale)
        for own, (down, blocks) in enumerate(zip(pair.down.split(count), apart))
    ]


def check_shape(
    lora: LoraFile, part: str, layer: str, weights: Sequence[torch.Tensor], pair: Pair
) -> None:
    """Raises UserError where a pair does not fit a layer's weight, or several one under the other."""
    expected = [sum(len(weight) for weight in weights), *weights[0].shape[1:]]
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
