"""Images to latents, prompts to embeddings."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from .pictures import load_image


class Encoder(Protocol):
    """What pictures and captions are encoded by: a `models.pipelines.Model`, a package above."""

    @property
    def pipeline(self) -> Any:
        """Its VAE, tokenizer and text encoder."""

    @property
    def own_resolution(self) -> int | None:
        """Pixels of a side of the pictures that it was trained on."""

    def resolution(self, settings: dict) -> int:
        """Pixels of a side of the square that a data root's pictures are brought to."""
        ...

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w)."""
        ...

    @property
    def embedding_shape(self) -> tuple[int, int]:
        """(tokens, features)."""
        ...


def transform_image(image: Image.Image, resolution: int, mirrored: bool = False) -> torch.Tensor:
    """RGB image to pixels [3, resolution, resolution] float32 in [-1, 1].

    The shorter side is resized (bilinear) to `resolution`, the longer one in proportion, floored;
    the centre is cropped with rounded offsets; mirroring comes last, before encoding. Source:
    [AbU]'s published transform.
    """
    width, height = image.size
    if width <= height:
        size = resolution, int(resolution * height / width)
    else:
        size = int(resolution * width / height), resolution
    image = image.resize(size, Image.Resampling.BILINEAR)
    left, top = int(round((size[0] - resolution) / 2.0)), int(round((size[1] - resolution) / 2.0))
    pixels = (
        np.asarray(image.crop((left, top, left + resolution, top + resolution)), np.float32) / 127.5
        - 1
    )
    return torch.from_numpy(pixels[:, ::-1].copy() if mirrored else pixels).permute(2, 0, 1)


@torch.no_grad()
def encode_pixels(pipeline: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents [n, C, h, w] float32 on the CPU of pixels [n, 3, H, W]: the posterior's mean, scaled
    for the denoiser. The mean, not a sample: losses before and after unlearning must differ by the
    model alone."""
    vae = pipeline.vae
    latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return ((latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor).cpu()


def encode_images(
    pipeline: Any,
    paths: Sequence[str | Path],
    resolution: int,
    mirrored: bool = False,
    batch_size: int = 20,
) -> torch.Tensor:
    """Latents [len(paths), C, h, w] of image files, `batch_size` at a time."""
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    return torch.cat(
        [
            encode_pixels(
                pipeline,
                torch.stack(
                    [transform_image(load_image(path), resolution, mirrored) for path in batch]
                ),
            )
            for batch in batches
        ]
    )


@torch.no_grad()
def encode_prompts(pipeline: Any, prompts: Iterable[str]) -> torch.Tensor:
    """Embeddings [n, tokens, features] float32 on the CPU: prompts padded and cut to the
    tokenizer's length, the last hidden state of the text encoder."""
    tokens = pipeline.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    known = len(pipeline.text_encoder.get_input_embeddings().weight)
    for prompt, row in zip(prompts, tokens) if int(tokens.max()) >= known else ():
        if int(row.max()) >= known:
            token = pipeline.tokenizer.convert_ids_to_tokens(int(row.max()))
            raise UserError(
                f"prompt {prompt!a:.80}: the tokenizer knows {token!s:.40}, the text encoder has "
                f"no embedding of it"
            )
    return (
        pipeline.text_encoder(tokens.to(pipeline.text_encoder.device))
        .last_hidden_state.float()
        .cpu()
    )


def count_tokens(tokenizer: Any, prompts: Iterable[str]) -> list[int]:
    """How many tokens each prompt has before it is cut, those of its beginning and end among
    them."""
    return [
        len(tokens)
        for tokens in tokenizer(
            list(prompts), padding=False, truncation=False, verbose=False
        ).input_ids
    ]


def find_unknown(tokenizer: Any, texts: Collection[str]) -> list[tuple[bool, bool]]:
    """Of each text, (whether a tokenizer does not know some of it, whether it knows nothing else of
    it). Byte-level vocabularies that are whole know everything. CLIP's unknown token is also its
    padding: a text that is unknown throughout is read as the empty one."""
    found = []
    for text, tokens in zip(
        texts,
        tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else [],
    ):
        num_unknown = tokens.count(tokenizer.unk_token_id)
        is_unknown = num_unknown > (text.count(tokenizer.unk_token) if num_unknown else 0)
        found.append((is_unknown, is_unknown and num_unknown == len(tokens)))
    return found
