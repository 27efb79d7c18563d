"""Stable Diffusion XL, its base model: two text encoders, a pooled text, and six time ids that tell
the UNet of each picture how large it was and where it was cropped."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ...datasets.encoders import crop_square
from ..text_weights import KeysValues
from .checks import check_channels, check_scaling
from .interface import Parts, Refuse
from .stable_diffusion import StableDiffusion, check_width
from .texts import check_clip, check_same_limit, check_tokens, read_tokens, tokenize

ADDED = {"pooled": "text_embeds", "time_ids": "time_ids"}  # conditioning -> the UNet's name of it
NUM_TIME_IDS = 6
NOT_USED = ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type")


class StableDiffusionXL(StableDiffusion):
    name = "Stable Diffusion XL"
    can_be_customized = False
    follows_clip_skip = False
    learns_words = True
    is_stored_by_image = False
    encoders_in_files = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    # Not `sample`: diffusers' training script and its schedulers do not mean the same by it.
    predictions = ("epsilon", "v_prediction")
    of_sizes = ("time_ids",)

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return "unet" in classes and "text_encoder_2" in classes

    def check_classes(self, classes: Mapping[str, str], refuse: Refuse) -> None:
        if "text_encoder" not in classes:
            refuse(
                "it has the second text encoder alone, as the refiner of Stable Diffusion XL has, "
                "which only changes pictures; give the base model, which makes them"
            )

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_channels(parts, which, refuse)
        for encoder, tokenizer in self.encoders.items():
            check_clip(parts, encoder, refuse)
            check_tokens(parts, encoder, tokenizer, refuse)
        check_same_limit(parts, refuse)
        texts = parts.texts.values()
        check_width(
            parts,
            which,
            "text encoders' together",
            sum(each["hidden_size"] for each in texts),
            refuse,
        )
        self.check_added(parts, which, refuse)
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)
        if parts.vae.get("latents_mean") is not None:
            refuse(
                "its latents are normalised by latents_mean and latents_std, as Playground 2.5's "
                "are, which is trained in another way than Stable Diffusion XL"
            )

    def check_added(self, parts: Parts, which: str, refuse: Refuse) -> None:
        """The part of `check_fit` that concerns pooled text and time ids."""
        kind, pooled = parts.denoiser.get("addition_embed_type"), pooled_size(parts)
        if kind != "text_time":
            refuse(
                f"{which} has the addition_embed_type {kind!s:.40}; expected text_time, as Stable "
                f"Diffusion XL's UNet has"
            )
        if needs := [key for key in NOT_USED if parts.denoiser.get(key) is not None]:
            refuse(
                f"{which} takes more than Stable Diffusion XL's ({needs[0]} is "
                f"{parts.denoiser[needs[0]]!s:.40})"
            )
        size = parts.denoiser.get("addition_time_embed_dim")
        given = parts.denoiser.get("projection_class_embeddings_input_dim")
        if not isinstance(size, int) or given != pooled + NUM_TIME_IDS * size:
            refuse(
                f"{which} takes {given!s:.20} numbers of pooled text and time ids, its second text "
                f"encoder gives {pooled} and six time ids {size!s:.20} each: they are of different "
                f"models (the refiner takes five time ids)"
            )

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        added = repeat_texts({name: conditioning[name] for name in ADDED}, len(noisy))
        return {
            **super().inputs(denoiser, noisy, times, conditioning, keys_values),
            "added_cond_kwargs": {name: added[own] for own, name in ADDED.items()},
        }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The last but one hidden states of both text encoders, side by side, and the second one's
        pooled text."""
        states, pooled = [], torch.empty(0)
        for encoder, tokenizer in self.encoders.items():
            module, limit = (
                getattr(pipeline, encoder),
                getattr(pipeline, tokenizer).model_max_length,
            )
            tokens = read_tokens(pipeline, encoder, tokenizer, prompts, limit).input_ids
            output = module(tokens.to(module.device), output_hidden_states=True)
            states.append(output.hidden_states[-2].float().cpu())
            pooled = output[0].float().cpu()
        return {TEXT: torch.cat(states, dim=-1), "pooled": pooled}

    def encode_empty(self, pipeline: Any) -> dict[str, torch.Tensor]:
        """The empty prompt's, or zeros where the pipeline's configuration says so."""
        empty = self.encode_prompts(pipeline, [""])
        if not pipeline.config.get("force_zeros_for_empty_prompt", True):
            return empty
        return {name: torch.zeros_like(tensor) for name, tensor in empty.items()}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        first, second = pipeline.tokenizer, pipeline.tokenizer_2
        return {
            "tokens": tokenize(first, prompts, first.model_max_length),
            "tokens_2": tokenize(second, prompts, second.model_max_length),
        }

    def encode_sizes(
        self, pipeline: Any, sizes: Sequence[tuple[int, int]], resolution: int
    ) -> dict[str, torch.Tensor]:
        """Time ids [n, 6]: height and width of the picture's file, upright; top and left of the
        square that is cut out of its centre, in pixels of the picture whose shorter side was brought
        to `resolution`; height and width of what is trained on, `resolution` both.

        So does diffusers' training example with --center_crop, and so is a picture that is a square
        of that size already, or one that the model made, (resolution, resolution, 0, 0, resolution,
        resolution), as its pipeline has it. A mirrored view has the ids of the picture itself.
        """
        rows = []
        for width, height in sizes:
            _, (left, top) = crop_square((width, height), resolution)
            rows.append([height, width, top, left, resolution, resolution])
        return {"time_ids": torch.tensor(rows, dtype=torch.float32)}

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        width = sum(text["hidden_size"] for text in parts.texts.values())
        return {
            TEXT: (parts.tokens["tokenizer"].limit, width),
            "pooled": (pooled_size(parts),),
            "time_ids": (NUM_TIME_IDS,),
        }


def pooled_size(parts: Parts) -> int:
    """Numbers of the second text encoder's pooled text."""
    return parts.texts["text_encoder_2"]["projection_dim"]
