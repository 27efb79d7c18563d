"""Random projection of gradients to a few thousand numbers that keep their inner products.

Every weight is added, with a random sign, to one entry of each block of the sketch. One block is a
count sketch (Charikar, Chen and Farach-Colton, Finding frequent items in data streams), several a
sparse Johnson-Lindenstrauss transform (Kane and Nelson), which tells heavy weights that collide in
one block apart. Own lines, because the kept libraries do not fit: traker's projection on a CPU is a
dense matrix (8 GB for a million weights) drawn by the device's own generator, dattri's sparse one
is a compiled CUDA extension. Here buckets and signs are raw Philox bits, which depend on seed and
parameter name alone: not on device, library version, selection or order of weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch

from .. import noise

SMALL = 1 << 14  # twice as many fit into 16 bits
TOGETHER = 1 << 24  # weights that are added at once: a GPU takes as long for a few as for millions


class Sketch:
    """The projection of named gradients to `size` numbers. It keeps 2 bytes a weight and block on
    the device, 4 from SMALL numbers on."""

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        size: int,
        seed: int,
        device: torch.device | str,
        blocks: int = 1,
    ) -> None:
        """parameters: {name: tensor} of the shapes that will be projected."""
        self.size, self.num_blocks = size, min(blocks, size)
        self.is_single = blocks == 1  # decides what the stream of random bits is called, no more
        # Parameters that are added at once, and where the weights of each group go, block by block.
        self.groups: list[tuple[list[str], list[torch.Tensor]]] = [
            (names, self.find_targets(names, parameters, seed, device))
            for names in group_names(parameters)
        ]

    def find_targets(
        self,
        names: Sequence[str],
        parameters: Mapping[str, torch.Tensor],
        seed: int,
        device: torch.device | str,
    ) -> list[torch.Tensor]:
        """Targets of some parameters, one after the other, [weights] of each block."""
        return [
            torch.cat(
                [
                    self.keep(self.draw_targets(name, block, parameters[name].numel(), seed))
                    for name in names
                ]
            ).to(device)
            for block in range(self.num_blocks)
        ]

    def keep(self, targets: np.ndarray) -> torch.Tensor:
        """Targets in as few bytes as hold them."""
        kept = targets.astype(np.int16) if self.size < SMALL else targets
        return torch.from_numpy(kept)

    def draw_targets(self, name: str, block: int, count: int, seed: int) -> np.ndarray:
        """Where a parameter's weights go in one block, [count] int32: an entry, plus `size` where
        the sign is negative."""
        start = block * self.size // self.num_blocks
        end = (block + 1) * self.size // self.num_blocks
        kind, key = "projection", f"{name}, block {block}"
        if self.is_single:
            kind, key = "count sketch", name
        raw = noise.image_generator(seed, kind, key).random_raw(count)
        # Of the 63 bits above the sign, a remainder favours some entries by less than one in 10^15.
        return (
            start
            + (raw >> np.uint64(1)) % np.uint64(end - start)
            + (raw & np.uint64(1)) * np.uint64(self.size)
        ).astype(np.int32)

    def project(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The sketch of gradients {name: tensor}, [size] of their dtype, or float32. Linear; E <sketch a,
        sketch b> = <a, b>, with a variance of at most 2 |a|^2 |b|^2 / size."""
        first = next(iter(gradients.values()))
        # Of gradients in half precision too, sums are float32.
        dtype = torch.promote_types(first.dtype, torch.float32)
        sums = torch.zeros(2 * self.size, dtype=dtype, device=first.device)
        for names, blocks in self.groups:
            numbers = torch.cat([gradients[name].flatten() for name in names]).to(dtype)
            with in_any_order() if sums.is_cuda else nullcontext():
                for targets in blocks:
                    sums.index_add_(0, targets.int(), numbers)
        return (sums[: self.size] - sums[self.size :]) / self.num_blocks**0.5


@contextmanager
def in_any_order() -> Iterator[None]:
    """Within it a GPU may add numbers in any order, so that the last digits of two sums differ. In a
    fixed order it sorts them first: 4.5 instead of 59 billion a second (H200)."""
    was_fixed = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_fixed, warn_only=only_warns)


def group_names(parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of parameters in their order, in groups of up to TOGETHER weights, or of a larger one
    alone."""
    groups, size = [[]], 0
    for name, value in parameters.items():
        if groups[-1] and size + value.numel() > TOGETHER:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += value.numel()
    return groups
