"""Qwen-Image: the language model Qwen2.5-VL for the text, in a message that asks it to describe a
picture, a VAE made for films, of which a picture is one frame, and a transformer over packed latents
whose blocks join text and image."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..text_weights import KeysValues, StreamWeights
from .checks import check_transformer
from .flow import ATTENTION, SELECTIONS
from .interface import Parts, Refuse
from .packing import Standardised, pack, packed_channels, unpack
from .texts import check_tokens, count_read, read_tokens, tokenize

# The message around a prompt, and its tokens before the prompt, whose states are not used. Source:
# diffusers' QwenImagePipeline.
MESSAGE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    "{}<|im_end|>\n<|im_start|>assistant\n"
)
BEFORE = 34
TOKENS = 512  # of the rest: as many as pipeline and training example take where nobody says more
NO_PROMPT = " "  # what guidance leads away from. Source: the model's card
OTHERS = {  # flags of transformers of this class that are told more than a text, and whose they are
    "zero_cond_t": "Qwen-Image-Edit, which takes a picture beside the text",
    "use_additional_t_cond": "Qwen-Image-Layered, which takes a picture apart",
    "use_layer3d_rope": "Qwen-Image-Layered, which takes a picture apart",
    "guidance_embeds": "a distilled model that is told a guidance, as none was published",
}


class QwenImage(Standardised):
    name = "Qwen-Image"
    denoiser = "transformer"
    classes = {
        "transformer": ("QwenImageTransformer2DModel",),
        "vae": ("AutoencoderKLQwenImage",),
        "text_encoder": ("Qwen2_5_VLForConditionalGeneration",),
    }
    encoders = {"text_encoder": "tokenizer"}
    selections = SELECTIONS
    text = StreamWeights()
    longest = BEFORE + TOKENS
    lora_targets = {
        "attention": ATTENTION,
        "linear": rf"{ATTENTION}|\.(img|txt)_(mlp\.net\.(0\.proj|2)|mod\.1)$",
    }

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == "QwenImagePipeline"

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        for flag, whose in OTHERS.items():
            if parts.denoiser.get(flag):
                refuse(f"{which} has {flag}: it is that of {whose}; supported is {self.name}")
        check_tokens(parts, "text_encoder", "tokenizer", refuse, self.longest)
        if count_tokens(limit := parts.tokens["tokenizer"].limit) < 1:
            refuse(
                f"its tokenizer's model_max_length: expected more than {BEFORE}, the tokens before a "
                f"prompt, found {limit!s:.40}"
            )
        channels, width = parts.vae.get("z_dim"), parts.texts["text_encoder"]["hidden_size"]
        expected = {
            "in_channels": (packed_channels(channels), "its VAE's latents make, packed,"),
            "out_channels": (channels, "its VAE's latents have"),
            "joint_attention_dim": (width, "its text encoder gives"),
            "patch_size": (self.patch, "expected"),
        }
        check_transformer(parts, which, expected, refuse)
        self.check_schedule(parts, refuse)
        check_vae(parts.vae, refuse)

    def unread(self, denoiser: Any) -> str:
        """What the last block makes of the text, which is dropped after it, but for keys and
        values."""
        last = len(denoiser.transformer_blocks) - 1
        queries = r"attn\.(add_q_proj|norm_added_q|to_add_out)"
        return rf"^transformer_blocks\.{last}\.({queries}|txt_mlp\..*)\."

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        told = repeat_texts(conditioning, len(noisy))
        number, _, height, width = noisy.shape
        return {
            "hidden_states": pack(noisy),
            "timestep": times / 1000,  # the transformer multiplies by 1000 again
            "encoder_hidden_states": told[TEXT],
            "encoder_hidden_states_mask": told["mask"].bool(),
            "img_shapes": [[(1, height // 2, width // 2)]] * number,
        }

    # The VAE: of films of one frame.

    def latent_channels(self, parts: Parts) -> int:
        return parts.vae["z_dim"]

    def pixels_a_latent(self, vae: Mapping[str, Any]) -> int | None:
        halvings = vae.get("temperal_downsample")
        return 2 ** len(halvings) if isinstance(halvings, (list, tuple)) else None

    def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_pixels(vae, pixels[:, :, None])[:, :, 0]

    def decode_latents(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        return super().decode_latents(vae, latents[:, :, None])[:, :, 0]

    def scaling(self, vae: Any) -> list:
        return [list(vae.config.latents_mean), list(vae.config.latents_std)]

    def statistics(self, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, 1, 1] each."""
        config = vae.config
        mean, deviation = (
            torch.tensor(numbers, dtype=latents.dtype, device=latents.device)[:, None, None]
            for numbers in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    # The text.

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Last hidden states of prompt and end of the message, zeros after them, and a mask of which
        there are."""
        encoder, (_, tokens) = pipeline.text_encoder, self.reader(pipeline)
        how = pipeline, "text_encoder", "tokenizer", write(prompts), BEFORE + tokens
        read = read_tokens(*how).to(encoder.device)
        states = encoder.model(**read).last_hidden_state.float().cpu()
        texts = torch.zeros(len(states), tokens, states.shape[-1])
        mask = torch.zeros(len(states), tokens)
        for row, (own, there) in enumerate(zip(states, read.attention_mask.cpu().bool())):
            kept = own[there][BEFORE:]  # wherever this tokenizer pads
            texts[row, : len(kept)], mask[row, : len(kept)] = kept, 1
        return {TEXT: texts, "mask": mask}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        tokenizer, tokens = self.reader(pipeline)
        return {"tokens": tokenize(tokenizer, write(prompts), BEFORE + tokens)}

    def text_lengths(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        tokenizer, tokens = self.reader(pipeline)
        return [
            max(0, count - BEFORE)
            for count in count_read(tokenizer, write(prompts), BEFORE + tokens)
        ]

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, count_tokens(pipeline.tokenizer.model_max_length)

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        tokens = count_tokens(parts.tokens["tokenizer"].limit)
        return {TEXT: (tokens, parts.denoiser["joint_attention_dim"]), "mask": (tokens,)}

    # Pictures made.

    def encode_empty(self, pipeline: Any) -> dict[str, torch.Tensor]:
        return self.encode_prompts(pipeline, [NO_PROMPT])

    def mix(
        self, prediction: torch.Tensor, empty: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """As the pipeline does: brought to the length, in each position, of the text's."""
        mixed = pack(super().mix(prediction, empty, guidance_scale))
        lengths = [torch.norm(each, dim=-1, keepdim=True) for each in (pack(prediction), mixed)]
        return unpack(mixed * (lengths[0] / lengths[1]), prediction.shape)


def write(prompts: Sequence[str]) -> list[str]:
    """The messages of prompts."""
    return [MESSAGE.format(prompt) for prompt in prompts]


def count_tokens(limit: int | None) -> int:
    """How many tokens after BEFORE are read, where the tokenizer says that it reads `limit`."""
    return min(TOKENS, (limit or TOKENS + BEFORE) - BEFORE)


def check_vae(vae: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuses a VAE of other than coloured pictures, or whose latents have no mean and deviation."""
    if (colours := vae.get("input_channels")) != 3:
        refuse(f"its VAE takes {colours!s:.20} channels; expected 3, a picture's")
    for key in ("latents_mean", "latents_std"):
        numbers = vae.get(key)
        if (
            not isinstance(numbers, (list, tuple))
            or len(numbers) != vae.get("z_dim")
            or not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers)
            or (key == "latents_std" and min(numbers, default=0) <= 0)
        ):
            refuse(
                f"its VAE's {key}: expected a number for each of {vae.get('z_dim')!s:.20} channels, "
                f"found {numbers!r:.80}"
            )
