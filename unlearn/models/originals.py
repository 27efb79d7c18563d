"""A transformer's weights under its authors' names, as files for other programs have them, brought to
diffusers' names: whole tensors, or rows of one that joins several.

The layers' names are those of the families' tables (`originals`), which LoRA files have too. Where
each weight stands is planned by names and shapes alone, so that a file is never in memory as a whole.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..storage.weight_files import WeightFile
from .families import Family
from .families.interface import Original

PREFIX = "model.diffusion_model."  # ComfyUI's before the authors' names
# what names or kinds of tensors tell of weights that are no plain numbers
QUANTIZED_NAMES = {
    r"bitsandbytes__|\.absmax$|\.quant_map$": "bitsandbytes, nf4 or int8",
    r"scaled_fp8|\.scale_(weight|input)$|\.(weight|input)_scale$": "scaled fp8",
    r"\.qweight$|\.qzeros$|\.wscales$|comfy_quant": "packed integers",
}
QUANTIZED_KINDS = {"F8_E4M3": "fp8", "F8_E5M2": "fp8", "I8": "int8", "U8": "nf4 or int8"}


class Piece(NamedTuple):
    """Where a weight stands in a file: rows of one of its tensors."""

    source: str
    start: int
    stop: int
    is_swapped: bool  # its two halves stand the other way round


def find_quantized(kinds: Mapping[str, str]) -> tuple[str, str] | None:
    """(a tensor's name, how it is quantized) of the first whose weights are no plain numbers; None where
    there is none. kinds: {name: dtype as safetensors calls it}."""
    for name, kind in kinds.items():
        for pattern, how in QUANTIZED_NAMES.items():
            if re.search(pattern, name):
                return name, how
        if kind in QUANTIZED_KINDS:
            return name, QUANTIZED_KINDS[kind]
    return None


def plan_pieces(
    item: str, shapes: Mapping[str, Sequence[int]], denoiser: Any, family: Family
) -> dict[str, Piece]:
    """Where each weight of a denoiser (on any device, `meta` too) stands in a file whose tensors have
    these shapes: {diffusers' name: Piece}. Raises UserError, naming `item`, where a tensor is none of
    it, has another shape, or one is missing."""
    own = {name: list(value.shape) for name, value in denoiser.state_dict().items()}
    layers, others = family.originals(denoiser), family.original_tensors(denoiser)
    spare = family.spare_tensors(denoiser)
    pieces: dict[str, Piece] = {}
    for name, shape in shapes.items():
        if (bare := name.removeprefix(PREFIX)) in spare:
            check_spare(f"{item}: {name:.100}", shape, spare[bare], describe(denoiser, family))
            continue
        targets, is_swapped = find_targets(bare, layers, others)
        if unknown := [target for target in targets if target not in own]:
            raise UserError(
                f"{item}: {name:.100} is no weight of {describe(denoiser, family)} (no "
                f"{unknown[0]:.100}); give the file of such a transformer alone, or another --base"
            )
        start = 0
        expected = [sum(own[target][0] for target in targets), *own[targets[0]][1:]]
        if list(shape) != expected:
            raise UserError(
                f"{item}: {name:.100} has the shape {list(shape)}, that of "
                f"{describe(denoiser, family)} {expected}: it is of another model; give its own: "
                f"--base MODEL"
            )
        for target in targets:
            stop = start + own[target][0]
            if target in pieces:
                raise UserError(f"{item}: {name:.100}: names {target} twice")
            pieces[target] = Piece(name, start, stop, is_swapped)
            start = stop
    if missing := sorted(own.keys() - pieces.keys()):
        raise UserError(
            f"{item}: lacks {len(missing)} weights of {describe(denoiser, family)}, first "
            f"{missing[0]}: it is of another model; give its own: --base MODEL"
        )
    return pieces


def find_targets(
    name: str, layers: Mapping[str, Original], others: Mapping[str, str]
) -> tuple[list[str], bool]:
    """The weights that a tensor of a file is, one under the other, and whether its halves are swapped:
    under their authors' names (of `originals` and `original_tensors`), or diffusers' own."""
    layer, _, kind = name.rpartition(".")
    if original := layers.get(layer):
        return [f"{own}.{kind}" for own in original.layers], original.is_swapped
    return [others.get(name, name)], False


def describe(denoiser: Any, family: Family) -> str:
    """A denoiser as messages name it."""
    return f"the {family.denoiser} of this {family.name}"


def check_spare(
    item: str, shape: Sequence[int], expected: Sequence[int | None], whose: str
) -> None:
    """Raises UserError where a tensor that is left out has another shape than that of this model has:
    it tells of another one."""
    if len(shape) != len(expected) or any(
        size not in (None, own) for size, own in zip(expected, shape)
    ):
        told = ", ".join("any" if size is None else str(size) for size in expected)
        raise UserError(
            f"{item} has the shape {list(shape)}, that of {whose} [{told}]: it is of another model; "
            f"give its own: --base MODEL"
        )


def read_piece(file: WeightFile, piece: Piece) -> torch.Tensor:
    """The weight that a piece of a file is."""
    rows = file.rows(piece.source, piece.start, piece.stop)
    return torch.cat(rows.chunk(2)[::-1]) if piece.is_swapped else rows.contiguous()
