"""Files that appear whole or not at all, and inputs that are read without trust: no code runs, every fault is a UserError."""

import errno
import glob
import json
import os
import pickle
import socket
import stat
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from . import UserError

MOST_TEXT = 1 << 30  # bytes; the captions of COCO have 92 MB


def resolve_inside(root, path, item):
    """The path below `root` that `path` (relative) names. Raises UserError, naming `item`, where it leaves `root`."""
    root = Path(os.path.realpath(root))  # not Path.resolve: at a link to itself it raises, or not, by Python's version
    resolved = Path(os.path.realpath(root / path))
    if not resolved.is_relative_to(root):
        raise UserError(f"{item}: expected a path inside {root}, found {path}")
    return resolved


def remove_stale_parts(path):
    """Removes what killed processes of this machine left of a half-written `path`."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.{socket.gethostname()}.*.part"):
        try:
            os.kill(int(part.suffixes[-2][1:]), 0)  # signal 0 only asks whether the process is there
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except PermissionError:
            pass  # it is there, another user's


@contextmanager
def whole_file(path, key=None):
    """Opens `path` for writing bytes so that it appears whole or not at all: .part, fsync, rename. With a `key` the .part
    stays where this ends early, and the next run with that key goes on with it: its size says how far it came."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{key or f'{socket.gethostname()}.{os.getpid()}'}.part")
    flags = os.O_CREAT | (0 if key else os.O_TRUNC)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_parts(path)
        with open(part, "r+b", opener=lambda name, mode: os.open(name, mode | flags, 0o666)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError) if key and path.exists() else nullcontext():  # another process was first
            os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # where a parent is a file, or was never made
            if not key:  # what is kept under a key was checked row by row
                part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; free some space and run the same command again") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def write_json(path, value):
    """Writes a JSON file, indented."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_text(path, item="file"):
    """The text of a file. Raises UserError where it is missing, no file (a pipe, a device), not UTF-8 or above MOST_TEXT."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{item} {path}: cannot be read (a folder, pipe or device)")
        if status.st_size > MOST_TEXT:
            raise UserError(f"{item} {path}: expected a text file of at most {MOST_TEXT >> 20} MB")
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{item} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{item} {path}: not UTF-8 text ({error})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{item} {path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def read_json(path, item="file"):
    """Reads a JSON file. Raises UserError where it is missing or malformed, naming line and column."""
    try:
        return json.loads(read_text(path, item))
    except (ValueError, RecursionError) as error:  # malformed, a number of thousands of digits
        raise UserError(f"{item} {path}: not valid JSON ({error})") from None


def write_array(path, array):
    """Writes one array as .npy."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.tobytes())  # not np.save: on a full disk its error does not say so


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


def write_tensors(path, tensors):
    """Writes named tensors as safetensors."""
    with whole_file(path) as file:  # not save_file: it writes a hidden file of its own, which a kill leaves behind
        file.write(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


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
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be memory-mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{item} {path}: holds something else than tensors, which is never unpickled") from None
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{item} {path}: cannot be read as tensors ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{item} {path}: expected a dictionary of tensors, found something else")
    return {name: tensor for name, tensor in tensors.items() if names is None or name in names}
