"""Random projection of gradients to a few thousand numbers that keep their inner products.

A sparse Johnson-Lindenstrauss sketch: every weight is added, with a random sign, to one entry of
each of four blocks of the sketch. Own lines, because the kept libraries do not fit: traker's
projection on a CPU is a dense matrix (8 GB for a million weights) drawn by the device's own
generator, dattri's sparse one is a compiled CUDA extension. Here buckets and signs are raw Philox
bits, which depend on seed and parameter name alone: not on device, library version, selection or
order of weights.
"""

from collections.abc import Mapping

import numpy as np
import torch

from .. import noise

# entries of the sketch that a weight goes to; one would keep heavy weights that collide from being
# told apart
BLOCKS = 4


class Sketch:
    """The projection of named gradients to `size` numbers. It keeps 16 bytes a weight on the
    device."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        size: int,
        seed: int,
        device: torch.device | str,
    ) -> None:
        """parameters: {name: tensor} whose gradients will be projected."""
        self.size, self.num_blocks = size, min(BLOCKS, size)
        self.targets = {
            name: [
                torch.from_numpy(self.draw_targets(name, block, value.numel(), seed)).to(device)
                for block in range(self.num_blocks)
            ]
            for name, value in parameters.items()
        }

    def draw_targets(self, name: str, block: int, count: int, seed: int) -> np.ndarray:
        """Where a parameter's weights go in one block, [count] int32: an entry, plus `size` where
        the sign is negative."""
        start = block * self.size // self.num_blocks
        end = (block + 1) * self.size // self.num_blocks
        raw = noise.image_generator(seed, "projection", f"{name}, block {block}").random_raw(count)
        # Of the 63 bits above the sign, a remainder favours some entries by less than one in 10^15.
        return (
            start
            + (raw >> np.uint64(1)) % np.uint64(end - start)
            + (raw & np.uint64(1)) * np.uint64(self.size)
        ).astype(np.int32)

    def project(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sketch of gradients {name: tensor}, [size] of their dtype. Linear; E <sketch a,
        sketch b> = <a, b>, with a variance of at most 2 |a|^2 |b|^2 / size. Source: Kane and
        Nelson, Sparser Johnson-Lindenstrauss Transforms."""
        first = next(iter(gradients.values()))
        sums = torch.zeros(2 * self.size, dtype=first.dtype, device=first.device)
        for name, gradient in gradients.items():
            for targets in self.targets[name]:
                sums.index_add_(0, targets, gradient.flatten())
        return (sums[: self.size] - sums[self.size :]) / self.num_blocks**0.5
