"""What a retrained model is asked about the queries: their losses, and the pictures that it makes
from their seeds."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..attribution.draws import chunk_noise
from ..attribution.losses import score_rows
from ..baselines.similarity import normalise
from ..datasets.pictures import load_image
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.generation import NUM_INFERENCE_STEPS, save_picture
from ..models.pipelines import Model
from ..storage.artifacts import whole_file
from ..storage.hashes import digest

LOSS_TIMESTEPS = 200  # of the queries' losses, by default


@dataclass(frozen=True)
class MeasureSettings:
    """How models are measured: what must be the same for the measures of two to be compared. The
    fields are those of the record."""

    timesteps: int  # of the queries' losses
    noise_seed: int  # of the queries' losses
    num_inference_steps: int  # of the pictures
    guidance_scale: float  # of the pictures
    features: str | None  # name of the model that pictures are compared by; None: VAE latents


@dataclass(frozen=True, eq=False)
class Questions:
    """What every model is asked."""

    tasks: list[Task]
    queries: TrainingSet  # the tasks' queries, in their order
    pictures: np.ndarray | None  # theirs, [n, H, W, 3] uint8; None where no model makes them again
    encode: Callable | None  # encoder of `features` (see baselines); None: VAE latents
    settings: MeasureSettings
    loss_batch_size: int  # memory only
    vae_batch_size: int  # memory only

    @property
    def names(self) -> list[str]:
        """Of the queries."""
        return [task.query_name for task in self.tasks]


def join_sets(sets: Sequence[TrainingSet]) -> TrainingSet:
    """Training sets of one data set as one, in their order: queries that are measured together."""
    return type(sets[0])(
        sets[0].name,
        ids=[id for images in sets for id in images.ids],
        captions=[caption for images in sets for caption in images.captions],
        paths=[path for images in sets for path in images.paths],
        latents=np.concatenate([images.latents for images in sets], axis=1),
        embeddings=np.concatenate([images.embeddings for images in sets]),
        extras={
            name: np.concatenate([images.extras[name] for images in sets])
            for name in sets[0].extras
        },
        source=digest([images.source for images in sets]),
    )


@torch.no_grad()
def query_losses(
    model: Model, queries: TrainingSet, grid: list[int], noise_seed: int, batch_size: int
) -> np.ndarray:
    """Loss of each query [n] float64, mean over the grid; its noise is its own, the same under
    every model."""
    with ThreadPoolExecutor(1) as pool:
        return np.concatenate(
            [
                score_rows(
                    model,
                    queries,
                    np.array([row]),
                    grid,
                    chunk_noise(queries, [row], grid, noise_seed, pool),
                    batch_size,
                )
                for row in range(len(queries))
            ]
        )


def sampling_of(tasks: Sequence[Task]) -> tuple[int, float]:
    """Steps and guidance with which the queries were made, and are made again. Raises UserError
    where they are not alike."""
    found = {
        (
            task.num_inference_steps or NUM_INFERENCE_STEPS,
            1.0 if task.guidance_scale is None else float(task.guidance_scale),
        )
        for task in tasks
    }
    if len(found) > 1:
        raise UserError(
            f"the task files' queries were made with different num_inference_steps and "
            f"guidance_scale {sorted(found)}; measure "
            "them apart, with an --output each"
        )
    return found.pop() if found else (NUM_INFERENCE_STEPS, 1.0)


def load_pictures(dataroot: str, names: Sequence[str], resolution: int) -> np.ndarray:
    """The queries' pictures [n, H, W, 3] uint8. Raises UserError where one is not of the size that
    the model makes."""
    pictures = [np.asarray(load_image(Path(dataroot) / name)) for name in names]
    for name, pixels in zip(names, pictures):
        if pixels.shape[:2] != (resolution, resolution):
            raise UserError(
                f"{name}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, the model makes "
                f"{resolution} x {resolution}; they "
                "cannot be compared: give --no_pictures"
            )
    return np.stack(pictures)


def write_pictures(folder: Path, names: Sequence[str], pictures: np.ndarray) -> list[Path]:
    """Writes pictures [n, H, W, 3] uint8 as PNG files named after their queries; returns their
    paths."""
    paths = [folder / "pictures" / f"{name}.png" for name in names]
    for path, pixels in zip(paths, pictures):
        with whole_file(path) as file:
            save_picture(file, pixels)
    return paths


def compare_pictures(
    pictures: np.ndarray, made: np.ndarray, features: np.ndarray, made_features: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared difference of pixels in [0, 1] and cosine of features, float64 [n] each.

    pictures, made: [n, H, W, 3] uint8; features, made_features: [n, ...], VAE latents or a model's.
    """
    mse = np.square((pictures.astype(np.float64) - made) / 255).mean(axis=(1, 2, 3))
    first, second = (
        normalise(array.reshape(len(array), -1).astype(np.float64))
        for array in (features, made_features)
    )
    return mse, (first * second).sum(axis=1)
