"""Customized models: K and V of the cross-attention and one new token, tuned on a few exemplars;
their queries."""

import torch
from diffusers import PNDMScheduler

from .base import SCHEDULE, epsilon_loss, tokenize
from .training import Progress, batch_generator

TOKEN = "<new1>"
STEPS, BATCH_SIZE, WEIGHT_RATE, TOKEN_RATE = 1000, 32, 2e-3, 1e-2
BASE_SHARE = 0.25  # share of a batch that repeats base images, so that the model keeps what it knew
GUIDANCE, SAMPLING_STEPS = 3.0, 50


def kv_parameters(unet):
    """K and V of the cross-attention, by name."""
    return {
        name: value
        for name, value in unet.named_parameters()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }


def add_token(pipeline):
    """Adds the new token to tokenizer and text encoder; its embedding starts as the mean of all.
    Returns its id."""
    embeddings = pipeline.text_encoder.get_input_embeddings().weight
    start = embeddings.detach().mean(dim=0)
    if pipeline.tokenizer.add_tokens([TOKEN]):
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    index = pipeline.tokenizer.convert_tokens_to_ids(TOKEN)
    pipeline.text_encoder.get_input_embeddings().weight.data[index] = start
    return index


def train_customized(pipeline, exemplars, prompt, base_latents, base_captions, seed, name):
    """Tunes K, V and the token's embedding of `pipeline` in place.

    exemplars: [2, n, C, h, w] latents, as is and mirrored; base_latents: [2, N, C, h, w]. Returns
    ({parameter: weight}, {token: embedding}).
    """
    token = add_token(pipeline)
    unet = pipeline.unet.requires_grad_(False)
    text_encoder = pipeline.text_encoder.requires_grad_(False)
    weights, embeddings = kv_parameters(unet), text_encoder.get_input_embeddings().weight
    for value in [*weights.values(), embeddings]:
        value.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(weights.values()), "lr": WEIGHT_RATE},
            {"params": [embeddings], "lr": TOKEN_RATE},
        ],
        weight_decay=0,
    )
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)
    tokens = tokenize(pipeline.tokenizer, [prompt])
    base_tokens = tokenize(pipeline.tokenizer, base_captions)
    num_base = int(BASE_SHARE * BATCH_SIZE)
    for step in Progress(range(STEPS), name):
        generator = batch_generator(seed, step)
        mirrored, index = (
            torch.randint(size, (BATCH_SIZE - num_base,), generator=generator)
            for size in (2, exemplars.shape[1])
        )
        base_mirrored, base_index = (
            torch.randint(size, (num_base,), generator=generator)
            for size in (2, len(base_captions))
        )
        latents = torch.cat([exemplars[mirrored, index], base_latents[base_mirrored, base_index]])
        batch_tokens = torch.cat([tokens.expand(len(index), -1), base_tokens[base_index]])
        optimizer.zero_grad()
        epsilon_loss(
            unet, scheduler, latents, text_encoder(batch_tokens).last_hidden_state, generator
        ).backward()
        others = torch.arange(len(embeddings)) != token
        embeddings.grad[others] = 0  # only the new token learns
        optimizer.step()
    return (
        {key: value.detach().half() for key, value in weights.items()},
        {TOKEN: embeddings.detach()[token].clone()},
    )


def load_customized(pipeline, weights, tokens):
    """Gives `pipeline`, in place, what `train_customized` returned."""
    index = add_token(pipeline)
    pipeline.text_encoder.get_input_embeddings().weight.data[index] = tokens[TOKEN]
    pipeline.unet.load_state_dict(
        {key: value.float() for key, value in weights.items()}, strict=False
    )


def make_queries(pipeline, prompts, seed):
    """One image a prompt from a customized pipeline, its noise seeded by (seed, number)."""
    images = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        images.append(
            pipeline(
                prompt,
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE,
                generator=generator,
            ).images[0]
        )
    return images
