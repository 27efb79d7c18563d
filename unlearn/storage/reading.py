"""Inputs read without trust: no code runs, nothing is waited for, memory is bounded, and every
fault is a UserError."""

import codecs
import difflib
import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..errors import NotThere, UserError

# bytes: of text that is read line by line; of JSON that holds captions, of which COCO's have 92 MB,
# and of other JSON, which takes 27 times as many in memory
MOST_LINES, MOST_TEXT, MOST_JSON = 1 << 30, 128 << 20, 16 << 20
MOST_ARRAYS = 4 << 30  # bytes that a compressed file of arrays may unfold to
OTHER_TEXTS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",  # before the two that they begin like
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LONGEST_NAME = 200  # bytes of one part of a path; file systems take 255
DTYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
}


def check_text(item: str, text: str, is_path: bool = False) -> None:
    """Raises UserError where a string holds what neither a path nor a prompt can: NUL or half a
    character; or, of a path, a name that is too long for a file system, with what a run appends to
    it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{item}: expected Unicode text, found {text!a:.80}") from None
    if "\0" in text:
        raise UserError(f"{item}: expected text without NUL, found {text!a:.80}")
    if any(len(part.encode()) > LONGEST_NAME for part in text.split("/")) and is_path:
        raise UserError(
            f"{item}: expected a path of names of at most {LONGEST_NAME} bytes, found {text!a:.80}"
        )


def check_name(item: str, name: str | Path) -> None:
    """Raises UserError where a name that a system gave, of a file or folder, is not UTF-8: no text
    file can hold it, and safetensors and torch open no such path."""
    try:
        os.fspath(name).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{item}: the name {os.fspath(name)!a:.200} is not UTF-8; rename it"
        ) from None


def resolve_inside(root: str | Path, path: str | PurePath, item: str) -> Path:
    """The path below `root` that `path` (relative) names. Raises UserError, naming `item`, where it
    leaves `root`."""
    root = Path(
        os.path.realpath(root)
    )  # not Path.resolve: at a link to itself it raises, or not, by Python's version
    resolved, plain = Path(os.path.realpath(root / path)), Path(os.path.normpath(root / path))
    if not resolved.is_relative_to(root):
        link = (
            f", a link to {resolved}: put what it leads to in its place"
            if plain.is_relative_to(root)
            else ""
        )
        raise UserError(f"{item}: expected a path inside {root}, found {path}{link}")
    return resolved


def list_visible(folder: str | Path, pattern: str = "*") -> list[Path]:
    """Paths of a folder's files and folders that match, in the order of their names, [] where it is
    missing; but for hidden ones, which systems put there for themselves (.DS_Store, ._000003.png,
    .ipynb_checkpoints)."""
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def decode_text(content: bytes) -> str:
    """Text of a file's bytes, as every reader here sees it: without byte order marks (at its start,
    and at a line's, where files were joined), and with line feeds alone: a carriage return ends a
    line too. Raises ValueError where it is not UTF-8."""
    if kind := next((kind for mark, kind in OTHER_TEXTS.items() if content.startswith(mark)), None):
        raise ValueError(f"{kind} text; save it as UTF-8")
    if b"\0" in content:
        raise ValueError("not UTF-8 text (it holds NUL, as UTF-16 does); save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error}); save it as UTF-8") from None
    return re.sub(
        "^\ufeff+", "", text.replace("\r\n", "\n").replace("\r", "\n"), flags=re.MULTILINE
    )


def read_text(path: str | Path, item: str = "file", most: int = MOST_LINES) -> str:
    """The text of a file (`decode_text`). Raises UserError where it is missing (NotThere), no file (a
    pipe, a device), not UTF-8 or has more than `most` bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{item} {path}: cannot be read (a folder, pipe or device)")
        if status.st_size > most:
            raise UserError(
                f"{item} {path}: expected a text file of at most {most >> 20} MB, found "
                f"{status.st_size >> 20} MB"
            )
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise NotThere(f"{item} {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{item} {path}: cannot be read ({getattr(error, 'strerror', error)})"
        ) from None
    try:
        return decode_text(content)
    except ValueError as error:
        raise UserError(f"{item} {path}: {error}") from None


def make_object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object of its keys and values. Raises ValueError where a key is written twice: only
    the last would count."""
    if len(values := dict(pairs)) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice:.80} is written twice in one object")
    return values


def check_keys(item: str, found: Iterable[str], known: Collection[str]) -> None:
    """Raises UserError, with the known key that is most like it, where an object's keys hold one
    that nothing reads. Those that begin with _ are remarks."""
    if unknown := [key for key in found if key not in known and not key.startswith("_")]:
        like = difflib.get_close_matches(unknown[0], known, 1)
        raise UserError(
            f"{item}: unknown key {unknown[0]:.80}; "
            f"{f'did you mean {like[0]}? ' if like else ''}expected some of {', '.join(known)}"
        )


def read_json(path: str | Path, item: str = "file", most: int = MOST_JSON) -> Any:
    """Reads a JSON file of at most `most` bytes. Raises UserError where it is missing, larger or
    malformed, naming line and column, or has a key twice."""
    try:
        return json.loads(read_text(path, item, most), object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits
        raise UserError(f"{item} {path}: not valid JSON ({error})") from None


def read_array(path: str | Path, item: str = "array", mmap: bool = True) -> np.ndarray:
    """Reads an .npy array, memory-mapped (read-only) by default. Raises UserError where that cannot
    be done, NotThere where it is missing."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a folder, pipe or device")
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise NotThere(f"{item} {path}: no such file") from None
    except Exception as error:  # a damaged header may raise anything
        raise UserError(f"{item} {path}: not a complete .npy array of numbers ({error})") from None


def read_npz(
    path: str | Path, kinds: Mapping[str, tuple[str, int]], remedy: str
) -> dict[str, np.ndarray]:
    """Arrays of an .npz file: {name: array} of those of `kinds` {name: (kinds of dtype, number of
    axes)} that are there. Raises UserError, ending with `remedy`, where it is damaged, would unfold
    to absurdly much, or an array is of another kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MOST_ARRAYS:
                raise ValueError("it would unfold to more than it may")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in kinds if name in file}
        for name, array in arrays.items():
            if array.dtype.kind not in kinds[name][0] or array.ndim != kinds[name][1]:
                raise ValueError(f"{name} is {list(array.shape)} {array.dtype}")
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive may raise anything
        raise UserError(f"{path}: not such a file ({error!s:.200}); {remedy}") from None
    return arrays


def holds_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its first bytes, the length of a JSON header and
    the header, whatever its name says; by its name where it begins as torch's files do not either."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return True
    return path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))


def load_tensors(path: Path) -> Any:
    """What torch's own file holds, memory-mapped where that can be. Raises ValueError where it may
    unfold to anything."""
    if zipfile.is_zipfile(path):  # torch stores; what is compressed may unfold to anything
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type for info in archive.infolist()):
                raise ValueError("it is compressed, as torch's own files never are")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def plain_names(names: Collection[str]) -> dict[str, str]:
    """{name: the same without what torch.compile (`_orig_mod.`) and wrappers of a whole model
    (`module.`) put before it}."""
    is_wrapped = all(name.startswith("module.") for name in names)
    return {
        name: name.removeprefix("module." if is_wrapped else "").replace("_orig_mod.", "")
        for name in names
    }


def check_tensors(path: Path, item: str, tensors: Any) -> None:
    """Raises UserError where something is no dictionary of plain tensors by name."""
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        raise UserError(
            f"{item} {path}: expected a dictionary of tensors by name, found something else"
        )
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in DTYPES
            or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()
        ):  # a view of one number as a billion
            raise UserError(
                f"{item} {path}: {name!a:.80}: expected a plain dense tensor, found another kind "
                f"({tensor.dtype}, {tensor.layout})"
            )


def read_tensors(
    path: str | Path, item: str = "file", names: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Reads tensors by their `plain_names` (only `names` where given) from safetensors or, without
    running code, from a torch file; which it is its content says.

    Torch files are memory-mapped: of a Fisher of 6.9 GB only the named tensors are read. Raises
    UserError where the file is missing, damaged, or holds something else than a dictionary of
    tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{item} {path}: no such file")
    try:
        if holds_safetensors(path):
            with safe_open(path, "pt") as file:
                return {
                    plain: file.get_tensor(name)
                    for name, plain in plain_names(list(file.keys())).items()
                    if names is None or plain in names
                }
        tensors = load_tensors(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{item} {path}: holds something else than tensors, which is never unpickled"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{item} {path}: cannot be read as tensors ({reason})") from None
    if isinstance(tensors, dict):  # diffusers writes {} for layers that were not trained
        tensors = {name: value for name, value in tensors.items() if not is_empty(value)}
    check_tensors(path, item, tensors)
    plain = plain_names(tensors)
    return {
        plain[name]: tensor
        for name, tensor in tensors.items()
        if names is None or plain[name] in names
    }


def is_empty(value: object) -> bool:
    """Whether a value is a dictionary of nothing."""
    return isinstance(value, dict) and not value
