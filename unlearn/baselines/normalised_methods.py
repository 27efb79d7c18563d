"""The TRAK family with the gradient of each sample brought to length 1 before they are averaged, so
that no timestep drowns the others. [D-TRAK] stands in `gradients`.

[DAS]: Lin et al., Diffusion Attribution Score, ICLR 2025, arXiv 2410.18639.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch

from ..attribution.draws import chunk_noise, rows_of
from ..attribution.losses import sample_losses
from ..datasets.conditioning import map_tensors
from .gradient_methods import VIEWS, DTrak, sweep_identity
from .gradients import cache_reduced, view_samples
from .interface import Run


@dataclass(frozen=True)
class DTrakNormalised(DTrak):
    """D-TRAK with the gradient of each timestep brought to length 1. Source: [D-TRAK], and the
    normalisation of [DAS]."""

    is_normalised = True
    cache_folder = "dtrak-normalised"


@dataclass(frozen=True)
class Das(DTrakNormalised):
    """Diffusion attribution score: normalised gradients of the mean output in TRAK's kernel, times
    the image's own error, squared. Source: [DAS], without its leverage.

    Score: [g_q^T (G^T G + lambda I)^-1 g_i r_i]^2. r_i is the root of the image's loss, relative to
    that of all images at the timestep, averaged over timesteps.
    """

    function = "mean"
    cache_folder = "das"

    def errors(self, run: Run) -> np.ndarray:
        """r_i of every view of every image, [N, views] float64; roots of losses are cached."""
        identity = sweep_identity(run, self, "root of the loss", self.weight_selection)
        found = cache_reduced(
            run.folder / self.cache_folder / "errors.npy",
            identity,
            run.training_set,
            root_losses(run, self.noise_seed),
            run.overwrite,
        )
        roots = np.asarray(found, np.float64)
        return (roots / roots.mean(axis=(0, 1))).mean(axis=2)

    def scores(self, run: Run) -> list[np.ndarray]:
        products = self.products(run) * self.errors(run)
        return list(VIEWS[self.views](np.square(products), axis=2))


def root_losses(run: Run, noise_seed: int) -> Callable[[Sequence[int], Executor], np.ndarray]:
    """`compute` of gradients.cache_reduced: roots of the losses of every view at every timestep,
    mean over captions, [images, views, timesteps] float32, under the image's own noise."""
    images, device = run.training_set, run.model.device

    @torch.no_grad()
    def measure(samples: tuple) -> np.ndarray:
        losses = [
            sample_losses(
                run.model, *map_tensors(itemgetter(slice(start, start + run.batch_size)), samples)
            )
            for start in range(0, len(samples[0]), run.batch_size)
        ]
        return torch.cat(losses).sqrt().reshape(-1, len(run.grid)).mean(dim=0).float().cpu().numpy()

    def compute(some: Sequence[int], pool: Executor) -> np.ndarray:
        rows = rows_of(some, len(images), images.latents.shape[0])
        normals = chunk_noise(images, rows, run.grid, noise_seed, pool)
        roots = [
            measure(view_samples(images, *divmod(int(row), len(images)), run.grid, own, device))
            for row, own in zip(rows, normals)
        ]
        return np.stack(roots).reshape(-1, len(some), len(run.grid)).swapaxes(0, 1)

    return compute
