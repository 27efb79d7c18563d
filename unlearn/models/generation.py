"""Pictures from prompts, with noise that belongs to the seed: the same query on any device, again
by any model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .. import noise
from ..datasets.conditioning import Conditioning
from ..errors import UserError
from .model import Model
from .sampling import NUM_INFERENCE_STEPS


def check_steps(model: Model, num_steps: int) -> None:
    """Raises UserError where a model cannot sample in so many steps, or in none."""
    model.family.check_steps(model.pipeline, num_steps)


def check_finite(what: str, values: torch.Tensor) -> None:
    """Raises UserError where pictures' latents, or pixels, [n, ...], are not finite: nothing is to
    be saved of them."""
    broken = ~torch.isfinite(values).flatten(1).all(dim=1)
    if broken.any():
        raise UserError(
            f"{int(broken.sum())} of {len(values)} pictures have NaN or infinite {what}: the "
            f"model, its schedule or the guidance "
            "is broken, and nothing of them is saved"
        )


def initial_noise(dataset_id: str, seeds: Iterable[int], shape: Sequence[int]) -> np.ndarray:
    """Where sampling starts: standard normals [len(seeds), *shape] float32, one row a seed."""
    return np.concatenate(
        [noise.image_noise(seed, dataset_id, "generation", [(0, 0, 0, 0)], shape) for seed in seeds]
    )


@torch.no_grad()
def generate_latents(
    model: Model,
    conditioning: Conditioning,
    start: torch.Tensor,
    num_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = 1.0,
    callback: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Latents [n, C, h, w] float32, on the model's device, by deterministic sampling: DDIM (eta 0),
    or Euler's method for flows.

    conditioning: {name: [n, ...]} and start: [n, C, h, w] (`initial_noise`), on that device;
    callback(latents, timestep) sees each noisy latent before its step. Raises UserError where one
    is not finite.
    """
    family, latents = model.family, start.clone()
    scheduler = family.sampler(model.pipeline, num_steps, start.shape[1:])
    conditioning, empty = family.guide(model.pipeline, conditioning, guidance_scale)
    for timestep in scheduler.timesteps:
        if callback:
            callback(latents, timestep)
        times = timestep.to(latents.device).expand(len(latents))
        prediction = model.predict_at(latents, times, conditioning)
        if empty is not None:
            unconditional = model.predict_at(latents, times, empty)
            prediction = family.mix(prediction, unconditional, guidance_scale)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    check_finite("latents", latents)
    return latents


@torch.no_grad()
def decode_latents(model: Model, latents: torch.Tensor) -> np.ndarray:
    """Pixels [n, H, W, 3] uint8 of latents as the denoiser makes them. Raises UserError where one
    is not finite."""
    vae: Any = model.pipeline.vae
    with model.encoders_there():
        pixels = model.family.decode_latents(vae, model.denormalise(latents)).float()
    check_finite("pixels", pixels)
    pixels = pixels.clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_pictures(
    model: Model,
    dataset_id: str,
    conditioning: Mapping[str, np.ndarray],
    seeds: Sequence[int],
    shape: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [n, C, h, w] float32 and pixels [n, H, W, 3] uint8, on the CPU, of prompts each with
    its own seed.

    conditioning: {name: [n, ...]} float32 arrays; shape: (C, h, w); progress(count) is told of
    finished pictures.
    """
    start, parts = initial_noise(dataset_id, seeds, shape), []

    def put(array: np.ndarray, first: int) -> torch.Tensor:
        rows = np.array(array[first : first + batch_size], np.float32)
        return torch.from_numpy(rows).to(model.device)

    for first in range(0, len(seeds), batch_size):
        texts = {name: put(array, first) for name, array in conditioning.items()}
        latents = generate_latents(model, texts, put(start, first), num_steps, guidance_scale)
        parts.append((latents.cpu().numpy(), decode_latents(model, latents)))
        progress(len(latents))
    latents, pixels = zip(*parts)
    return np.concatenate(latents), np.concatenate(pixels)


def save_picture(file: BinaryIO, pixels: np.ndarray) -> None:
    """Writes pixels [H, W, 3] uint8 as PNG to an open file."""
    Image.fromarray(pixels).save(file, "PNG")
