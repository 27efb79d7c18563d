"""Files that appear whole or not at all."""

import errno
import glob
import io
import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save

from ..errors import UserError
from .hashes import digest, hash_bytes

NOT_WRITABLE = (
    errno.EACCES,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.EISDIR,
    errno.ENXIO,
    errno.ENAMETOOLONG,
)
STALE = 600  # seconds


@cache
def this_machine() -> str:
    """The host's name and a hash of what else tells one process number's realm from another: its
    boot, and the container's name space. Hosts may share a name, and containers of one host."""
    realm = []
    with suppress(OSError):
        realm += [
            Path("/proc/sys/kernel/random/boot_id").read_text(),
            os.readlink("/proc/self/ns/pid"),
        ]
    return f"{socket.gethostname()}.{digest(realm)[:8]}"


def own_part(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f"{path.name}.{this_machine()}.{os.getpid()}.part")


def remove_stale_parts(path: Path, own: Path) -> None:
    """Removes what killed processes left of a half-written `path`: those of this machine at once,
    others' where nothing was written for STALE seconds of the file server's clock, which also gave
    this process's `own` part its time."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*.*.part"):
        machine, _, pid = (
            part.name.removeprefix(f"{path.name}.").removesuffix(".part").rpartition(".")
        )
        try:
            if machine == this_machine() and pid.isdecimal():
                os.kill(int(pid), 0)  # signal 0 only asks whether the process is there
            elif own.stat().st_mtime - part.stat().st_mtime > STALE:
                part.unlink(missing_ok=True)
        except (ProcessLookupError, OverflowError):
            part.unlink(missing_ok=True)
        except OSError:
            pass  # the process is there, another user's; or the part is not any more


def open_plain(path: str | Path, flags: int) -> int:
    """os.open, of a file alone: another's link, pipe or device of that name is not followed, waited
    for or written to. Raises OSError."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, "a pipe or device", os.fspath(path))
    return descriptor


def check_writable(folder: str | Path, remedy: str) -> None:
    """Raises UserError, ending with `remedy`, where nothing can be written in a folder, or in what
    there is of its path. It is tried, before anything expensive: of a file system that is mounted
    read-only no permission tells."""
    folder = Path(folder).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    part = own_part(folder / "writable")
    try:
        os.close(open_plain(part, os.O_CREAT | os.O_WRONLY))
        remove_stale_parts(folder / "writable", part)
        part.unlink()
    except OSError as error:
        if error.errno not in (*NOT_WRITABLE, errno.EPERM):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}); {remedy}") from error


@contextmanager
def whole_file(
    path: str | Path, key: str | None = None, parents: bool = True
) -> Iterator[BinaryIO]:
    """Opens `path` for writing bytes so that it appears whole or not at all: .part, fsync, rename.
    With a `key` the .part stays where this ends early, and the next run with that key goes on with
    it: its size says how far it came. Without `parents` its folder must be there, else it raises
    FileNotFoundError."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{key}.part") if key else own_part(path)
    flags = os.O_CREAT | (0 if key else os.O_TRUNC)
    try:
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "r+b", opener=lambda name, mode: open_plain(name, mode | flags)) as file:
            remove_stale_parts(path, part)
            yield file
            file.flush()
            os.fsync(file.fileno())
        with (
            suppress(FileNotFoundError) if key and path.exists() else nullcontext()
        ):  # another process was first
            os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # where a parent is a file, or was never made
            if not key:  # what is kept under a key was checked row by row
                part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; free some space and run the same command again"
            ) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        raise


def write_bytes(path: str | Path, *parts: bytes) -> str:
    """Writes bytes, one part after the other; returns their hash."""
    with whole_file(path) as file:
        for part in parts:
            file.write(part)
    return hash_bytes(*parts)


def write_json(path: str | Path, value: object) -> None:
    """Writes a JSON file, indented. Halves of characters, as names of files that are not UTF-8
    hold, stand as JSON's escapes."""
    write_bytes(
        path,
        (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"),
    )


def write_array(path: str | Path, array: np.ndarray) -> str:
    """Writes one array as .npy; returns the hash of the file's bytes, whatever others write there
    meanwhile."""
    array, header = np.ascontiguousarray(array), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return write_bytes(
        path, header.getvalue(), array.tobytes()
    )  # not np.save: on a full disk its error does not say so


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Writes named tensors as safetensors; returns the hash of the file's bytes."""
    # Not save_file: it writes a hidden file of its own, which a kill leaves behind.
    return write_bytes(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )
