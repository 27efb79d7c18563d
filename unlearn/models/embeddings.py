"""Embeddings of new words (textual inversion), as diffusers and web interfaces keep them: one vector of a
word, or several that stand for it one after the other, for each text encoder that reads it."""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..runtime.printing import shorten
from ..storage.reading import holds_safetensors, list_visible, read_tensors
from .families import find_family
from .families.texts import label

UNNAMED = "emb_params"  # the one key of files that say their word by their name
ONLY = ""  # the text encoder of files that do not name it
# Of models with several text encoders, the keys of each one's: of textual inversion, and of pivotal
# tuning, whose rows are words <s0>, <s1>, ... of their own.
T5 = "t5xxl"  # which a file may lack: it reads the word as any other text
NAMED = {"clip_l": "clip_l", "clip_g": "clip_g", T5: T5, "t5": T5}
ORDER = (ONLY, "clip_l", "clip_g", T5)
PIVOTAL = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
BRACKETED = re.compile(r"<[^<>\s]+>")
SUFFIXES = (".safetensors", ".bin", ".pt")
USUAL = ("learned_embeds.safetensors", "learned_embeds.bin")
MOST_VECTORS = 75  # of a word: a prompt has no more places


@dataclass(frozen=True)
class Embedding:
    """A new word."""

    path: Path
    token: str
    tables: Mapping[str, torch.Tensor]  # {text encoder by its name in files: [n, features] float32}

    @property
    def count(self) -> int:
        """How many vectors each text encoder has."""
        return len(next(iter(self.tables.values())))

    @property
    def words(self) -> list[str]:
        """What prompts may have: one word for all vectors or, where it is made of as many in brackets
        (<s0><s1>), each of these."""
        found = BRACKETED.findall(self.token)
        is_made_of_them = "".join(found) == self.token and len(found) == self.count
        return found if is_made_of_them else [self.token]

    @property
    def names(self) -> list[str]:
        """The token of each vector: of a word with several, the word, then the word with _1, _2, ...,
        as diffusers has them."""
        if len(self.words) > 1:
            return self.words
        return [self.token, *(f"{self.token}_{number}" for number in range(1, self.count))]


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
    keys = name_tables(named, tensors)
    tables = {name: check_vectors(named, tensors[keys[name]]) for name in ORDER if name in keys}
    if len({len(table) for table in tables.values()}) > 1:
        told = " and ".join(f"{len(table)} of {name}" for name, table in tables.items())
        raise UserError(f"{named}: expected as many vectors for each text encoder, found {told}")
    token = word or name_word(path, list(tensors), len(next(iter(tables.values()))))
    if len(token.split()) != 1:
        raise UserError(
            f"{named}: expected one word, found {shorten(token, 60)}; name it as prompt and "
            f"captions have it: {path}:<my-word>"
        )
    return Embedding(path, token, tables)


def name_tables(named: str, keys: Collection[str]) -> dict[str, str]:
    """{text encoder: the key of a file of embeddings that has its vectors}. Raises UserError where they
    are not those of one word."""
    known = next((known for known in (NAMED, PIVOTAL) if known.keys() & set(keys)), None)
    found = {key: known.get(key, "?") if known else ONLY for key in keys}
    names = set(found.values())
    is_one = len(names) == len(found) > 0 and "?" not in names and (not known or "clip_l" in names)
    if not is_one:
        there = shorten(", ".join(map(str, keys)), 80) or "nothing"
        raise UserError(f"{named}: expected one word's embedding, found {there}")
    return {name: key for key, name in found.items()}


def name_word(path: Path, keys: list[str], count: int) -> str:
    """The word of a file by its keys, where nobody gives it another."""
    if PIVOTAL.keys() & set(keys):
        return "".join(f"<s{number}>" for number in range(count))
    return path.stem if keys[0] == UNNAMED or keys[0] in NAMED else keys[0]


def check_vectors(named: str, vectors: torch.Tensor) -> torch.Tensor:
    """The vectors of a word, [n, features] float32. Raises UserError where they cannot be."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not 1 <= len(vectors) <= MOST_VECTORS:
        raise UserError(
            f"{named}: expected one to {MOST_VECTORS} vectors, found the shape "
            f"{list(vectors.shape)}"
        )
    if not torch.isfinite(vectors).all():
        raise UserError(f"{named}: has NaN or infinite entries; download or train it again")
    return vectors.float()


def list_encoders(pipeline: Any) -> dict[str, tuple[str, str]]:
    """{its name in files: (text encoder, its tokenizer)} of those that take new words; {} where the
    model takes none."""
    parts = getattr(pipeline, "components", {})
    classes = {part: type(module).__name__ for part, module in parts.items() if module is not None}
    family = find_family(type(pipeline).__name__, classes) if classes else None
    if family is None or not family.learns_words:
        return {}
    return {
        family.encoders_in_files.get(encoder, ONLY): (encoder, tokenizer)
        for encoder, tokenizer in family.encoders.items()
        if encoder in classes
    }


def name_encoders(names: Iterable[str]) -> str:
    """Text encoders as messages name them."""
    return " and ".join(name or "one text encoder" for name in names)


def place_tables(pipeline: Any, embedding: Embedding) -> dict[tuple[str, str], torch.Tensor]:
    """{(text encoder, tokenizer): vectors} of a word. Raises UserError where they are those of other
    text encoders than the model's."""
    named, encoders, tables = (
        f"--textual_inversion {embedding.path}",
        list_encoders(pipeline),
        embedding.tables,
    )
    if not encoders:
        raise UserError(
            f"{named}: {type(pipeline).__name__} takes none so far; supported are Stable Diffusion "
            f"1 and 2, XL, 3 and 3.5, and FLUX.1"
        )
    if [*encoders] == [ONLY] and [*tables] == ["clip_l"]:  # as trainers call the one of 1 too
        tables = {ONLY: tables["clip_l"]}
    lacking = encoders.keys() - tables.keys() - {T5}
    if lacking or tables.keys() - encoders.keys():
        raise UserError(
            f"{named}: vectors for {name_encoders(tables)}, the model takes them for "
            f"{name_encoders(encoders)}: it was trained for another base model"
        )
    return {encoders[name]: vectors for name, vectors in tables.items()}


def check_embedding(pipeline: Any, embedding: Embedding) -> None:
    """Raises UserError where a word does not fit a pipeline."""
    named = f"--textual_inversion {embedding.path}"
    for (encoder, tokenizer), vectors in place_tables(pipeline, embedding).items():
        features = getattr(pipeline, encoder).get_input_embeddings().weight.shape[1]
        if vectors.shape[1] != features:
            raise UserError(
                f"{named}: vectors of {vectors.shape[1]} numbers, the model's {label(encoder)} has "
                f"{features}: it was trained for another base model"
            )
        known = getattr(pipeline, tokenizer).get_vocab()
        if taken := [token for token in embedding.names if token in known]:
            raise UserError(
                f"{named}: the model's tokenizer knows {shorten(taken[0], 60)} already; give the "
                f"word another name, which prompt and captions then have: "
                f"{embedding.path}:<my-word>"
            )


def list_tokens(
    pipeline: Any, embeddings: list[Embedding]
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """All vectors by token, of each (text encoder, tokenizer). Raises UserError where a word does not
    fit, or is there twice."""
    found: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    seen: set[str] = set()
    for embedding in embeddings:
        check_embedding(pipeline, embedding)
        if twice := seen.intersection(embedding.names):
            raise UserError(
                f"--textual_inversion {embedding.path}: {shorten(sorted(twice)[0], 60)} is in "
                f"another file too; name one of them otherwise: {embedding.path}:<my-word>"
            )
        seen |= set(embedding.names)
        for place, vectors in place_tables(pipeline, embedding).items():
            found.setdefault(place, {}).update(zip(embedding.names, vectors))
    return found
