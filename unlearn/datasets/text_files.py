"""What images are told, written: embeddings and other conditioning of their captions, each different
caption encoded once (`texts`), or image by image where that is how they were published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..storage.artifacts import write_array
from ..storage.records import write_record
from .conditioning import TEXT
from .encoders import Encoder, encode_prompts, encode_sizes
from .pairs import AHEAD
from .rows import Rounded, is_made, write_rows
from .texts import COLUMNS, index_path, make_index
from .training_sets import array_paths, extra_paths


@dataclass(frozen=True)
class Captions:
    """The captions of images, as many of each, and how a model's texts of them are stored."""

    model: Encoder
    dataroot: str | Path
    of_images: Sequence[Sequence[str]]

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Where embeddings and other conditioning stand, by name."""
        names = self.model.conditioning_shapes
        return {TEXT: array_paths(self.dataroot)[1], **extra_paths(self.dataroot, names)}

    @property
    def index(self) -> Path:
        """Where the index stands, of texts that stand once."""
        return index_path(self.paths[TEXT])

    @property
    def several(self) -> tuple[int, ...]:
        """The axis of an image's captions, where it has one."""
        count = len(self.of_images[0])
        return (count,) if count > 1 else ()

    @cached_property
    def different(self) -> list[str]:
        """The different captions, in the order in which images have them."""
        return list(dict.fromkeys(line for few in self.of_images for line in few))

    @property
    def num_encoded(self) -> int:
        """How many captions are encoded, for each kind of conditioning."""
        if self.model.is_stored_by_image:
            return len(self.of_images) * len(self.of_images[0])
        return len(self.different)

    @cached_property
    def numbers(self) -> np.ndarray:
        """Which of the different ones each is, int64 [N, captions]."""
        places = {line: number for number, line in enumerate(self.different)}
        return np.array([[places[line] for line in few] for few in self.of_images], np.int64)

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each different one's text."""
        starts = range(0, len(self.different), AHEAD)
        batches = (self.different[start : start + AHEAD] for start in starts)
        return [length for batch in batches for length in self.model.text_lengths(batch)]

    def shapes_by_image(self) -> dict[Path, tuple[int, ...]]:
        """Shapes of the arrays, {path: shape}, where each image has its own."""
        shapes = self.model.conditioning_shapes
        axes = len(self.of_images), *self.several
        return {path: (*axes, *shapes[name]) for name, path in self.paths.items()}

    def shapes(self) -> dict[Path, tuple[int, ...]]:
        """Shapes of the arrays, {path: shape}, as they are written."""
        found, shapes = self.shapes_by_image(), self.model.conditioning_shapes
        if self.model.is_stored_by_image:
            return found
        for name, path in self.paths.items():
            if name not in self.model.of_sizes:
                found[path] = len(self.different), *shapes[name]
        found[self.paths[TEXT]] = sum(self.lengths), *shapes[TEXT][1:]
        return {**found, self.index: (*self.numbers.shape, COLUMNS)}

    def num_bytes(self) -> dict[Path, int]:
        """Bytes of the arrays, {path: bytes}."""
        sizes = {path: 4 * math.prod(shape) for path, shape in self.shapes().items()}
        if not self.model.is_stored_by_image:
            sizes[self.index] *= 2
            sizes[self.paths[TEXT]] //= 2 if self.model.has_half_texts else 1
        return sizes

    def write(
        self,
        paths: Sequence[Path],
        resolution: int,
        batch_size: int,
        identity: dict,
        thorough: bool = False,
    ) -> None:
        """Writes the arrays that are not there. paths: of the images; batch_size: images whose
        captions are encoded at once; thorough: as of `is_made`."""
        shapes, size = self.shapes(), batch_size * len(self.of_images[0])
        for name, path in self.paths.items():
            how = identity, f"{name} of the captions", thorough
            if self.model.is_stored_by_image or name in self.model.of_sizes:
                self.write_by_image(name, shapes[path], paths, resolution, batch_size, *how)
            elif name == TEXT:
                self.write_states(shapes[path], size, *how)
            else:
                self.write_texts(name, shapes[path], size, *how)
        if self.index in shapes:
            self.write_index(identity)

    def write_by_image(
        self,
        name: str,
        shape: tuple[int, ...],
        paths: Sequence[Path],
        resolution: int,
        batch_size: int,
        *how,
    ) -> None:
        """Writes one kind of conditioning [N, ...], or [N, captions, ...] where images have several."""
        starts = range(0, len(self.of_images), batch_size)

        def encode(number: int) -> torch.Tensor:
            rows = slice(starts[number], starts[number] + batch_size)
            few = self.of_images[rows]
            if name in self.model.of_sizes:
                pictures = [path for path, lines in zip(paths[rows], few) for _ in lines]
                found = encode_sizes(self.model, pictures, resolution)[name]
            else:
                found = encode_prompts(self.model, [line for lines in few for line in lines])[name]
            return found.reshape(len(few), *self.several, *found.shape[1:])

        write_rows(self.paths[name], shape, starts, encode, *how)

    def write_texts(self, name: str, shape: tuple[int, ...], size: int, *how) -> None:
        """Writes one kind of conditioning of the different texts, [texts, ...]; so many at once."""
        starts = range(0, len(self.different), size)

        def encode(number: int) -> torch.Tensor:
            batch = self.different[starts[number] : starts[number] + size]
            return encode_prompts(self.model, batch)[name]

        write_rows(self.paths[name], shape, starts, encode, *how)

    def write_states(self, shape: tuple[int, ...], size: int, *how) -> None:
        """Writes the different texts' states, [rows, features], so many texts at once; in half
        precision where that keeps every bit."""
        path, numbers = self.paths[TEXT], range(0, len(self.different), size)
        firsts = np.cumsum([0, *self.lengths])

        def encode(number: int) -> torch.Tensor:
            batch = slice(numbers[number], numbers[number] + size)
            states = encode_prompts(self.model, self.different[batch])[TEXT]
            lengths = self.lengths[batch]
            if any(text[length:].any() for text, length in zip(states, lengths)):
                raise UserError(
                    f"{path}: the text encoder gives states of more tokens than the tokenizer reads; "
                    f"the pipeline's parts do not fit each other"
                )
            return torch.cat([text[:length] for text, length in zip(states, lengths)])

        starts = [int(firsts[number]) for number in numbers]
        for is_half in [True, False] if self.model.has_half_texts else [False]:
            try:
                return write_rows(path, shape, starts, encode, *how, is_half=is_half, unit="tokens")
            except Rounded:  # some part of a text encoder computes in float32
                continue

    def write_index(self, identity: dict) -> None:
        """Writes where each image's captions stand."""
        tokens = self.model.conditioning_shapes[TEXT][0]
        index = make_index(self.numbers, self.lengths, tokens)
        if not is_made(self.index, identity, index.shape, thorough=True):
            self.index.unlink(missing_ok=True)
            write_record(self.index, identity, content=write_array(self.index, index))
