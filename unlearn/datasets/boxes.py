"""Boxes in a picture: the cells of its latent that they hold."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .encoders import crop_square
from .pictures import load_image
from .training_sets import TrainingSet

Box = tuple[int, int, int, int]  # x0, y0, x1, y1: pixels of the picture, from its top left corner


def check_box(box: Sequence[int]) -> Box:
    """A box as it is meant. Raises UserError where it has no inside."""
    if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
        raise UserError(
            f"--box {' '.join(map(str, box))}: expected x0 y0 x1 y1 with 0 <= x0 < x1 and "
            f"0 <= y0 < y1, pixels from the top left corner"
        )
    return box[0], box[1], box[2], box[3]


def name_box(box: Sequence[int]) -> str:
    """A box as messages and pages name it, with the numbers that `--box` takes."""
    return f"box {' '.join(map(str, box))}"


def check_inside(box: Box, size: tuple[int, int], name: str | Path) -> None:
    """Raises UserError where a box reaches out of a picture of a size (width, height)."""
    if box[2] > size[0] or box[3] > size[1]:
        raise UserError(
            f"--{name_box(box)}: reaches out of {name}, which has {size[0]} x {size[1]} pixels"
        )


def query_cells(box: Box | None, query: TrainingSet, factor: int) -> np.ndarray | None:
    """The cells [h, w] of a query's latent that count, None where all do. query: of one image;
    factor: pixels of a cell. Raises UserError where the box does not fit its picture."""
    if box is None:
        return None
    height, width = query.latents.shape[-2:]
    path = query.paths[0]
    if path is None:
        raise UserError(f"{query.ids[0]}: --box needs its picture, which is not there")
    return find_cells(box, path, height * factor, (height, width))


def find_cells(box: Box, path: str | Path, resolution: int, cells: tuple[int, int]) -> np.ndarray:
    """The cells, bool [h, w], of a picture's latent whose middle lies in a box of it.

    resolution: pixels of the square that the picture was brought to; cells: (h, w) of its latent.
    Raises UserError where the box reaches out of the picture or holds the middle of no cell.
    """
    width, height = load_image(path).size
    check_inside(box, (width, height), path)
    (wide, high), (left, top) = crop_square((width, height), resolution)
    across = (left + (np.arange(cells[1]) + 0.5) * resolution / cells[1]) * width / wide
    down = (top + (np.arange(cells[0]) + 0.5) * resolution / cells[0]) * height / high
    found = ((box[1] <= down) & (down < box[3]))[:, None] & ((box[0] <= across) & (across < box[2]))
    if not found.any():
        side = -(-resolution * width // (cells[1] * wide))
        raise UserError(
            f"--{name_box(box)}: holds no cell of the latent of {path}, or only what the square in its middle "
            f"leaves out; give a larger one, of {side} pixels a side or more"
        )
    return found
