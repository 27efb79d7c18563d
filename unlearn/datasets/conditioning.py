"""Conditioning: what a denoiser is told beside noisy latents and a timestep, as named tensors.

`embeddings`, the text's, is always among them; what else there is (pooled text, masks, time ids) a
family of models says. Each is [texts, ...], and belongs to as many successive samples as there are
samples a text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Conditioning = Mapping[str, torch.Tensor]
TEXT = "embeddings"  # [texts, tokens, features]


def count_texts(conditioning: Conditioning) -> int:
    """How many texts it is of."""
    return len(next(iter(conditioning.values())))


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], samples: Any) -> Any:
    """A function's values of tensors: of one, of named ones, or of a sequence of either (latents,
    noise, timesteps, conditioning)."""
    if isinstance(samples, torch.Tensor):
        return function(samples)
    if isinstance(samples, Mapping):
        return {name: function(tensor) for name, tensor in samples.items()}
    return [map_tensors(function, part) for part in samples]


def repeat_texts(conditioning: Conditioning, num_samples: int) -> Conditioning:
    """The conditioning of each of `num_samples` samples, as many successive ones a text."""
    samples_a_text = num_samples // count_texts(conditioning)
    if samples_a_text == 1:
        return conditioning
    return map_tensors(lambda tensor: tensor.repeat_interleave(samples_a_text, dim=0), conditioning)


def join_conditioning(parts: Sequence[Conditioning]) -> dict[str, torch.Tensor]:
    """The conditioning of several batches of texts as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
