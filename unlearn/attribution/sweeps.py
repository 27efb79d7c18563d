"""Sweeps over a whole training set, in chunks that are kept until the last is done."""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model
from ..runtime.programs import progress, run_ahead, run_within_memory
from ..storage.chunks import read_array_chunk, write_array_chunk
from ..storage.sharing import Share
from .draws import BatchNoise, ImageNoise
from .losses import loss_sums, score_rows


class Sweep:
    """The losses of a whole training set, cut into chunks that are kept until the last is done."""

    def __init__(
        self,
        training_set: TrainingSet,
        grid: list[int],
        batch_size: int,
        noise: ImageNoise | BatchNoise = ImageNoise(),
    ) -> None:
        self.training_set = training_set
        self.grid = grid
        self.noise = noise
        self.pass_size = batch_size  # samples in one pass: memory only
        self.chunks = noise.chunks(training_set, grid)

    @property
    def num_rows(self) -> int:
        """Views times images."""
        return sum(map(len, self.chunks))

    def draw(self, rows: np.ndarray, device: torch.device, pool: Executor) -> np.ndarray:
        """The noise of some rows: see `draws.ImageNoise`."""
        return self.noise.draw(self.training_set, rows, self.grid, device, pool)

    def score(
        self,
        model: Model,
        rows: np.ndarray,
        noises: np.ndarray,
        measure: Callable[..., torch.Tensor],
    ) -> np.ndarray:
        """`score_rows` of a chunk; where the device's memory is full, in ever smaller passes from
        there on."""
        values, size = run_within_memory(
            lambda size: score_rows(
                model, self.training_set, rows, self.grid, noises, size, measure
            ),
            self.pass_size,
            "samples",
            model.save_memory,
        )
        self.pass_size = min(self.pass_size, size)
        return values

    def run(
        self,
        model: Model,
        folder: Path,
        description: str,
        measure: Callable[..., torch.Tensor] = loss_sums,
        companions: "Companions | None" = None,
    ) -> np.ndarray:
        """Losses [views * N] float32: all images as is, then all mirrored; or of another measure
        [views * N, ...]. Raises FileNotFoundError where another process was done with them and has
        removed them. Arguments as of `fill`."""
        paths = self.fill(model, folder, description, measure, companions=companions)
        first = read_array_chunk(paths[0])
        values = np.empty((self.num_rows, *first.shape[1:]), np.float32)
        for rows, path in zip(self.chunks, paths):
            values[rows] = read_array_chunk(path)
        return values

    def fill(
        self,
        model: Model,
        folder: Path,
        description: str,
        measure: Callable[..., torch.Tensor] = loss_sums,
        pack: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
        companions: "Companions | None" = None,
    ) -> list[Path]:
        """Writes every chunk of a measure (see `score_rows`), `pack`ed, into `folder`, which is
        there and belongs to this very sweep; those that are there are not computed again, those
        that other processes are at are theirs. Returns the paths of all, in the order of
        `self.chunks`, when they are there: or when the folder is not, for another process was done
        with it."""
        filling = Filling(self, model, folder, measure, pack)
        with filling.sharing(companions), filling.showing(description):
            run_ahead(filling.share, filling.draw, filling.score, model.device)
        return filling.paths


@dataclass
class Companions:
    """Like sweeps to come, whose chunks cost less in one pass with another's: of each chunk, they
    get theirs too where nobody else is at it."""

    folders: dict[int, Path]  # of their chunks, by number
    measure_with: Callable  # (numbers): the own measure and these', [texts, 1 + numbers]


class Filling:
    """One process's part in writing the chunks of a sweep into a folder."""

    def __init__(
        self,
        sweep: Sweep,
        model: Model,
        folder: Path,
        measure: Callable[..., torch.Tensor],
        pack: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self.sweep = sweep
        self.model = model
        self.folder = folder
        self.measure = measure
        self.pack = pack
        count = len(sweep.chunks)
        self.paths = [folder / f"{number:06d}-of-{count:06d}.npy" for number in range(count)]
        samples_a_row = len(sweep.grid) * sweep.training_set.embeddings.shape[1]
        self.num_samples = [len(rows) * samples_a_row for rows in sweep.chunks]
        self.counted = {number for number, path in enumerate(self.paths) if path.exists()}

    @contextmanager
    def sharing(self, companions: Companions | None) -> Iterator[None]:
        """Shares the chunks, and those of companions, with other processes."""
        names = {number: path.stem for number, path in enumerate(self.paths)}
        self.measure_with = companions.measure_with if companions else None
        with ExitStack() as stack:
            self.share = stack.enter_context(Share(self.folder, names, self.is_done))
            self.others = {
                companion: stack.enter_context(
                    Share(folder, names, partial(self.is_written, folder))
                )
                for companion, folder in (companions.folders if companions else {}).items()
            }
            yield

    @contextmanager
    def showing(self, description: str) -> Iterator[None]:
        """Shows how far it is: others' chunks count too, so that the time left is right."""
        done = sum(self.num_samples[number] for number in self.counted)
        with (
            progress(sum(self.num_samples), description, "samples", done) as self.bar,
            ThreadPoolExecutor(4) as self.pool,
        ):
            yield

    def is_written(self, folder: Path, number: int) -> bool:
        """Whether a chunk stands in a folder."""
        return (folder / self.paths[number].name).exists()

    def is_done(self, number: int) -> bool:
        """Whether a chunk is there."""
        if done := self.paths[number].exists():
            self.count(number)
        return done

    def count(self, number: int) -> None:
        """Counts a chunk that is done, once."""
        if number not in self.counted:
            self.counted.add(number)
            self.bar.update(self.num_samples[number])

    def draw(self, number: int) -> np.ndarray:
        """The noise of a chunk."""
        return self.sweep.draw(self.sweep.chunks[number], self.model.device, self.pool)

    def score(self, number: int, noises: np.ndarray) -> None:
        """Scores a chunk, and with it those companions' that nobody else is at; writes and releases
        them."""
        along = [companion for companion, other in self.others.items() if other.take(number)]
        measure = self.measure_with(along) if along and self.measure_with else self.measure
        values = self.sweep.score(self.model, self.sweep.chunks[number], noises, measure)
        parts = np.split(values, 1 + len(along), axis=1) if along else [values]
        for owner, part in zip([self.share, *(self.others[number] for number in along)], parts):
            with suppress(FileNotFoundError):  # the folder is gone: another process is done
                write_array_chunk(owner.folder / self.paths[number].name, self.pack(part))
            owner.release(number)
        self.count(number)
