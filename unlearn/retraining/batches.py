"""What training from scratch sees, and when.

Everything random belongs to (seed, data set, image, epoch): flip, caption, timestep and noise of an
image, and the order of an epoch. A model that is trained without some images goes through the very
same batches, in which they are missing, so that two models differ by these images and by nothing
else.
"""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from .. import noise
from ..datasets.conditioning import map_tensors
from ..datasets.training_sets import TrainingSet
from .recipes import Recipe


def random_members(num_images: int, num_kept: int, seed: int, dataset_id: str) -> np.ndarray:
    """A seeded random subset as a mask [num_images] bool, the same on every machine."""
    bits = noise.image_generator(seed, dataset_id, "members of a random subset")
    mask = np.zeros(num_images, bool)
    mask[np.random.Generator(bits).permutation(num_images)[:num_kept]] = True
    return mask


def epoch_order(seed: int, dataset_id: str, num_occurrences: int, epoch: int) -> np.ndarray:
    """The order in which an epoch goes through all images and their repeats, int64
    [num_occurrences]."""
    bits = noise.image_generator(seed, dataset_id, "order of training")
    noise.seek(bits, 0, 0, 0, epoch)
    return np.random.Generator(bits).permutation(num_occurrences)


def number_draws(occurrences: np.ndarray, epoch: int) -> np.ndarray:
    """The number of each occurrence among all draws of its image, int64 [occurrences]: no two
    repeats see the same noise, and without repeats it is the epoch. occurrences: images in their
    order, each as often as it is repeated."""
    repeats = np.bincount(occurrences)
    first = np.cumsum(repeats) - repeats
    return epoch * repeats[occurrences] + np.arange(len(occurrences)) - first[occurrences]


def draw_batch(
    training_set: TrainingSet,
    images: np.ndarray,
    draws: np.ndarray | int,
    seed: int,
    num_train_timesteps: int,
) -> list[Any]:
    """What training sees of these images: latents (a random view), noise, timesteps, conditioning (a
    random caption's), as tensors [batch, ...]. draws: the number of each one's draw, [batch] or one
    for all."""
    num_views, num_captions = training_set.latents.shape[0], training_set.embeddings.shape[1]
    views, captions, timesteps = np.empty((3, len(images)), np.int64)
    normals = np.empty((len(images), *training_set.latents.shape[2:]), np.float32)
    for row, (image, draw) in enumerate(zip(images, np.broadcast_to(draws, len(images)))):
        bits = noise.image_generator(seed, training_set.name, f"training {training_set.ids[image]}")
        noise.seek(bits, 0, 0, 0, int(draw))
        generator = np.random.Generator(bits)
        views[row], captions[row], timesteps[row] = (
            generator.integers(count) for count in (num_views, num_captions, num_train_timesteps)
        )
        generator.standard_normal(out=normals[row], dtype=np.float32)

    def put(array: np.ndarray, dtype: Any = np.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype))

    return [
        put(training_set.latents[views, images]),
        put(normals),
        put(timesteps, timesteps.dtype),
        {name: put(array) for name, array in training_set.texts(images, captions).items()},
    ]


def own_samples(present: np.ndarray, inputs: Sequence[Any]) -> tuple[list[Any], torch.Tensor]:
    """The samples of a batch that each model may see, in their order: inputs [models, width, ...],
    and which of them count, [models, width] float32 (a model with fewer than the others sees some
    more that do not count)."""
    width = max(1, int(present.sum(axis=1).max()))
    columns = np.argsort(~present, axis=1, kind="stable")[:, :width]
    counted = torch.from_numpy(np.take_along_axis(present, columns, axis=1).astype(np.float32))
    return map_tensors(itemgetter(torch.from_numpy(columns)), inputs), counted


def draw_step(
    training_set: TrainingSet,
    members: np.ndarray,
    recipe: Recipe,
    step: int,
    num_train_timesteps: int,
) -> tuple[list[Any], torch.Tensor]:
    """What a step trains on, as `mean_losses` takes it: inputs [models, width, ...] and which of
    them count. members: [models, N] bool, the images that each model may see."""
    num_images = len(training_set)
    epoch, number = divmod(step, recipe.steps_an_epoch(num_images))
    occurrences = recipe.occurrences(num_images)
    rows = epoch_order(recipe.seed, training_set.name, len(occurrences), epoch)[
        number * recipe.batch_size : (number + 1) * recipe.batch_size
    ]
    # One image at least, even where it does not count: the step is then taken without a gradient.
    kept = members[:, occurrences[rows]].any(axis=0)
    rows = rows[kept] if kept.any() else rows[:1]
    images, draws = occurrences[rows], number_draws(occurrences, epoch)[rows]
    return own_samples(
        members[:, images],
        draw_batch(training_set, images, draws, recipe.seed, num_train_timesteps),
    )
