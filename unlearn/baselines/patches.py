"""Attribution without a model: what the best possible denoiser of the training images would make a
noisy picture of. [NDA]: Nonparametric data attribution, ICML 2026, arXiv 2510.14269."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import unfold

from .. import noise
from ..datasets.training_sets import TrainingSet, check_pixels
from ..errors import UserError
from ..models.pipelines import Model
from ..runtime.programs import progress
from .interface import Method, Run

MOST_DISTANCES = 1 << 24  # in memory at once: of patches of a query to patches of images


def cut_patches(latents: torch.Tensor, size: int) -> torch.Tensor:
    """All patches [n * positions, C * size * size] of latents [n, C, h, w]."""
    return unfold(latents, size).transpose(1, 2).flatten(0, 1)


def diffusion_of(model: Model, shape: tuple[int, ...], timestep: int) -> tuple[float, float]:
    """(a, s) of x_t = a x + s eps at a timestep, whatever the family."""
    ones, times = torch.ones(1, *shape, device=model.device), torch.tensor([timestep])
    zeros, times = torch.zeros_like(ones), times.to(model.device)
    of_signal, of_noise = model.diffuse(ones, zeros, times), model.diffuse(zeros, ones, times)
    return float(of_signal.flatten()[0]), float(of_noise.flatten()[0])


def image_patches(
    images: TrainingSet, size: int, num_asked: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (number of images, their patches [images * views * positions, d] float64), image by
    image of both views."""
    height, width = images.latents.shape[-2:]
    positions = (height - size + 1) * (width - size + 1) * images.latents.shape[0]
    step = max(1, MOST_DISTANCES // (num_asked * positions))
    for start in range(0, len(images), step):
        latents = np.asarray(images.latents[:, start : start + step], np.float64)
        check_pixels(f"latents from {images.ids[start]} on", latents)
        by_image = torch.from_numpy(latents.swapaxes(0, 1).copy())  # [images, views, C, h, w]
        yield len(by_image), cut_patches(by_image.flatten(0, 1), size)


@dataclass(frozen=True)
class Nda(Method):
    """Nonparametric attribution: how much of each patch of the noisy query the best denoiser would
    take from an image's patches. Source: [NDA], over all patches of an image, not its best ten.

    That denoiser knows the training images alone, no model: a patch y has the weight softmax of -||
    x_t - a y ||^2 / (2 s^2) over all patches of all images, x_t = a x + s eps the query's. A score
    is the sum over the query's patches of the weights of the image's, in both views.
    """

    patch_size: int
    patch_timestep: int
    noise_seed: int

    needs_base_model = True  # exemplars of customized models have no latents here

    def own_identity(self, run: Run) -> dict:
        return noise.identity()

    def scores(self, run: Run) -> list[np.ndarray]:
        shape = run.training_set.latents.shape[2:]
        if not 1 <= self.patch_size <= min(shape[1:]):
            raise UserError(
                f"--patch_size {self.patch_size}: expected 1 to {min(shape[1:])}, the latent's side"
            )
        if not 0 <= self.patch_timestep < run.model.num_train_timesteps:
            raise UserError(
                f"--patch_timestep {self.patch_timestep}: expected 0 to "
                f"{run.model.num_train_timesteps - 1}, the timesteps of the model"
            )
        signal, spread = diffusion_of(run.model, shape, self.patch_timestep)
        with progress(len(run.queries) * len(run.training_set), "nda", "images") as bar:
            return [self.score(run, query, signal, spread, bar.update) for query in run.queries]

    def score(
        self,
        run: Run,
        query: TrainingSet,
        signal: float,
        spread: float,
        update: Callable[[int], object],
    ) -> np.ndarray:
        """Scores [N] float64 of one query; they sum to the number of its patches."""
        slot = [(0, 0, self.patch_timestep, 0)]
        shape = query.latents.shape[2:]
        normals = noise.image_noise(self.noise_seed, query.name, query.ids[0], slot, shape)
        noisy = signal * np.asarray(query.latents[0, :1], np.float64) + spread * normals
        asked = cut_patches(torch.from_numpy(noisy), self.patch_size)
        found = []
        for count, patches in image_patches(run.training_set, self.patch_size, len(asked)):
            squares = torch.cdist(asked, signal * patches).square()
            weights = (-squares / (2 * spread**2)).reshape(len(asked), count, -1)
            found.append(weights.logsumexp(dim=2))
            update(count)
        return torch.cat(found, dim=1).softmax(dim=1).sum(dim=0).numpy()
