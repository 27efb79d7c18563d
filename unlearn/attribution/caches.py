"""Results of sweeps in files, each with its record: made once, kept, shared among processes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..models.pipelines import Model
from ..storage.artifacts import write_array
from ..storage.chunks import make_folder, remove_folder
from ..storage.hashes import digest
from ..storage.reading import read_array
from ..storage.records import (
    check_record,
    check_unrecorded,
    keep_complete,
    record_path,
    write_record,
)
from ..storage.sharing import build_once, parts_folder
from .draws import BatchNoise, split_rows
from .losses import loss_sums, score_rows
from .sweeps import Companions, Sweep

REMEDY = "give --overwrite to replace it, or another --result_dir"


def cache_losses(
    sweep: Sweep, model: Model, path: str | Path, identity: dict, overwrite: bool = False
) -> np.ndarray:
    """Losses [views * N] of a sweep, cached at `path`: see `cache_columns`."""

    def measure(*samples):
        return loss_sums(*samples)[:, None]

    return cache_columns(sweep, model, [Path(path)], [identity], measure, overwrite)[0]


def open_folders(files: Sequence[tuple[Path, dict]], overwrite: bool) -> dict[int, Path]:
    """The folders, which are there, for the chunks of those of some files, (path, identity), that
    are not complete yet: {number: folder}. What is wrong with one is said when it is its turn."""
    folders = {}
    for number, (path, identity) in enumerate(files):
        folder = parts_folder(path, digest([identity]))
        with suppress(UserError, OSError):
            is_strange = path.exists() and not folder.is_dir() and not overwrite
            if keep_complete(path, identity, overwrite, REMEDY) or is_strange:
                continue
            make_folder(folder)
            # Asked again: whoever was done in between has removed the folder for good.
            if keep_complete(path, identity, overwrite, REMEDY):
                remove_folder(folder)
            else:
                folders[number] = folder
    return folders


def write_columns(
    paths: Sequence[Path],
    identities: Sequence[dict],
    columns: np.ndarray,
    kept: Sequence[bool],
    device: torch.device,
) -> None:
    """Writes those columns of a sweep that are not `kept`, and their records."""
    for path, identity, column, is_kept in zip(paths, identities, columns.T, kept):
        if is_kept:
            continue
        if not np.isfinite(column).all():
            raise UserError(
                f"{path}: {int((~np.isfinite(column)).sum())} losses are NaN or infinite; "
                f"the weights have diverged (try a smaller --unlearn_lr or a larger --damping)"
            )
        record_path(path).unlink(missing_ok=True)
        write_record(path, identity, device, write_array(path, column))


def cache_columns(
    sweep: Sweep,
    model: Model,
    paths: Sequence[Path],
    identities: Sequence[dict],
    measure: Callable[..., torch.Tensor],
    overwrite: bool = False,
    later: Sequence[tuple[Path, dict]] = (),
    measure_with: Callable[[list[int]], Callable[..., torch.Tensor]] | None = None,
) -> list[np.ndarray]:
    """Runs one sweep of a measure [texts, columns] into a file (.npy float32 [views * N]) and its
    record for every column, or keeps what is there under the same identity. Returns the columns.

    Chunks stand beside the first file, in a folder that the identities name, until all are done.
    later: (path, identity) of files of one column each that are to be made next, for which chunks
    are made along with these; measure_with: see `sweeps.Companions`. Raises UserError where a
    file was made with other settings and may not be overwritten.
    """
    key = digest(identities)
    begun = parts_folder(paths[0], key).is_dir()  # asked first: another process removes it last

    def kept():
        return [
            keep_complete(path, identity, overwrite, REMEDY)
            for path, identity in zip(paths, identities)
        ]

    def fill(folder):
        companions = (
            Companions(open_folders(later, overwrite), measure_with)
            if later and measure_with
            else None
        )
        description = f"{paths[0].parent.name}/{paths[0].stem}"
        return sweep.run(model, folder, description, measure, companions)

    for path, identity in zip(paths, identities):
        if not begun and not parts_folder(paths[0], key).is_dir():
            check_unrecorded(path, identity, overwrite, REMEDY)
    build_once(
        paths[0],
        key,
        lambda: all(kept()),
        fill,
        lambda columns: write_columns(paths, identities, columns, kept(), model.device),
    )
    return [read_array(path, "losses", mmap=False) for path in paths]


def adopt_losses(
    sweep: Sweep, model: Model, path: str | Path, identity: dict, command: str
) -> None:
    """Gives a loss cache of the published program, which has no record, its record, after its first
    and last batch were scored again and agreed to 1e-4. Raises UserError where they do not;
    command: that makes such a cache."""
    if not isinstance(sweep.noise, BatchNoise):
        raise TypeError("only losses under the published program's noise can be adopted")
    losses = read_array(path, "losses", mmap=False)
    if losses.shape != (sweep.num_rows,):
        raise UserError(
            f"{path}: expected {sweep.num_rows} losses (two views of each image), found "
            f"{list(losses.shape)}"
        )
    batches = split_rows(np.arange(sweep.num_rows), sweep.noise.rows_a_batch(sweep.grid))
    for rows in (batches[0], batches[-1]):
        with ThreadPoolExecutor(1) as pool:
            noises = sweep.draw(rows, model.device, pool)
        again = score_rows(
            model, sweep.training_set, rows, sweep.grid, noises, sweep.pass_size, loss_sums
        )
        worst = float(np.max(np.abs(again / losses[rows] - 1)))
        if not worst <= 1e-4:
            raise UserError(
                f"{path}: has no record, and its rows {rows[0]} to {rows[-1]} scored again differ "
                f"by {worst:.1e} relative (at most 1e-4 allowed): made with other settings or, of "
                f"exemplars, from latents drawn at random; delete it and run: {command}"
            )
    write_record(path, identity, model.device)


def load_losses(
    sweep: Sweep, model: Model, path: str | Path, identity: dict, command: str, overwriting: str
) -> np.ndarray:
    """Losses before unlearning, [2n] float32, checked against their record; the published
    program's, which have none, are adopted. command: that makes them; overwriting: the same with
    --overwrite."""
    if sweep.noise.compat and Path(path).exists() and not record_path(path).exists():
        adopt_losses(sweep, model, path, identity, command)
    check_record(path, identity, f"give the flags it was made with, or run: {overwriting}")
    return read_array(path, "losses", mmap=False)
