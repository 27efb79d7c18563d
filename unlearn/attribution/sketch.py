"""A count sketch: many thousand numbers in a few thousand that keep their inner products.

Buckets and signs are raw Philox bits, which depend on seed and parameter name alone: not on device,
library version, selection or order of weights.
"""

from collections.abc import Mapping

import numpy as np
import torch

from .. import noise


class CountSketch:
    """Adds each weight, with a random sign, to one of `size` sums. It keeps 4 bytes a weight on the
    device. Source: Charikar, Chen and Farach-Colton, Finding frequent items in data streams."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        size: int,
        seed: int,
        device: torch.device | str,
    ):
        """parameters: {name: tensor} of the shapes that will be sketched."""
        self.size = size
        self.targets = {
            name: torch.from_numpy(draw_targets(name, value.numel(), size, seed)).to(device)
            for name, value in parameters.items()
        }

    def reduce(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sketch of named tensors, [size] of their dtype. Linear; E <sketch a, sketch b> = <a,
        b>, with a variance of at most 2 |a|^2 |b|^2 / size."""
        first = next(iter(tensors.values()))
        sums = torch.zeros(2 * self.size, dtype=first.dtype, device=first.device)
        for name, tensor in tensors.items():
            sums.index_add_(0, self.targets[name], tensor.flatten())
        return sums[: self.size] - sums[self.size :]


def draw_targets(name: str, count: int, size: int, seed: int) -> np.ndarray:
    """Where a parameter's weights go, [count] int32: a sum, plus `size` where the sign is
    negative."""
    raw = noise.image_generator(seed, "count sketch", name).random_raw(count)
    # Of the 63 bits above the sign, a remainder favours some sums by less than one in 10^15.
    return (
        (raw >> np.uint64(1)) % np.uint64(size) + (raw & np.uint64(1)) * np.uint64(size)
    ).astype(np.int32)
