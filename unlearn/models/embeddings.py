"""Embeddings of new words (textual inversion), as diffusers and Stable Diffusion's web interfaces
keep them: one vector of a word, or several that stand for it one after the other."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin

from ..errors import UserError
from ..runtime.printing import shorten
from ..storage.reading import holds_safetensors, list_visible, read_tensors

UNNAMED = "emb_params"  # the one key of files that say their word by their name
OF_TWO = {"clip_l", "clip_g"}  # keys of Stable Diffusion XL's
SUFFIXES = (".safetensors", ".bin", ".pt")
USUAL = ("learned_embeds.safetensors", "learned_embeds.bin")
MOST_VECTORS = 75  # of a word: a prompt has no more places


@dataclass(frozen=True)
class Embedding:
    """A new word."""

    path: Path
    token: str
    vectors: torch.Tensor  # [n, features] float32

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        """Each vector by its token: the word, then the word with _1, _2, ..., as diffusers has
        them."""
        names = [self.token, *(f"{self.token}_{number}" for number in range(1, len(self.vectors)))]
        return dict(zip(names, self.vectors))


def find_file(name: str) -> tuple[Path, str | None]:
    """(file, word or None) of FILE_OR_FOLDER[:WORD]. Raises UserError where it is not there."""
    path, word = Path(name), None
    if not path.exists() and ":" in name:
        start, _, word = name.rpartition(":")
        path = Path(start)
        if len(word.split()) != 1:
            raise UserError(f"--textual_inversion {name}: expected one word after the colon")
    if path.is_dir():
        usual = [path / each for each in USUAL if (path / each).is_file()]
        found = usual[:1] or [each for each in list_visible(path) if each.suffix in SUFFIXES]
        if len(found) != 1:
            there = ", ".join(each.name for each in found[:4]) or "none"
            raise UserError(
                f"--textual_inversion {path}: expected a folder with one file of embeddings "
                f"({USUAL[0]}), found {there}; name the file"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"--textual_inversion {path}: no such file")
    return path, word


def read_embedding(name: str) -> Embedding:
    """The word of FILE_OR_FOLDER[:WORD], by default that which the file says, or its name. Only
    safetensors are read, whatever the file's name. Raises UserError where it is something else."""
    path, word = find_file(name)
    named = f"--textual_inversion {path}"
    if not holds_safetensors(path):
        target = path.with_suffix(".safetensors")
        code = (
            "import torch; from safetensors.torch import save_file; "
            f"found = torch.load({str(path)!r}, weights_only=True); "
            "found = found.get('string_to_param') or found; "
            "save_file({k if k != '*' else 'emb_params': v.detach().contiguous() "
            f"for k, v in found.items()}}, {str(target)!r})"
        )
        raise UserError(
            f"{named}: a pickle or another file, which may run code as it is read; expected "
            f"safetensors; convert it, where you trust it: python -c {shlex.quote(code)}"
        )
    tensors = read_tensors(path, "embeddings")
    if tensors.keys() & OF_TWO:
        raise UserError(
            f"{named}: embeddings of a model with two text encoders ({', '.join(sorted(tensors))}), "
            f"such as Stable Diffusion XL, which are not used so far"
        )
    if len(tensors) != 1:
        there = shorten(", ".join(map(str, tensors)), 80) or "nothing"
        raise UserError(f"{named}: expected one word's embedding, found {there}")
    [(key, vectors)] = tensors.items()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not 1 <= len(vectors) <= MOST_VECTORS:
        raise UserError(
            f"{named}: expected one to {MOST_VECTORS} vectors, found the shape "
            f"{list(vectors.shape)}"
        )
    if not torch.isfinite(vectors).all():
        raise UserError(f"{named}: has NaN or infinite entries; download or train it again")
    token = word or (path.stem if key == UNNAMED else key)
    if len(token.split()) != 1:
        raise UserError(
            f"{named}: expected one word, found {shorten(token, 60)}; name it as prompt and "
            f"captions have it: {path}:<my-word>"
        )
    return Embedding(path, token, vectors.float())


def check_embedding(pipeline: Any, embedding: Embedding) -> None:
    """Raises UserError where a word does not fit a pipeline."""
    named = f"--textual_inversion {embedding.path}"
    takes_words = issubclass(type(pipeline), TextualInversionLoaderMixin)
    if not takes_words or getattr(pipeline, "text_encoder_2", None) is not None:
        raise UserError(
            f"{named}: {type(pipeline).__name__} takes none so far; supported are Stable Diffusion "
            f"1 and 2"
        )
    features = pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    if embedding.vectors.shape[1] != features:
        raise UserError(
            f"{named}: vectors of {embedding.vectors.shape[1]} numbers, the model's text encoder "
            f"has {features}: it was trained for another base model"
        )
    known = pipeline.tokenizer.get_vocab()
    if taken := [token for token in embedding.tokens if token in known]:
        raise UserError(
            f"{named}: the model's tokenizer knows {shorten(taken[0], 60)} already; give the word "
            f"another name, which prompt and captions then have: {embedding.path}:<my-word>"
        )


def list_tokens(pipeline: Any, embeddings: list[Embedding]) -> Mapping[str, torch.Tensor]:
    """All vectors by token. Raises UserError where a word does not fit, or is there twice."""
    tokens: dict[str, torch.Tensor] = {}
    for embedding in embeddings:
        check_embedding(pipeline, embedding)
        if twice := tokens.keys() & embedding.tokens.keys():
            raise UserError(
                f"--textual_inversion {embedding.path}: {shorten(sorted(twice)[0], 60)} is in "
                f"another file too; name one of them otherwise: {embedding.path}:<my-word>"
            )
        tokens |= embedding.tokens
    return tokens
