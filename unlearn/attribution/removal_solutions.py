"""What the features of a study say whatever the query, on disk: made once, so that a query costs one
pass over the features and no inverse."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..storage.artifacts import write_tensors
from ..storage.hashes import digest
from ..storage.reading import read_tensors
from ..storage.records import keep_complete, write_record
from ..storage.sharing import do_once, forget_claim
from .removal import RemovalSettings
from .removal_scores import Solution

FIELDS = ("matrix", "mean_square", "own")


def count_solved(num_rows: int, settings: RemovalSettings) -> int:
    """Bytes of the matrices that are kept for so many rows of features a timestep: all but a few."""
    return 8 * len(settings.timesteps) * min(num_rows, settings.sketch_size) ** 2


def keep_solution(
    folder: Path, number: int, identity: dict, device: torch.device, make: Callable[[], Solution]
) -> Solution:
    """The Solution of the timestep of this number that stands in `folder`, made by `make()` where
    none of this identity does, or a damaged one: by one of several processes, the others wait."""
    identity = {**identity, "timestep_number": number}
    path = folder / f"{digest(identity)[:16]}.safetensors"

    def is_done() -> bool:
        return keep_complete(path, identity, True, "")

    def write() -> None:
        solution = make()
        tensors = {name: torch.as_tensor(np.asarray(getattr(solution, name))) for name in FIELDS}
        write_record(path, identity, device, write_tensors(path, tensors))

    if is_done():
        forget_claim(folder, path.stem)
    else:
        do_once(folder, path.stem, is_done, write)
    matrix, mean_square, own = (read_tensors(path)[name].numpy() for name in FIELDS)
    return Solution(matrix, float(mean_square), own)
