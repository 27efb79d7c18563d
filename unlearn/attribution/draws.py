"""Noise and timesteps, of losses and of unlearning: drawn our way, where they belong to the image,
or as the published program draws them (`compat` abu), where they belong to the batch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch

from .. import noise
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model

CHUNK_IMAGES = 32  # part of no result: any chunking gives the same losses
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio


def rows_of(images: Sequence[int] | np.ndarray, num_images: int, num_views: int) -> np.ndarray:
    """Rows (view * num_images + image) of every view of some images."""
    return np.concatenate([view * num_images + np.asarray(images) for view in range(num_views)])


def chunk_rows(
    num_images: int, num_views: int, chunk_images: int = CHUNK_IMAGES
) -> Iterator[np.ndarray]:
    """`rows_of` each chunk: fixed ranges of images."""
    for start in range(0, num_images, chunk_images):
        yield rows_of(range(start, min(start + chunk_images, num_images)), num_images, num_views)


def split_rows(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in runs of `size`, the last one shorter."""
    return np.split(rows, np.arange(size, len(rows), size))


def chunk_noise(
    training_set: TrainingSet,
    rows: Sequence[int] | np.ndarray,
    grid: Sequence[int],
    noise_seed: int,
    pool: Executor,
) -> np.ndarray:
    """Noise [rows, captions * timesteps, C, h, w] float32 of a chunk, drawn image by image in
    worker threads."""
    num_captions = training_set.embeddings.shape[1]
    shape = training_set.latents.shape[2:]

    def draw(row):
        view, image = divmod(int(row), len(training_set))
        slots = [
            (view, caption, timestep, 0) for caption in range(num_captions) for timestep in grid
        ]
        return noise.image_noise(
            noise_seed, training_set.name, training_set.ids[image], slots, shape
        )

    return np.stack(list(pool.map(draw, rows)))


@dataclass(frozen=True)
class ImageNoise:
    """The noise of losses that belongs to the image, whatever the batch, device and order."""

    seed: int = 0
    compat = None

    def identity(self, device: torch.device) -> dict:
        """What the numbers depend on, for records."""
        return {**noise.identity(), "noise_seed": self.seed}

    def chunks(self, training_set: TrainingSet, grid: list[int]) -> list[np.ndarray]:
        """The rows of each chunk of a sweep: fixed ranges of images."""
        return list(chunk_rows(len(training_set), training_set.latents.shape[0]))

    def draw(
        self,
        training_set: TrainingSet,
        rows: np.ndarray,
        grid: list[int],
        device: torch.device | str,
        pool: Executor,
    ) -> np.ndarray:
        """`chunk_noise` of some rows."""
        return chunk_noise(training_set, rows, grid, self.seed, pool)


@dataclass(frozen=True)
class BatchNoise:
    """The published program's noise of losses: of a batch, from a torch generator on the device
    that is seeded by the batch's number. Here the batch size is part of the result. Rows come as
    is, then mirrored, `batch_size // len(grid)` of them a batch."""

    batch_size: int
    compat = "abu"

    def identity(self, device: torch.device) -> dict:
        """What the numbers depend on, for records."""
        return {**published_identity(device), "batch_size": self.batch_size}

    def rows_a_batch(self, grid: list[int]) -> int:
        """Rows of a batch. Raises UserError where a batch holds less than an image's timesteps."""
        if self.batch_size < len(grid):
            raise UserError(
                f"--batch_size {self.batch_size}: --compat abu needs at least the {len(grid)} "
                f"timesteps of an image"
            )
        return self.batch_size // len(grid)

    def chunks(self, training_set: TrainingSet, grid: list[int]) -> list[np.ndarray]:
        """The rows of each chunk of a sweep: runs of ten batches."""
        num_rows = training_set.latents.shape[0] * len(training_set)
        return split_rows(np.arange(num_rows), 10 * self.rows_a_batch(grid))

    def draw(
        self,
        training_set: TrainingSet,
        rows: np.ndarray,
        grid: list[int],
        device: torch.device | str,
        pool: Executor,
    ) -> np.ndarray:
        """Noise [rows, timesteps, C, h, w] float32 of rows that begin with a batch's first."""
        size, shape = self.rows_a_batch(grid), training_set.latents.shape[2:]

        def draw_batch(batch):
            drawn = noise.batch_noise(
                int(batch[0]) // size, (len(batch) * len(grid), *shape), device
            )
            return drawn.cpu().numpy().reshape(len(batch), len(grid), *shape)

        return np.concatenate([draw_batch(batch) for batch in split_rows(rows, size)])


def published_identity(device: torch.device) -> dict:
    """What the published program's numbers depend on besides a seed."""
    return {"noise": "torch generator, abu", "noise_device": device.type}


class QueryDraws:
    """Noise and timesteps of a query's unlearning, keyed by (seed, data set, query) and the draw's
    own number: the same on every device, however the draws are grouped.

    Draws 2j and 2j + 1 are antithetic: opposite noise at one timestep, so that all that is odd in
    the noise cancels. The timesteps of successive pairs go around the grid in steps of the golden
    ratio, from a start that belongs to the query: every run of them is spread evenly, where chance
    would leave gaps. Each draw by itself is uniform and normal, so that their mean stays unbiased.
    Source: Owen, Monte Carlo theory, methods and examples, sections 8.2 and 16.4.
    """

    scheme = "stratified-antithetic"
    in_order = False  # whether they must be asked for in order, batch by batch

    def __init__(self, seed: int, dataset_id: str, query_id: str, num_train_timesteps: int) -> None:
        self.seed = seed
        self.dataset_id = dataset_id
        self.query_id = query_id
        self.num_train_timesteps = num_train_timesteps
        self.start = int(
            noise.image_generator(seed, dataset_id, f"timesteps of {query_id}").random_raw()
        )

    @classmethod
    def of_query(cls, seed: int, query: TrainingSet, model: Model) -> "QueryDraws":
        """The draws of a query, a TrainingSet of one image."""
        return cls(seed, query.name, query.ids[0], model.num_train_timesteps)

    @classmethod
    def identity(cls, device: torch.device) -> dict:
        """What the numbers depend on besides the seed, for records."""
        return noise.identity()

    def draw(
        self, first: int, count: int, shape: Sequence[int], device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws `first` to `first + count`: noise [count, *shape] float32 and timesteps [count]
        int64."""
        pairs = range(first // 2, (first + count + 1) // 2)
        positive = noise.image_noise(
            self.seed,
            self.dataset_id,
            f"unlearning {self.query_id}",
            [(0, 0, 0, j) for j in pairs],
            shape,
        )
        normals = np.stack([positive, -positive], axis=1).reshape(-1, *shape)
        # In integers: a position on the circle of 2^64, the same on every machine.
        timesteps = np.array(
            [(self.start + j * GOLDEN) % 2**64 * self.num_train_timesteps >> 64 for j in pairs]
        ).repeat(2)
        wanted = slice(first % 2, first % 2 + count)
        return torch.from_numpy(normals[wanted]).to(device), torch.from_numpy(timesteps[wanted]).to(
            device
        )


class PublishedDraws:
    """The published program's: one torch generator on the device, noise and then a permutation of
    the timesteps."""

    in_order = True

    def __init__(self, seed: int, num_train_timesteps: int, device: torch.device | str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.num_train_timesteps = num_train_timesteps

    @classmethod
    def of_query(cls, seed: int, query: TrainingSet, model: Model) -> "PublishedDraws":
        """The draws of a query: the same for all."""
        return cls(seed, model.num_train_timesteps, model.device)

    @classmethod
    def identity(cls, device: torch.device) -> dict:
        """What the numbers depend on besides the seed, for records."""
        return published_identity(device)

    def draw(
        self, first: int, batch_size: int, shape: Sequence[int], device: torch.device | str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch; it must be asked for in order."""
        normals = torch.randn((batch_size, *shape), generator=self.generator, device=device)
        return normals, torch.randperm(
            self.num_train_timesteps, generator=self.generator, device=device
        )[:batch_size]


DRAWS = {None: QueryDraws, "abu": PublishedDraws}  # of unlearning, by `compat`
