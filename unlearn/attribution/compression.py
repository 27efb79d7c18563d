"""A gradient of K and V in 16 KB: whitened by the Fisher, turned into the eigenbases of its
curvature, its largest entries kept.

A weight matrix's gradient G [out, in] is whitened, G / sqrt(F), and rotated on both sides into the
eigenvectors of the second moments of whitened gradients (the eigenbasis of [FastGDA]'s EK-FAC). Of
all matrices' entries there, those with the largest second moment are kept, as multiples of its
root, in int8 with one float32 scale. In the emoji world scores then err by 15 % of their norm; by
28 % with half as many entries in float16, 33 % with blocks of 24 x 24 leading eigenvectors, over
100 % with random projections.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from ..errors import UserError
from .derivatives import text_gradients

BYTES_A_VIEW = 16 * 1024
SCALE_BYTES = 4
# eigenvectors on either side of a matrix; what lies outside of them is never among the largest
# entries
LARGEST_RANK = 256
LEVELS = 127


class Compression:
    """How gradients of some weight matrices are compressed."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        """tensors: {"NAME.root": sqrt(F) [out, in], "NAME.left": [r, out], "NAME.right": [s, in],
        "NAME.kept": indices into [r * s] int64, "NAME.deviation": roots of their sums of squares}
        of each matrix, float32."""
        self.tensors, self.names = tensors, sorted({name.rpartition(".")[0] for name in tensors})
        self.size = sum(len(tensors[f"{name}.kept"]) for name in self.names)

    def to(self, device: torch.device | str) -> "Compression":
        """The same on another device."""
        return Compression({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def keep(
        self,
        matrices: Iterable[tuple[str, torch.Tensor]],
        whiten: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        normalise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The kept entries of matrices, pairs of name and [..., out, in]: [..., size].
        whiten(matrix, root) goes before the rotation, normalise(entries, deviation) after it."""
        parts = {}
        for name, matrix in matrices:
            part = {
                kind: self.tensors[f"{name}.{kind}"]
                for kind in ("root", "left", "right", "kept", "deviation")
            }
            rotated = part["left"] @ whiten(matrix, part["root"]) @ part["right"].T
            parts[name] = normalise(rotated.flatten(-2)[..., part["kept"]], part["deviation"])
        return torch.cat([parts[name] for name in self.names], dim=-1)

    def measure(self, autocast: torch.dtype | None = None) -> Callable[..., torch.Tensor]:
        """A measure for `losses.score_rows`: the kept entries of the gradient of each text's summed
        loss, [texts, size] float32."""
        return lambda model, *samples: self.keep(
            text_gradients(model, *samples, autocast=autocast), torch.div, torch.div
        )

    def read_change(self, change: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the kept entries are to be multiplied with, [size] float32, for a weight change
        {name: tensor} on this device."""
        return self.keep(((name, change[name]) for name in self.names), torch.mul, torch.mul)


def fit(
    visit_gradients: Callable[[Callable[[str, torch.Tensor], None]], object],
    roots: Mapping[str, torch.Tensor],
) -> Compression:
    """The Compression fitted to some gradients. visit_gradients(visit) calls visit(name, [texts,
    out, in]) for all of them, twice: for the eigenvectors, then for the entries' second moments.
    roots: {name: sqrt(F) [out, in]}."""
    moments, squares = {}, {}

    def add_moments(name, gradients):
        white = gradients / roots[name]
        new = (
            torch.einsum("noi,npi->op", white, white).double(),
            torch.einsum("noi,noj->ij", white, white).double(),
        )
        moments[name] = [old + term for old, term in zip(moments.get(name, (0, 0)), new)]

    def add_squares(name, gradients):
        left, right = vectors[name]
        squares[name] = (
            squares.get(name, 0)
            + (left @ (gradients / roots[name]) @ right.T).double().square().sum(dim=0).flatten()
        )

    visit_gradients(add_moments)
    vectors = {
        name: [leading_eigenvectors(moment) for moment in pair] for name, pair in moments.items()
    }
    visit_gradients(add_squares)
    names, sizes = list(squares), [len(value) for value in squares.values()]
    ranked = torch.cat(list(squares.values())).sort(descending=True, stable=True)
    largest = torch.zeros(sum(sizes), dtype=torch.bool, device=ranked.indices.device)
    largest[ranked.indices[: min(BYTES_A_VIEW - SCALE_BYTES, int((ranked.values > 0).sum()))]] = (
        True
    )
    tensors = {}
    for name, kept in zip(names, largest.split(sizes)):
        left, right = vectors[name]
        tensors.update(
            {
                f"{name}.root": roots[name],
                f"{name}.left": left,
                f"{name}.right": right,
                f"{name}.kept": kept.nonzero()[:, 0],
                f"{name}.deviation": squares[name][kept].sqrt().float(),
            }
        )
    return Compression(tensors)


def leading_eigenvectors(moment: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows [rank, n] float32, at most LARGEST_RANK, that hold the most of a second
    moment [n, n] float64."""
    return torch.linalg.eigh(moment).eigenvectors[:, -LARGEST_RANK:].T.flip(0).float().contiguous()


def row_type(size: int) -> np.dtype:
    """The stored form of a view's kept entries: multiples of a scale."""
    return np.dtype([("scale", "<f4"), ("levels", "i1", (size,))])


def pack(entries: np.ndarray) -> np.ndarray:
    """Kept entries [rows, size] as stored: [rows] of `row_type`. Raises UserError where one is not
    finite."""
    if not np.isfinite(entries).all():
        raise UserError("gradients of training images are NaN or infinite; the model is broken")
    packed = np.zeros(len(entries), row_type(entries.shape[1]))
    packed["scale"] = np.abs(entries).max(axis=1) / LEVELS
    packed["levels"] = np.rint(
        entries / np.maximum(packed["scale"], np.finfo(np.float32).tiny)[:, None]
    )
    return packed


def multiply(packed: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Inner products [rows, queries] float32 of stored entries with queries [size, queries]
    (`Compression.read_change`)."""
    return (packed["levels"].astype(np.float32) @ queries) * packed["scale"][:, None]
