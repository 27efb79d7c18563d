"""What a benchmark is asked to measure."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class BenchmarkSettings:
    """The sizes of a benchmark, its seed and its device."""

    device: torch.device
    seed: int  # of weights, images, queries and noise
    num_images: int | None  # training images; None: all that a data root has
    num_queries: int  # unlearned, and scored at once by gradients
    num_exact: int  # of these, that fidelity is averaged over
    time_samples: int  # timesteps of the losses' grid
    batch_size: int  # noisy samples in one forward pass
    gradient_batch_size: int  # noisy samples in one forward and backward pass
    unlearn_batch_size: int  # samples in one gradient of a query
    unlearn_grad_accum_steps: int  # such gradients in a query's one Newton step
    relative_change: list[float]  # sizes of the weight change, beside the natural one
    shortlist: int  # images that the index leaves to be scored
    fisher_samples: int  # gradient samples of a seeded model's Fisher
    target_images: int  # seconds a query are given for so many images too
    target_draws: int  # ... and for so many draws of a query's unlearning

    @property
    def draws(self) -> int:
        """Draws of noise and timestep in a query's one Newton step."""
        return self.unlearn_batch_size * self.unlearn_grad_accum_steps
