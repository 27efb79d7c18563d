"""Flows whose transformers take packed latents, 2 x 2 of them in one position: what FLUX and Qwen-Image
have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .flow import Flow


class Packed(Flow):
    """A family whose transformer takes packed latents."""

    patch = 2

    def own_latent_side(self, denoiser: Mapping[str, Any]) -> int:
        return 128  # their configurations do not say; diffusers' pipelines take this

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return unpack(output, noisy.shape)

    def steps(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps).tolist()}


def packed_channels(channels: object) -> int | None:
    """Channels of packed latents that have so many; None where that is no number."""
    return channels * Packed.patch**2 if isinstance(channels, int) else None


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [batch, C, h, w] as positions [batch, h / 2 * w / 2, 4 C]."""
    number, channels, height, width = latents.shape
    blocks = latents.reshape(number, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(positions: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Latents of this shape, [batch, C, h, w], that were packed."""
    number, channels, height, width = shape
    blocks = positions.reshape(number, height // 2, width // 2, channels, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(number, channels, height, width)
