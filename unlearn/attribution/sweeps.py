"""Sweeps over a whole training set, in chunks that are kept until the last is done, and their
results in files."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from .. import noise
from ..errors import UserError
from ..runtime.programs import progress, run_ahead, run_within_memory
from ..storage.artifacts import write_array
from ..storage.chunks import (
    make_folder,
    read_array_chunk,
    remove_folder,
    remove_folders,
    write_array_chunk,
)
from ..storage.hashes import digest
from ..storage.reading import read_array
from ..storage.records import check_record, is_complete, keep_complete, record_path, write_record
from ..storage.sharing import Share, do_once
from .losses import chunk_noise, chunk_rows, loss_sums, score_rows

REMEDY = "give --overwrite to replace it, or another --result_dir"


def split_rows(rows, size):
    """Rows in runs of `size`, the last one shorter."""
    return np.split(rows, np.arange(size, len(rows), size))


class Sweep:
    """The losses of a whole training set, cut into chunks that are kept until the last is done.

    Native chunks are fixed ranges of images. With `compat` they are runs of ten of the published
    program's batches: rows in the order as is, then mirrored, `batch_size // len(grid)` of them a
    batch, noise seeded by the batch's index.
    """

    def __init__(self, training_set, grid, batch_size, noise_seed=0, compat=None):
        self.training_set = training_set
        self.grid = grid
        self.batch_size = batch_size
        self.noise_seed = noise_seed
        self.compat = compat
        self.pass_size = batch_size  # samples in one pass: memory only
        num_rows = training_set.latents.shape[0] * len(training_set)
        if compat:
            if batch_size < len(grid):
                raise UserError(
                    f"--batch_size {batch_size}: --compat abu needs at least the {len(grid)} "
                    f"timesteps of an image"
                )
            self.rows_a_batch = batch_size // len(grid)
            self.chunks = split_rows(np.arange(num_rows), 10 * self.rows_a_batch)
        else:
            self.chunks = list(chunk_rows(len(training_set), training_set.latents.shape[0]))

    def draw(self, rows, device, pool):
        """The noise of one chunk."""
        if not self.compat:
            return chunk_noise(self.training_set, rows, self.grid, self.noise_seed, pool)
        batches, shape = split_rows(rows, self.rows_a_batch), self.training_set.latents.shape[2:]
        return np.concatenate(
            [
                noise.batch_noise(
                    int(batch[0]) // self.rows_a_batch,
                    (len(batch) * len(self.grid), *shape),
                    device,
                )
                .cpu()
                .numpy()
                .reshape(len(batch), len(self.grid), *shape)
                for batch in batches
            ]
        )

    def batches(self):
        """Rows of each of the published program's batches (`compat` only)."""
        return split_rows(np.concatenate(self.chunks), self.rows_a_batch)

    def score(self, model, rows, noises, measure):
        """`score_rows` of a chunk; where the device's memory is full, in ever smaller passes from
        there on."""
        values, size = run_within_memory(
            lambda size: score_rows(
                model, self.training_set, rows, self.grid, noises, size, measure
            ),
            self.pass_size,
            "samples",
        )
        self.pass_size = min(self.pass_size, size)
        return values

    def fill(
        self,
        model,
        folder,
        description,
        measure=loss_sums,
        pack=lambda values: values,
        companions=(),
        measure_with=None,
    ):
        """Writes every chunk of a measure (see `score_rows`), `pack`ed, into `folder`, which is
        there and belongs to this very sweep; those that are there are not computed again, those
        that other processes are at are theirs. Returns the paths of all, in the order of
        `self.chunks`, when they are there: or when the folder is not, for another process was done
        with it.

        companions: (number, folder) of like sweeps to come, whose chunks cost less in one pass with
        these: of each chunk, they get theirs too where nobody else is at it. measure_with(numbers):
        the measure that gives the own column and those of these companions, [texts, 1 +
        numbers]."""
        paths = [
            folder / f"{number:06d}-of-{len(self.chunks):06d}.npy"
            for number in range(len(self.chunks))
        ]
        names = {number: path.stem for number, path in enumerate(paths)}
        counted = {number for number, path in enumerate(paths) if path.exists()}
        num_samples = [
            len(rows) * len(self.grid) * self.training_set.embeddings.shape[1]
            for rows in self.chunks
        ]
        done = sum(num_samples[number] for number in counted)
        with (
            progress(sum(num_samples), description, "samples", done) as bar,
            ThreadPoolExecutor(4) as pool,
        ):

            def is_done(number):
                if done := paths[number].exists():
                    count(number)
                return done

            def count(number):  # others' chunks too, so that the time left is right
                if number not in counted:
                    counted.add(number)
                    bar.update(num_samples[number])

            def draw(number):
                return self.draw(self.chunks[number], model.device, pool)

            def score(number, noises):
                along = [companion for companion, other in others.items() if other.take(number)]
                values = self.score(
                    model, self.chunks[number], noises, measure_with(along) if along else measure
                )
                parts = np.split(values, 1 + len(along), axis=1) if along else [values]
                for owner, part in zip([share, *(others[companion] for companion in along)], parts):
                    with suppress(
                        FileNotFoundError
                    ):  # the folder is gone: another process is done with all of them
                        write_array_chunk(owner.folder / paths[number].name, pack(part))
                    owner.release(number)
                count(number)

            with ExitStack() as stack:
                share = stack.enter_context(Share(folder, names, is_done))
                others = {
                    companion: stack.enter_context(
                        Share(
                            other,
                            names,
                            lambda number, other=other: (other / paths[number].name).exists(),
                        )
                    )
                    for companion, other in companions
                }
                run_ahead(share, draw, score, model.device)
        return paths

    def run(self, model, folder, description, measure=loss_sums, companions=(), measure_with=None):
        """Losses [views * N] float32: all images as is, then all mirrored; or of another measure
        [views * N, ...]. None where another process was done with them and has removed them.
        companions, measure_with: as of `fill`."""
        paths = self.fill(
            model, folder, description, measure, companions=companions, measure_with=measure_with
        )
        values = None
        for rows, path in zip(self.chunks, paths):
            try:
                chunk = read_array_chunk(path)
            except FileNotFoundError:
                return None
            values = (
                np.empty((sum(map(len, self.chunks)), *chunk.shape[1:]), np.float32)
                if values is None
                else values
            )
            values[rows] = chunk
        return values


def cache_losses(sweep, model, path, identity, overwrite=False):
    """Losses [views * N] of a sweep, cached at `path`: see `cache_columns`."""
    return cache_columns(
        sweep,
        model,
        [Path(path)],
        [identity],
        lambda *samples: loss_sums(*samples)[:, None],
        overwrite,
    )[0]


def chunk_folder(paths, identities):
    """Where the chunks of a sweep into these files stand until all are done."""
    return paths[0].parent / f".{paths[0].stem}-{digest(identities)[:16]}"


def open_folders(companions, overwrite):
    """(number, folder), which is there, for the chunks of each of those files, (path, identity),
    that is not complete yet. What is wrong with one is said when it is its turn."""
    for number, (path, identity) in enumerate(companions):
        folder = chunk_folder([path], [identity])
        with suppress(UserError, OSError):
            if (
                keep_complete(path, identity, overwrite, REMEDY)
                or path.exists()
                and not folder.is_dir()
                and not overwrite
            ):
                continue  # done, or not ours
            make_folder(folder)
            if keep_complete(
                path, identity, overwrite, REMEDY
            ):  # asked again: whoever was done in between has removed the folder for good
                remove_folder(folder)
            else:
                yield number, folder


def cache_columns(
    sweep, model, paths, identities, measure, overwrite=False, companions=(), measure_with=None
):
    """Runs one sweep of a measure [texts, columns] into a file (.npy float32 [views * N]) and its
    record for every column, or keeps what is there under the same identity. Returns the columns.

    Chunks stand beside the first file, in a folder that the identities name, until all are done.
    companions: (path, identity) of files of one column each that are to be made next, for which
    chunks are made along with these; measure_with: as of `Sweep.fill`. Raises UserError where a
    file was made with other settings and may not be overwritten.
    """
    folder = chunk_folder(paths, identities)
    begun = folder.is_dir()  # asked first: another process removes it last
    for path, identity in zip(paths, identities):
        # What stands alone without a record is not ours; beside this sweep's own chunks it is,
        # killed before the record.
        if (
            path.exists()
            and not is_complete(path)
            and not begun
            and not folder.is_dir()
            and not overwrite
        ):
            check_record(path, identity, REMEDY)

    def keep():
        return [
            keep_complete(path, identity, overwrite, REMEDY)
            for path, identity in zip(paths, identities)
        ]

    def write():
        for path, identity, column, kept in zip(paths, identities, columns.T, keep()):
            if kept:
                continue
            if not np.isfinite(column).all():
                raise UserError(
                    f"{path}: {int((~np.isfinite(column)).sum())} losses are NaN or infinite; "
                    f"the weights have diverged "
                    "(try a smaller --unlearn_lr or a larger --damping)"
                )
            record_path(path).unlink(missing_ok=True)
            write_record(path, identity, model.device, write_array(path, column))

    while not all(keep()):
        make_folder(folder)
        if all(keep()):  # asked again: whoever was done in between has removed the folder for good
            break
        columns = sweep.run(
            model,
            folder,
            f"{paths[0].parent.name}/{paths[0].stem}",
            measure,
            list(open_folders(companions, overwrite)),
            measure_with,
        )
        if columns is not None:
            do_once(folder, "result", lambda: all(keep()), write)
    remove_folders(paths[0])
    return [read_array(path, "losses", mmap=False) for path in paths]


def adopt_losses(sweep, model, path, identity, command):
    """Gives a loss cache of the published program, which has no record, its record, after its first
    and last batch were scored again and agreed to 1e-4. Raises UserError where they do not;
    command: that makes such a cache."""
    losses, batches = read_array(path, "losses", mmap=False), sweep.batches()
    num_rows = sum(map(len, batches))
    if losses.shape != (num_rows,):
        raise UserError(
            f"{path}: expected {num_rows} losses (two views of each image), found "
            f"{list(losses.shape)}"
        )
    for rows in (batches[0], batches[-1]):
        with ThreadPoolExecutor(1) as pool:
            again = score_rows(
                model,
                sweep.training_set,
                rows,
                sweep.grid,
                sweep.draw(rows, model.device, pool),
                sweep.pass_size,
            )
        worst = float(np.max(np.abs(again / losses[rows] - 1)))
        if not worst <= 1e-4:
            raise UserError(
                f"{path}: has no record, and its rows {rows[0]} to {rows[-1]} scored again "
                f"differ by {worst:.1e} relative "
                "(at most 1e-4 allowed): made with other settings or, of exemplars, from latents "
                "drawn at random; delete it and "
                f"run: {command}"
            )
    write_record(path, identity, model.device)
