"""Arrays written batch by batch, in float32 or as the bits of bfloat16: an interrupted run goes on with
the batch it was at."""

import io
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..errors import UserError
from ..runtime.programs import progress
from ..storage.artifacts import whole_file
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_array
from ..storage.records import check_content, is_complete, write_record
from .texts import halve, widen
from .training_sets import read_identity


class Rounded(Exception):
    """Rows are not those of half precision."""


def count_rows(file: BinaryIO, start: int, row_bytes: int, kind: np.dtype) -> int:
    """How many rows of a file that was begun before are whole: finite numbers. A node that lost its
    power leaves a size, and zeros from anywhere within a row."""

    def is_whole():
        row = widen(np.frombuffer(file.read(row_bytes), kind))
        return row.any() and np.isfinite(row).all()

    size = max(0, os.fstat(file.fileno()).st_size - start) // row_bytes
    file.seek(start)
    return next((max(0, number - 1) for number in range(size) if not is_whole()), size)


def is_made(path: Path, identity: dict, shape: Sequence[int], thorough: bool = False) -> bool:
    """Whether an array of this shape, made under this identity, is there; with `thorough`, whether
    its bytes are also those that its record says. One that cannot be opened, or has another shape,
    is not: it is made again."""
    if not is_complete(path) or not read_identity(path).items() >= identity.items():
        return False
    try:
        if thorough:
            check_content(path, "")
        return read_array(path).shape == tuple(shape)
    except UserError:
        return False


def check_rows(path: Path, rows: np.ndarray, shape: Sequence[int], description: str) -> None:
    """Raises UserError where a batch of rows is not of this shape, or has NaN or infinite entries:
    of no such model is any kept."""
    if rows.shape != shape:
        raise UserError(
            f"{path}: the pipeline made {list(rows.shape)} of the {description}, expected "
            f"{list(shape)}; its parts do not fit each other"
        )
    if not np.isfinite(rows).all():
        raise UserError(
            f"{path}: the pipeline made NaN or infinite entries of the {description}; it is "
            f"damaged: download it again, or give "
            "another --sd_version"
        )


def write_rows(
    path: Path,
    shape: tuple[int, ...],
    starts: Sequence[int],
    encode: Callable[[int], torch.Tensor],
    identity: dict,
    description: str,
    thorough: bool = False,
    is_half: bool = False,
    unit: str = "rows",
) -> None:
    """Writes a float32 array batch by batch, so that memory does not grow with it, and its record.
    Ended early, the same call goes on with the batch it was at. starts: the first row of each
    batch; encode(number): the rows of a batch. Raises UserError where these are not of the array's
    shape or not finite. thorough: as of `is_made`; is_half: writes the bits of bfloat16, and raises
    Rounded where that would lose any; unit: what a row is, for progress."""
    if is_made(path, identity, shape, thorough):
        return
    path.unlink(
        missing_ok=True
        # from here to the end a record may stand without its array, never an array without its
        # record
    )
    kind = np.dtype("<u2" if is_half else "<f4")
    header, row_bytes = io.BytesIO(), kind.itemsize * math.prod(shape[1:])
    ends = [*starts[1:], shape[0]]
    np.lib.format.write_array_header_1_0(
        header, {"descr": kind.str, "fortran_order": False, "shape": shape}
    )
    with whole_file(path, digest(identity)[:16]) as file:
        if file.read(header.tell()) != header.getvalue():  # rows of another shape, or none yet
            file.truncate(0)
        done = count_rows(file, header.tell(), row_bytes, kind)
        first = bisect_right(starts, done) - 1 if done < shape[0] else len(starts)
        file.seek(0)
        file.write(header.getvalue())
        with progress(
            shape[0], description, unit, starts[first] if first < len(starts) else shape[0]
        ) as bar:
            for number in range(first, len(starts)):
                rows = np.ascontiguousarray(encode(number), np.float32)
                try:
                    check_rows(path, rows, (ends[number] - starts[number], *shape[1:]), description)
                except UserError:
                    Path(file.name).unlink(
                        missing_ok=True
                    )  # the model is broken: its other rows are worth nothing either
                    raise
                stored = halve(rows) if is_half else rows
                if stored is None:
                    raise Rounded
                file.seek(header.tell() + starts[number] * row_bytes)
                file.write(stored.tobytes())
                bar.update(len(rows))
        file.flush()
        with suppress(FileNotFoundError):  # another process was first, and has written it
            write_record(path, identity, content=hash_file(file.name))
