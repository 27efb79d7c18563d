"""Pictures from prompts, with noise that belongs to the seed: the same query on any device, again
by any model."""

from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO, cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from .. import noise
from ..datasets.encoders import encode_prompts
from ..errors import UserError
from .pipelines import Model
from .sampling import NUM_INFERENCE_STEPS


def make_scheduler(model: Model, num_steps: int) -> DDIMScheduler:
    """Deterministic DDIM on the model's own schedule."""
    # A pair only where it is asked for the settings that it does not take.
    scheduler = cast(
        DDIMScheduler,
        DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False),
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def check_steps(model: Model, num_steps: int) -> None:
    """Raises UserError where a model cannot sample in so many steps, or in none."""
    count = len(model.alpha_bars)
    if (
        not 1 <= num_steps <= count
        or int(make_scheduler(model, num_steps).timesteps.max()) >= count
    ):
        raise UserError(f"--num_inference_steps {num_steps}: expected 1 to fewer than {count}")
    if (
        model.prediction_type == "epsilon"
        and not make_scheduler(model, num_steps).alphas_cumprod.all()
    ):
        raise UserError(
            "the model's last timestep is noise alone (rescale_betas_zero_snr), and it predicts "
            "the noise (epsilon): no picture "
            "follows from that. If it was trained to predict v, as models with such a schedule "
            'are, write "prediction_type": '
            '"v_prediction" into its scheduler_config.json'
        )


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
    embeddings: torch.Tensor,
    start: torch.Tensor,
    num_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = 1.0,
    empty: torch.Tensor | None = None,
    callback: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Latents [n, C, h, w] float32, on the model's device, by deterministic DDIM sampling (eta 0).

    embeddings: [n, tokens, features] and start: [n, C, h, w] (`initial_noise`), on that device;
    empty: embedding [tokens, features] of the empty prompt, for guidance_scale other than 1;
    callback(latents, timestep) sees each noisy latent before its step. Raises UserError where one
    is not finite.
    """
    if guidance_scale != 1 and empty is None:
        raise ValueError("guidance needs the embedding of the empty prompt")
    scheduler, latents = make_scheduler(model, num_steps), start.clone()
    for timestep in scheduler.timesteps:
        if callback:
            callback(latents, timestep)
        timesteps = timestep.to(latents.device).expand(len(latents))
        prediction = model.predict(latents, timesteps, embeddings)
        if guidance_scale != 1 and empty is not None:
            unconditional = model.predict(latents, timesteps, empty.expand_as(embeddings))
            prediction = unconditional + guidance_scale * (prediction - unconditional)
        latents = scheduler.step(prediction, int(timestep), latents, return_dict=False)[0]
    check_finite("latents", latents)
    return latents


@torch.no_grad()
def decode_latents(pipeline: DiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    """Pixels [n, H, W, 3] uint8 of scaled latents. Raises UserError where one is not finite."""
    config = pipeline.vae.config
    unscaled = latents / config.scaling_factor + (config.get("shift_factor") or 0)
    pixels = pipeline.vae.decode(unscaled).sample.float()
    check_finite("pixels", pixels)
    pixels = pixels.clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def make_pictures(
    model: Model,
    dataset_id: str,
    embeddings: np.ndarray,
    seeds: Sequence[int],
    shape: Sequence[int],
    num_steps: int,
    guidance_scale: float,
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [n, C, h, w] float32 and pixels [n, H, W, 3] uint8, on the CPU, of prompts each with
    its own seed.

    embeddings: [n, tokens, features] float32 array; shape: (C, h, w); progress(count) is told of
    finished pictures.
    """
    start = initial_noise(dataset_id, seeds, shape)
    empty = encode_prompts(model.pipeline, [""])[0].to(model.device)
    parts = []
    for first in range(0, len(seeds), batch_size):
        texts, noises = (
            torch.from_numpy(np.array(array[first : first + batch_size], np.float32)).to(
                model.device
            )
            for array in (embeddings, start)
        )
        latents = generate_latents(model, texts, noises, num_steps, guidance_scale, empty)
        parts.append((latents.cpu().numpy(), decode_latents(model.pipeline, latents)))
        progress(len(latents))
    latents, pixels = zip(*parts)
    return np.concatenate(latents), np.concatenate(pixels)


def save_picture(file: BinaryIO, pixels: np.ndarray) -> None:
    """Writes pixels [H, W, 3] uint8 as PNG to an open file."""
    Image.fromarray(pixels).save(file, "PNG")
