"""Guidance that a transformer is told as a number, as those of FLUX are that were distilled to it."""

from typing import Any

import torch

from ...datasets.conditioning import TEXT, Conditioning

# What training tells it: diffusers' examples' default. Other trainers tell it 1.
GUIDANCE = 3.5


def identify_guidance(pipeline: Any) -> dict:
    """What a record says of it, {} where the transformer takes none."""
    return {"guidance": GUIDANCE} if pipeline.transformer.config.guidance_embeds else {}


def read_guidance(denoiser: Any, told: Conditioning, like: torch.Tensor) -> torch.Tensor | None:
    """The guidance [batch] of a pass with samples like these, None where the transformer takes
    none."""
    if not denoiser.config.guidance_embeds:
        return None
    return told.get("guidance", torch.full((len(like),), GUIDANCE, device=like.device))


def tell_guidance(conditioning: Conditioning, guidance_scale: float) -> Conditioning:
    """Conditioning with a guidance that the model is told."""
    told = torch.full((len(conditioning[TEXT]),), float(guidance_scale))
    return {**conditioning, "guidance": told.to(conditioning[TEXT])}
