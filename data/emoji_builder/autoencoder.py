"""Trains the small VAE and centres its latents."""

import math

import torch
from diffusers import AutoencoderKL

from .training import (
    Progress,
    batch_generator,
    flip_half,
    load_checkpoint,
    save_checkpoint,
)

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    sample_size=32,
    layers_per_block=1,
    norm_num_groups=8,
    block_out_channels=(32, 48, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
)
STEPS, BATCH_SIZE, LEARNING_RATE, KL_WEIGHT = 2500, 32, 1e-3, 1e-5


def vary_colours(pixels, generator):
    """Permutes the channels of a third of the images and inverts a sixth, so that the VAE can also
    draw what the base training set lacks (styles, other colours). pixels: [batch, 3, h, w] in [-1,
    1]."""
    pixels = pixels.clone()
    for image in pixels:
        choice = torch.rand((), generator=generator)
        if choice < 1 / 3:
            image.copy_(image[torch.randperm(3, generator=generator)])
        elif choice < 1 / 2:
            image.neg_()
    return pixels


def train_autoencoder(pixels, checkpoint_path, seed=0):
    """Trains on pixels [N, 3, 32, 32] in [-1, 1]: absolute plus squared error, a little KL, cosine
    learning rate."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0
    )
    start = load_checkpoint(checkpoint_path, {"vae": vae}, optimizer)
    for step in Progress(range(start, STEPS), "vae"):
        optimizer.param_groups[0]["lr"] = (
            LEARNING_RATE * min(1, step / 100) * 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 1e-6
        )
        generator = batch_generator(seed, step)
        batch = pixels[torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)]
        batch = vary_colours(flip_half(batch, generator), generator)
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - batch
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == STEPS:
            save_checkpoint(checkpoint_path, {"vae": vae}, optimizer, step + 1)
            print(
                f"vae step {step + 1}: |error| {error.abs().mean():.4f} squared "
                f"{error.square().mean():.5f}",
                flush=True,
            )
    return vae.eval()


@torch.no_grad()
def centre_latents(vae, pixels):
    """Folds the latents' mean into the 1x1 convolutions beside the bottleneck and sets
    `scaling_factor` to one over their standard deviation: what SD's pipelines see has mean 0 and
    deviation 1. In place; decoding is unchanged."""
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in pixels.split(100)])
    mean = latents.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[:4] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(
        scaling_factor=round(1 / (latents - mean[:, None, None]).std().item(), 6)
    )
