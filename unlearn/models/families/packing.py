"""Flows whose transformers take packed latents, 2 x 2 of them in one position: what FLUX and Qwen-Image
have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .flow import Flow, falling_sigmas


class Packed(Flow):
    """A family whose transformer takes packed latents."""

    patch = 2

    def own_latent_side(self, denoiser: Mapping[str, Any]) -> int:
        return 128  # their configurations do not say; diffusers' pipelines take this

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        return unpack(output, noisy.shape)

    def steps(self, num_steps: int) -> dict[str, Any]:
        return falling_sigmas(num_steps)


class Standardised(Packed):
    """A family whose latents are brought to mean 0 and standard deviation 1."""

    def statistics(self, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of a VAE's latents like these."""
        raise NotImplementedError

    def normalise(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = self.statistics(vae, latents)
        return (latents - mean) / deviation

    def denormalise(self, vae: Any, latents: Any) -> torch.Tensor:
        latents = torch.as_tensor(latents)
        mean, deviation = self.statistics(vae, latents)
        return latents * deviation + mean


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
