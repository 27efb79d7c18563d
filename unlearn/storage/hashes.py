"""Hashes of values, files and named tensors, by which records tell artefacts apart."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ..errors import UserError


def digest(*parts: object) -> str:
    """Hash (32 hexadecimal digits) of strings, numbers and JSON-like values, in order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_rows(rows: Iterable[object]) -> str:
    """`digest(list(rows))` of an iterator, without holding them all."""
    state = hashlib.blake2b(b"[[", digest_size=16)
    for number, row in enumerate(rows):
        state.update(
            (b"," if number else b"")
            + json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
        )
    state.update(b"]]")
    return state.hexdigest()


def hash_bytes(*parts: bytes) -> str:
    """Hash (32 hexadecimal digits) of bytes, one part after the other: `hash_file` of a file that
    holds them."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def hash_file(path: str | Path) -> str:
    """Hash (32 hexadecimal digits) of a file's bytes. Raises UserError where it is a folder, pipe
    or device."""
    state = hashlib.blake2b(digest_size=16)
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: expected a file, found a folder, pipe or device")
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor], halves_as_float32: bool = False) -> str:
    """Hash (32 hexadecimal digits) of named tensors: names, shapes, dtypes and bytes, in the order
    of the names. halves_as_float32: those in half precision are hashed as the same numbers in
    float32, one at a time."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if halves_as_float32 and tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def named_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's weights by name. Transformers before 5.6 puts `text_model.` before every name of a
    CLIP text encoder: without it a model has the same hash under any version."""
    weights, prefix = module.state_dict(), "text_model."
    return {
        name.removeprefix(prefix)
        if all(other.startswith(prefix) for other in weights)
        else name: value
        for name, value in weights.items()
    }
