"""Inputs read without trust: no code runs, nothing is waited for, memory is bounded, and every fault is a UserError."""

import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from . import UserError

MOST_TEXT, MOST_JSON = 128 << 20, 16 << 20  # bytes; the captions of COCO have 92 MB. A JSON file takes 27 times as many in memory
MOST_ARRAYS = 4 << 30  # bytes that a compressed file of arrays may unfold to
LONGEST_NAME = 200  # bytes of one part of a path; file systems take 255
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool}


def check_text(item, text, is_path=False):
    """Raises UserError where a string holds what neither a path nor a prompt can: NUL or half a character; or, of a path,
    a name that is too long for a file system, with what a run appends to it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{item}: expected Unicode text, found {text!a:.80}") from None
    if "\0" in text:
        raise UserError(f"{item}: expected text without NUL, found {text!a:.80}")
    if any(len(part.encode()) > LONGEST_NAME for part in text.split("/")) and is_path:
        raise UserError(f"{item}: expected a path of names of at most {LONGEST_NAME} bytes, found {text!a:.80}")


def resolve_inside(root, path, item):
    """The path below `root` that `path` (relative) names. Raises UserError, naming `item`, where it leaves `root`."""
    root = Path(os.path.realpath(root))  # not Path.resolve: at a link to itself it raises, or not, by Python's version
    resolved = Path(os.path.realpath(root / path))
    if not resolved.is_relative_to(root):
        raise UserError(f"{item}: expected a path inside {root}, found {path}")
    return resolved


def read_text(path, item="file", most=MOST_TEXT):
    """The text of a file. Raises UserError where it is missing, no file (a pipe, a device), not UTF-8 or has more than `most` bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{item} {path}: cannot be read (a folder, pipe or device)")
        if status.st_size > most:
            raise UserError(f"{item} {path}: expected a text file of at most {most >> 20} MB, found {status.st_size >> 20} MB")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{item} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{item} {path}: not UTF-8 text ({error})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{item} {path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def read_json(path, item="file", most=MOST_JSON):
    """Reads a JSON file of at most `most` bytes. Raises UserError where it is missing, larger or malformed, naming line and column."""
    try:
        return json.loads(read_text(path, item, most))
    except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits
        raise UserError(f"{item} {path}: not valid JSON ({error})") from None


def read_array(path, item="array", mmap=True):
    """Reads an .npy array, memory-mapped (read-only) by default. Raises UserError where that cannot be done."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a folder, pipe or device")
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{item} {path}: no such file") from None
    except Exception as error:  # a damaged header may raise anything
        raise UserError(f"{item} {path}: not a complete .npy array of numbers ({error})") from None


def read_npz(path, kinds, remedy):
    """Arrays of an .npz file: {name: array} of those of `kinds` {name: (kinds of dtype, number of axes)} that are there. Raises
    UserError, ending with `remedy`, where it is damaged, would unfold to absurdly much, or an array is of another kind."""
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


def read_tensors(path, item="file", names=None):
    """Reads named tensors (only `names` where given) from safetensors or, without running code, from a torch file.

    Torch files are memory-mapped: of a Fisher of 6.9 GB only the named tensors are read. Raises UserError where the
    file is missing, damaged, or holds something else than a dictionary of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{item} {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            if names is None:
                return load_file(path)
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if name in names}
        if zipfile.is_zipfile(path):  # torch stores; what is compressed may unfold to anything
            with zipfile.ZipFile(path) as archive:
                if any(info.compress_type for info in archive.infolist()):
                    raise ValueError("it is compressed, as torch's own files never are")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{item} {path}: holds something else than tensors, which is never unpickled") from None
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{item} {path}: cannot be read as tensors ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()):
        raise UserError(f"{item} {path}: expected a dictionary of tensors by name, found something else")
    for name, tensor in tensors.items():
        if (tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES
                or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()):  # a view of one number as a billion
            raise UserError(f"{item} {path}: {name!a:.80}: expected a plain dense tensor, found another kind ({tensor.dtype}, {tensor.layout})")
    return {name: tensor for name, tensor in tensors.items() if names is None or name in names}
