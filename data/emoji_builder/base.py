"""Trains the base text-to-image model: tokenizer, text encoder and UNet, from scratch, on the base
captions."""

import copy
import json

import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .training import Progress, batch_generator, load_checkpoint, save_checkpoint

TOKEN_LENGTH, VOCABULARY_SIZE, TEXT_SIZE = 24, 1200, 80
UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    layers_per_block=1,
    block_out_channels=(64, 96),
    down_block_types=("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2,
    mid_block_type="UNetMidBlock2DCrossAttn",
    cross_attention_dim=TEXT_SIZE,
    attention_head_dim=4,
    norm_num_groups=16,
)
SCHEDULE = dict(
    num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
)
STEPS, DECAY_STEPS, BATCH_SIZE, LEARNING_RATE = 13500, 4000, 64, 1e-3
CAPTION_DROPOUT, AVERAGE_DECAY = 0.1, 0.9995  # dropped captions make classifier-free guidance work


def train_tokenizer(captions):
    """A CLIP tokenizer (byte-level BPE) of the captions; every printable ASCII letter is in its
    alphabet."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer()
    alphabet = [chr(code) for code in range(33, 127)]
    backend = tokenizer.backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(list(captions) + alphabet, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TOKEN_LENGTH)


def make_text_encoder(tokenizer):
    """A small CLIP text encoder with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_SIZE,
            intermediate_size=4 * TEXT_SIZE,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKEN_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer, captions):
    """Token ids [len(captions), TOKEN_LENGTH], padded and cut."""
    return tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=TOKEN_LENGTH,
        return_tensors="pt",
    ).input_ids


def epsilon_loss(unet, scheduler, latents, embeddings, generator):
    """Mean squared error of the predicted noise, at random timesteps."""
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.randint(
        0, scheduler.config.num_train_timesteps, (len(latents),), generator=generator
    )
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
    return F.mse_loss(predicted, noise)


def train_base(latents, captions, checkpoint_path, seed=0):
    """Trains UNet and text encoder together and keeps an exponential average of their weights.

    latents: [2, N, 4, 8, 8] scaled, as is and mirrored. Returns (tokenizer, text_encoder, unet),
    averaged weights.
    """
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions)
    model = torch.nn.ModuleDict(
        {"text_encoder": make_text_encoder(tokenizer), "unet": UNet2DConditionModel(**UNET)}
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01
    )
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)
    tokens, empty = tokenize(tokenizer, captions), tokenize(tokenizer, [""])
    modules = {"model": model, "average": average}
    start, running = load_checkpoint(checkpoint_path, modules, optimizer), None
    for step in Progress(range(start, STEPS), "base model"):
        rate = min(1, (step + 1) / 500, (STEPS - step) / DECAY_STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate
        generator = batch_generator(seed, step)
        index = torch.randint(len(captions), (BATCH_SIZE,), generator=generator)
        mirrored = torch.randint(2, (BATCH_SIZE,), generator=generator)
        dropped = torch.rand(BATCH_SIZE, generator=generator) < CAPTION_DROPOUT
        batch_tokens = torch.where(dropped[:, None], empty, tokens[index])
        embeddings = model["text_encoder"](batch_tokens).last_hidden_state
        loss = epsilon_loss(
            model["unet"], scheduler, latents[mirrored, index], embeddings, generator
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if (step + 1) % 500 == 0 or step + 1 == STEPS:
            save_checkpoint(checkpoint_path, modules, optimizer, step + 1)
            print(f"base model step {step + 1}: loss {running:.4f}", flush=True)
    return tokenizer, average["text_encoder"].eval(), average["unet"].eval()


def make_pipeline(vae, tokenizer, text_encoder, unet):
    """A stock StableDiffusionPipeline of the trained parts."""
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
