"""The published program's way, written plainly from the facts of the paper, for others to be
measured against: a batch at a time with noise drawn for the batch, stock attention, a text repeated
for each of its noisy samples. Nothing else uses it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import AttnProcessor2_0

from ..datasets.training_sets import TrainingSet
from ..models.passes import BlockedFeedForward, replace_feed_forward
from ..models.pipelines import replaced_weights
from ..noise import batch_noise
from ..runtime.programs import set_precision, tune_allocator


@contextmanager
def default_flags() -> Iterator[None]:
    """Torch's default precision flags: TensorFloat-32 off in matrix products but on in
    convolutions, and no kernel need be deterministic; and what glibc's allocator comes to by
    itself. `fp32` comes back at the end."""
    tune_allocator(mmap_threshold=32 << 20, trim_threshold=64 << 20, top_pad=128 << 10)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.backends.cudnn.deterministic = False
    try:
        yield
    finally:
        set_precision("fp32")
        tune_allocator()


@contextmanager
def stock_layers(unet: UNet2DConditionModel) -> Iterator[None]:
    """The UNet with the attention processors and feed-forward layers that diffusers gives it; its
    own come back at the end."""
    own = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor2_0())
    replace_feed_forward(unet, BlockedFeedForward, FeedForward)
    try:
        yield
    finally:
        unet.set_attn_processor(own)
        replace_feed_forward(unet)


def batch_losses(
    unet: UNet2DConditionModel,
    alpha_bars: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
) -> torch.Tensor:
    """|| epsilon - prediction ||^2 of each sample, mean over pixels: [batch] float32. The target is
    the noise whatever the model's prediction type, and embeddings [batch, tokens, features] are one
    a sample."""
    alpha_bar = alpha_bars[timesteps][:, None, None, None]
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    prediction = unet(noisy, timesteps, encoder_hidden_states=embeddings).sample
    return (prediction - noise).square().mean(dim=(1, 2, 3))


def take_batch(
    training_set: TrainingSet, rows: np.ndarray, grid: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and embeddings of a batch of rows (as is, then mirrored), on the device;
    row, then timestep."""
    views, images = np.divmod(rows, len(training_set))
    latents, embeddings = (
        torch.from_numpy(np.asarray(array, np.float32))
        .to(device)
        .repeat_interleave(len(grid), dim=0)
        for array in (training_set.latents[views, images], training_set.embeddings[images, 0])
    )
    return latents, torch.tensor(grid, device=device).repeat(len(rows)), embeddings


@torch.no_grad()
def published_losses(
    unet: UNet2DConditionModel,
    alpha_bars: torch.Tensor,
    training_set: TrainingSet,
    grid: Sequence[int],
    batch_size: int,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Losses [2N] float32, all images as is, then all mirrored; the noise of a batch from a
    generator on the device, seeded by the batch's index. progress(count) is told of finished
    samples."""
    rows_a_batch, losses = batch_size // len(grid), []
    all_rows = np.arange(training_set.latents.shape[0] * len(training_set))
    for index, rows in enumerate(
        np.split(all_rows, np.arange(rows_a_batch, len(all_rows), rows_a_batch))
    ):
        latents, timesteps, embeddings = take_batch(training_set, rows, grid, unet.device)
        noise = batch_noise(index, latents.shape, unet.device)
        each = batch_losses(unet, alpha_bars, latents, noise, timesteps, embeddings)
        losses.append(each.reshape(len(rows), len(grid)).mean(dim=1).cpu())
        progress(len(latents))
    return torch.cat(losses).numpy()


def published_step(
    unet: UNet2DConditionModel,
    parameters: dict[str, torch.nn.Parameter],
    alpha_bars: torch.Tensor,
    latent: torch.Tensor,
    embedding: torch.Tensor,
    fisher: Mapping[str, torch.Tensor],
    rate: float,
    batch_size: int,
    accum_steps: int,
) -> None:
    """One Newton step on a query, noise and timesteps unseeded and no damping; the weights are
    restored at the end, for only its cost is wanted. latent: [C, h, w], embedding: [tokens,
    features]; fisher: {name: tensor}."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with replaced_weights(
        unet, {name: value.detach().clone() for name, value in parameters.items()}
    ):
        for _ in range(accum_steps):
            noise = torch.randn((batch_size, *latent.shape), device=unet.device)
            timesteps = torch.randperm(len(alpha_bars), device=unet.device)[:batch_size]
            losses = batch_losses(
                unet,
                alpha_bars,
                latent.expand_as(noise),
                noise,
                timesteps,
                embedding.expand(batch_size, -1, -1),
            )
            (losses.mean() / accum_steps).backward()
        for name, parameter in parameters.items():
            gradient = cast(torch.Tensor, parameter.grad)  # there since `backward`
            parameter.data.add_(gradient / fisher[name].to(parameter), alpha=rate)
            parameter.grad = None
    for parameter in parameters.values():
        parameter.requires_grad_(False)
