"""Files that appear whole or not at all, and the records beside them that say what they are.

Beside an artefact `NAME.npy` stands its record `NAME.json`: `identity` (must match wherever the artefact is used),
`circumstances` (reported, never refused) and `content`, a hash of the artefact. The record is written last, so that
its existence means that the artefact is complete.
"""

import errno
import glob
import json
import os
import pickle
import platform
import socket
import subprocess
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from . import UserError, __version__
from .hashes import hash_file

FORMAT_VERSION = 1


def resolve_inside(root, path, item):
    """The path below `root` that `path` (relative) names. Raises UserError, naming `item`, where it leaves `root`."""
    root = Path(root).resolve()
    resolved = (root / path).resolve()
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


def read_json(path, item="file"):
    """Reads a JSON file. Raises UserError where it is missing or malformed, naming line and column."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{item} {path}: no such file") from None
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, a number of thousands of digits
        raise UserError(f"{item} {path}: not valid JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{item} {path}: cannot be read ({error.strerror})") from None


def write_array(path, array):
    """Writes one array as .npy."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.tobytes())  # not np.save: on a full disk its error does not say so


def read_array(path, item="array", mmap=True):
    """Reads an .npy array, memory-mapped (read-only) by default. Raises UserError where that cannot be done."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{item} {path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
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
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{item} {path}: cannot be read as tensors ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{item} {path}: expected a dictionary of tensors, found something else")
    return {name: tensor for name, tensor in tensors.items() if names is None or name in names}


def record_path(path):
    """Where the record of an artefact stands: `loss.npy` -> `loss.json`."""
    return Path(path).with_suffix(".json")


def circumstances(device=None):
    """What is reported of a run but never refused: versions, git commit, device, time."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True) if (root / ".git").exists() else None
    return {"unlearn": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "git_commit": git.stdout.strip() if git and git.returncode == 0 else None,
            "device": torch.cuda.get_device_name(device) if device and torch.device(device).type == "cuda" else str(device),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def write_record(path, identity, device=None, content=None):
    """Writes the record of a complete artefact, whose hash `content` is where it is known already."""
    write_json(record_path(path), {"identity": {"format_version": FORMAT_VERSION, **identity},
                                   "circumstances": circumstances(device), "content": content or hash_file(path)})


def is_complete(path):
    """Whether an artefact and its record are there."""
    return Path(path).exists() and record_path(path).exists()


def keep_complete(path, identity, overwrite, remedy):
    """Whether a complete artefact made with these settings is there and is to be kept. Raises UserError where what is
    there was made with others and may not be overwritten. One without a record was killed before it was complete."""
    if not is_complete(path):
        return False
    try:
        check_record(path, identity, remedy)
    except UserError:
        if not overwrite:
            raise
        return False
    return True


def compare_identity(path, expected, found, remedy):
    """Raises UserError naming the first identity field in which the artefact's record differs from what is expected."""
    for field, value in {"format_version": FORMAT_VERSION, **expected}.items():
        if found.get(field) != value:
            raise UserError(f"{path}: made with other settings: {field} is {found.get(field)!r}, expected {value!r}; {remedy}")


def check_record(path, expected, remedy):
    """Checks an artefact against its record: identity field by field, then the hash of its content.

    Raises UserError where the record is missing or malformed, a field differs, or the content was changed; the message
    ends with `remedy`.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; {remedy}")
    if not record_path(path).exists():
        raise UserError(f"{path}: has no record ({record_path(path).name}) that says how it was made; {remedy}")
    try:
        record = read_json(record_path(path), "record")
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise UserError(f"{record_path(path)}: not a record; {remedy}")
    compare_identity(path, expected, record["identity"], remedy)
    if record.get("content") != hash_file(path):
        raise UserError(f"{path}: its content is not what its record says (damaged or replaced); {remedy}")
