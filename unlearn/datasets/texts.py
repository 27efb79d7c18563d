"""Texts that stand on the disk once, however many images have them. Of embeddings NAME.npy:

NAME.npy        states of all different texts, one text after the other, [rows, features]: float32, or,
                where a text encoder gave no more, the bits of bfloat16 as uint16; of the zeros that a
                text is filled up with, none
NAME_index.npy  where each caption of each image stands, int64 [N, captions, 4]: the text's number, its
                first row, how many rows it has, and how many tokens with the zeros
NAME_mask.npy   what else belongs to a text (a mask, a pooled text), [texts, ...] by its number
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NotThere, UserError
from ..storage.reading import read_array
from ..storage.records import check_content, read_record, record_path

COLUMNS = 4  # of an index
AGAIN = "remove it, and it is made again"


def index_path(path: Path) -> Path:
    """Where the index of embeddings stands: beside them."""
    return path.with_name(f"{path.stem}_index{path.suffix}")


def halve(states: np.ndarray) -> np.ndarray | None:
    """Float32 as the bits of bfloat16, uint16; None where one of them would be rounded."""
    bits = states.view(np.uint32)
    return None if (bits & 0xFFFF).any() else (bits >> 16).astype(np.uint16)


def widen(states: np.ndarray) -> np.ndarray:
    """Float32 of numbers that stand as such, or as the bits of bfloat16 (uint16)."""
    if states.dtype == np.uint16:
        return (states.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(states, np.float32)


def make_index(numbers: np.ndarray, lengths: Sequence[int] | np.ndarray, tokens: int) -> np.ndarray:
    """The index of images' captions, int64 [N, captions, 4]. numbers: of each caption's text, [N,
    captions]; lengths: rows of each text; tokens: of a text with its zeros."""
    counts = np.asarray(lengths, np.int64)
    firsts = np.cumsum(counts) - counts
    columns = numbers, firsts[numbers], counts[numbers], np.full(numbers.shape, tokens)
    return np.stack(columns, axis=-1).astype(np.int64)


class Texts:
    """What belongs to the texts of images' captions, [N, captions, ...] float32, of which each text
    stands once. As of an array, one asks by images and captions; only then, and only what is asked
    for, it is read."""

    dtype = np.dtype(np.float32)

    def __init__(self, rows: np.ndarray, index: np.ndarray, shape: Sequence[int]) -> None:
        """rows: [texts, ...], memory-mapped; index: [N, captions, 4]; shape: of one text."""
        self.rows, self.index, self.of_text = rows, index, tuple(shape)

    def read(self, place: np.ndarray) -> np.ndarray:
        """One text, by its line of the index."""
        return self.rows[place[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        """As if each image had its own."""
        return (*self.index.shape[:2], *self.of_text)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def num_texts(self) -> int:
        """How many different texts there are."""
        return int(self.index[..., 0].max()) + 1

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Of images, or images and captions. Raises IndexError where more is asked for."""
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) > 2 or any(part is None or part is Ellipsis for part in parts):
            raise IndexError("texts are asked for by image and caption alone")
        places = self.index[key]
        lines = places.reshape(-1, COLUMNS)
        _, chosen, which = np.unique(lines[:, 0], return_index=True, return_inverse=True)
        read = np.empty((len(chosen), *self.of_text), np.float32)
        for row, line in enumerate(chosen):
            read[row] = self.read(lines[line])
        return read[which].reshape(*places.shape[:-1], *self.of_text)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def choose(self, images: Any) -> "Texts":
        """Those of some images; nothing is read."""
        return type(self)(self.rows, self.index[images], self.of_text)


class Packed(Texts):
    """Texts' states: rows [rows, features], of each text as many as it has before its zeros."""

    def read(self, place: np.ndarray) -> np.ndarray:
        _, first, count, tokens = place
        states = np.zeros((tokens, self.rows.shape[1]), np.float32)
        states[:count] = widen(self.rows[first : first + count])
        return states


Told = np.ndarray | Texts  # what a denoiser is told of images' captions, [N, captions, ...]


def choose_images(told: Told, images: Any) -> Told:
    """What is told of some images."""
    return told.choose(images) if isinstance(told, Texts) else told[images]


def is_packed(path: Path, states: np.ndarray) -> bool:
    """Whether embeddings are those of an index: those of each image have more axes."""
    place = index_path(path)
    is_known = any(each.exists() for each in (place, record_path(place)))
    return states.ndim == 2 and (states.dtype == np.uint16 or is_known)


def open_packed(path: Path, states: np.ndarray) -> Packed:
    """The texts of embeddings that stand once each. Raises UserError where their index is missing
    (NotThere), damaged, or of others."""
    place = index_path(path)
    if not place.exists():
        raise NotThere(f"{place}: no such file; encode the training set again")
    index = read_array(place, "index of the texts", mmap=False)
    if record_path(path).exists():
        identities = [read_record(each, AGAIN)["identity"] for each in (path, place)]
        check_content(place, AGAIN)
        if identities[0] != identities[1]:
            raise UserError(f"{place}: was not made with {path.name}; {AGAIN}")
    if not fits(index, states):
        raise UserError(
            f"{place}: is no index of {path.name}, {list(states.shape)} {states.dtype}; {AGAIN}"
        )
    return Packed(states, index, (int(index[0, 0, 3]), states.shape[1]))


def fits(index: np.ndarray, states: np.ndarray) -> bool:
    """Whether an index is one of these states: all of them, one text after the other."""
    if index.dtype != np.int64 or index.ndim != 3 or index.shape[2] != COLUMNS or not index.size:
        return False
    if states.dtype not in (np.uint16, np.float32):
        return False
    numbers, tokens = index[..., 0], index[0, 0, 3]
    found, lines = np.unique(numbers, return_index=True)
    lengths = index.reshape(-1, COLUMNS)[lines, 2]
    return bool(
        np.array_equal(found, np.arange(len(found)))
        and ((lengths >= 0) & (lengths <= tokens)).all()
        and lengths.sum() == len(states)
        and np.array_equal(index, make_index(numbers, lengths, tokens))
    )
