"""Chunks: parts of a result that are kept until it is whole, each sealed by a hash of its bytes.

An artefact has a record that tells damage; thousands of chunks have none. So the last 16 bytes of a
chunk's file are the BLAKE2b hash of those before: a disk that lost or changed some is told before
they enter a result.
"""

import glob
import io
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save

from ..errors import UserError
from .artifacts import own_part, whole_file

SEAL_BYTES = 16


def write_chunk(path: str | Path, content: bytes) -> None:
    """Writes bytes and their seal, whole or not at all. Raises FileNotFoundError where the folder
    is not there: another process is done with all of it."""
    with whole_file(path, parents=False) as file:
        file.write(content)
        file.write(blake2b(content, digest_size=SEAL_BYTES).digest())


def read_chunk(path: str | Path) -> bytes:
    """The bytes of a chunk. Raises FileNotFoundError where it is not there, and UserError where it
    is damaged, having removed it: the next run makes it anew."""
    content = Path(path).read_bytes()
    if (
        len(content) < SEAL_BYTES
        or blake2b(content[:-SEAL_BYTES], digest_size=SEAL_BYTES).digest() != content[-SEAL_BYTES:]
    ):
        Path(path).unlink(missing_ok=True)
        raise UserError(
            f"{path}: was damaged on the disk and is removed; run the same command again, which "
            f"makes it anew"
        )
    return content[:-SEAL_BYTES]


def make_folder(folder: Path) -> None:
    """Makes a folder for chunks, unless it is there: or was a moment ago, when another process was
    done with it and removed it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if os.path.lexists(folder):  # a file, or a link to nowhere
            raise


def remove_folder(folder: Path) -> None:
    """Removes a folder of chunks at a stroke, so that who looks for a chunk in it finds all of them
    or no folder."""
    aside = own_part(folder)
    with suppress(OSError):  # another process was first
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folders(path: Path) -> None:
    """Removes the chunks of what is finished at `path`, those of other settings and what a killed
    process left of them too."""
    for folder in path.parent.glob(f".{glob.escape(path.stem)}-*"):
        if folder.suffix == ".part":
            shutil.rmtree(folder, ignore_errors=True)
        else:
            remove_folder(folder)


def write_array_chunk(path: str | Path, array: np.ndarray) -> None:
    """Writes an array as a chunk: a .npy file that numpy reads, seal and all."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    write_chunk(path, buffer.getvalue())


def read_array_chunk(path: str | Path) -> np.ndarray:
    """The array of a chunk; errors as of `read_chunk`."""
    return np.load(io.BytesIO(read_chunk(path)), allow_pickle=False)


def write_tensor_chunk(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes named tensors as a chunk."""
    write_chunk(
        path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    )


def read_tensor_chunk(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a chunk; errors as of `read_chunk`."""
    return load(read_chunk(path))
