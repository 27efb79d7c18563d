"""The tensors of one model file, safetensors or torch's own, each read when it is asked for."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..errors import UserError
from .reading import check_tensors, holds_safetensors, load_tensors, plain_names

KINDS = {torch.int8: "I8", torch.uint8: "U8"}  # as safetensors calls those that say something


class WeightFile:
    """Tensors by name."""

    def __init__(self, path: Path, sources: dict[str, Any]) -> None:
        """sources: tensors, or slices of a safetensors file that is open, by name."""
        self.path, self.sources = path, sources
        self.shapes = {name: shape_of(source) for name, source in sources.items()}
        self.kinds = {name: kind_of(source) for name, source in sources.items()}

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor, in memory of their own, as safetensors must be written from; of a single
        number that."""
        rows = self.sources[name][slice(start, stop) if self.shapes[name] else ...]
        return rows.clone() if isinstance(self.sources[name], torch.Tensor) else rows


def shape_of(source: Any) -> list[int]:
    """Shape of a tensor, or of a slice of a file."""
    return list(source.shape if isinstance(source, torch.Tensor) else source.get_shape())


def kind_of(source: Any) -> str:
    """The dtype of a tensor, or of a slice of a file, as safetensors calls it; "" of a torch file's
    that need not be told apart."""
    if isinstance(source, torch.Tensor):
        return KINDS.get(source.dtype, "")
    return source.get_dtype()


@contextmanager
def open_weights(path: Path, item: str) -> Iterator[WeightFile]:
    """A file's tensors by their `plain_names`, without running code; of a torch file those under
    `state_dict`, where it has one. Raises UserError, naming `item`, where it holds something else."""
    if not holds_safetensors(path):
        yield WeightFile(path, read_torch(path, item))
        return
    try:
        opened = safe_open(path, "pt")
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or ["?"])[0]
        raise UserError(f"{item} {path}: not a whole safetensors file ({reason:.100})") from None
    with opened as file:
        names = plain_names(list(file.keys()))
        yield WeightFile(path, {plain: file.get_slice(name) for name, plain in names.items()})


def read_torch(path: Path, item: str) -> dict[str, torch.Tensor]:
    """The tensors of a torch file, as `open_weights` takes them."""
    try:
        found = load_tensors(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{item} {path}: holds something else than tensors, which is never unpickled; save its "
            f"weights alone, as safetensors"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{item} {path}: cannot be read as tensors ({reason:.160})") from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]  # once: a hostile file's may hold itself
    check_tensors(path, item, found)
    return {plain: found[name] for name, plain in plain_names(found).items()}
