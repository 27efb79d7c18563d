"""Images to latents, prompts to embeddings."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..runtime.programs import run_within_memory
from .pictures import load_image


class Encoder(Protocol):
    """What pictures and captions are encoded by: a `models.model.Model`, a package above."""

    @property
    def own_resolution(self) -> int | None:
        """Pixels of a side of the pictures that it was trained on."""

    def resolution(self, settings: dict) -> int:
        """Pixels of a side of the square that a data root's pictures are brought to."""
        ...

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w)."""
        ...

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a text's conditioning, {name: shape}; the text's own, (tokens, features), is
        the first."""
        ...

    @property
    def of_sizes(self) -> Sequence[str]:
        """Names of the conditioning that belongs to a picture's size, not to its prompt."""
        ...

    @property
    def encoding_identity(self) -> dict:
        """What latents and conditioning depend on besides pictures and captions, for records."""
        ...

    @property
    def is_stored_by_image(self) -> bool:
        """Whether embeddings of a training set stand on the disk image by image, not once for each
        different caption."""
        ...

    @property
    def has_half_texts(self) -> bool:
        """Whether all of its text encoders compute in bfloat16."""
        ...

    def text_lengths(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt's text has before the zeros that it is filled up with."""
        ...

    @property
    def reader(self) -> tuple[Any, int]:
        """The tokenizer that reads the most of a prompt, and how many tokens of it."""
        ...

    def encoding(self) -> AbstractContextManager[None]:
        """Within it pictures and prompts may be encoded one after the other, and no pass made."""
        ...

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents [n, C, h, w] float32 on the CPU of pixels [n, 3, H, W] in [-1, 1]."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Conditioning of prompts, {name: [n, ...]} float32 on the CPU."""
        ...

    def encode_sizes(
        self, sizes: Sequence[tuple[int, int]], resolution: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning that belongs to pictures, {name: [n, ...]} float32 on the CPU. sizes: (width,
        height) of each before it is cropped."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The tokens that are read of prompts, by tokenizer."""
        ...

    def denormalise(self, latents: Any) -> Any:
        """Latents as the VAE gives them."""
        ...


def crop_square(size: tuple[int, int], resolution: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a picture of (width, height) pixels becomes a square of `resolution`: the (width, height)
    that it is resized to, and the (left, top) of the square in that."""
    width, height = size
    if width <= height:
        resized = resolution, int(resolution * height / width)
    else:
        resized = int(resolution * width / height), resolution
    left, top = (int(round((side - resolution) / 2.0)) for side in resized)
    return resized, (left, top)


def transform_image(image: Image.Image, resolution: int, mirrored: bool = False) -> torch.Tensor:
    """RGB image to pixels [3, resolution, resolution] float32 in [-1, 1].

    The shorter side is resized (bilinear) to `resolution`, the longer one in proportion, floored;
    the centre is cropped with rounded offsets; mirroring comes last, before encoding. Source:
    [AbU]'s published transform.
    """
    size, (left, top) = crop_square(image.size, resolution)
    image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = (
        np.asarray(image.crop((left, top, left + resolution, top + resolution)), np.float32) / 127.5
        - 1
    )
    return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels).permute(2, 0, 1)


def encode_images(
    model: Encoder,
    paths: Sequence[str | Path],
    resolution: int,
    mirrored: bool = False,
    batch_size: int = 20,
) -> torch.Tensor:
    """Latents [len(paths), C, h, w] of image files, `batch_size` at a time."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    return torch.cat([encode_batch(model, batch, resolution, mirrored) for batch in batches])


def encode_batch(
    model: Encoder, paths: Sequence[str | Path], resolution: int, mirrored: bool
) -> torch.Tensor:
    """Latents of image files at once; where the device's memory is full, in ever smaller parts."""
    pixels = torch.stack(
        [transform_image(load_image(path), resolution, mirrored) for path in paths]
    )
    latents, _ = run_within_memory(
        lambda size: torch.cat([model.encode_pixels(part) for part in pixels.split(size)]),
        len(paths),
        "pictures",
    )
    return latents


def encode_texts(
    model: Encoder, prompts: Sequence[str], paths: Sequence[str | Path | None], resolution: int
) -> dict[str, torch.Tensor]:
    """Conditioning of pictures with a prompt each, {name: [n, ...]} float32 on the CPU. paths: of
    the pictures; None where one is to be made, a square of `resolution` pixels."""
    return {**encode_prompts(model, prompts), **encode_sizes(model, paths, resolution)}


def encode_prompts(model: Encoder, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """The part of `encode_texts` that belongs to the prompts."""
    return model.encode_prompts(prompts)


def encode_sizes(
    model: Encoder, paths: Sequence[str | Path | None], resolution: int
) -> dict[str, torch.Tensor]:
    """The part of `encode_texts` that belongs to the pictures' sizes."""
    if not model.of_sizes:
        return {}
    square = (resolution, resolution)
    sizes = [load_image(path).size if path else square for path in paths]
    return model.encode_sizes(sizes, resolution)


def expand_words(tokenizer: Any, prompts: Iterable[str]) -> list[str]:
    """Prompts in which each new word of several vectors (textual inversion) is followed by the
    tokens of the others, word_1, word_2, ..., as diffusers reads it."""
    added = tokenizer.added_tokens_encoder
    several = [token for token in added if f"{token}_1" in added]
    expanded = list(prompts)
    for row, prompt in enumerate(expanded) if several else ():
        for token in set(several).intersection(tokenizer.tokenize(prompt)):
            number = 1
            while f"{token}_{number}" in added:
                number += 1
            words = [token, *(f"{token}_{each}" for each in range(1, number))]
            expanded[row] = expanded[row].replace(token, " ".join(words))
    return expanded


def count_tokens(tokenizer: Any, prompts: Iterable[str]) -> list[int]:
    """How many tokens each prompt has before it is cut, those of its beginning and end among
    them."""
    return [
        len(tokens)
        for tokens in tokenizer(
            expand_words(tokenizer, prompts), padding=False, truncation=False, verbose=False
        ).input_ids
    ]


def find_unknown(tokenizer: Any, texts: Collection[str]) -> list[tuple[bool, bool]]:
    """Of each text, (whether a tokenizer does not know some of it, whether it knows nothing else of
    it). Byte-level vocabularies that are whole know everything. CLIP's unknown token is also its
    padding: a text that is unknown throughout is read as the empty one."""
    found = []
    for text, tokens in zip(
        texts,
        tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else [],
    ):
        num_unknown = tokens.count(tokenizer.unk_token_id)
        is_unknown = num_unknown > (text.count(tokenizer.unk_token) if num_unknown else 0)
        found.append((is_unknown, is_unknown and num_unknown == len(tokens)))
    return found
