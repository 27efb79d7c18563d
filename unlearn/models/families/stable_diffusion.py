"""Stable Diffusion 1 and 2 and models of their kind: a UNet that reads one CLIP text encoder, and
predicts the noise, v or the latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..passes import replace_feed_forward
from ..text_attention import SharedText
from ..text_weights import KeysValues
from .betas import Betas
from .checks import check_channels, check_scaling
from .interface import UNET_SELECTIONS, Original, Parts, Refuse
from .texts import check_clip, check_tokens, read_tokens, tokenize
from .unet_names import name_layers

MORE_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)  # of a UNet
VAES = ("AutoencoderKL", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE")


class StableDiffusion(Betas):
    name = "Stable Diffusion 1 and 2"
    denoiser = "unet"
    classes = {"unet": ("UNet2DConditionModel",), "vae": VAES}
    encoders = {"text_encoder": "tokenizer"}
    can_be_customized = True
    follows_clip_skip = True
    learns_words = True
    is_stored_by_image = True
    selections = UNET_SELECTIONS
    text = SharedText()

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return not any(part in classes for part in ("transformer", "text_encoder_2"))

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_channels(parts, which, refuse)
        if needs := [key for key in MORE_INPUTS if parts.denoiser.get(key) is not None]:
            refuse(
                f"{which} takes more than noisy latents, a timestep and a text ({needs[0]} is "
                f"{parts.denoiser[needs[0]]!s:.40}), as the UNets of "
                "Stable Diffusion XL, upscalers and image variations do; supported are Stable "
                "Diffusion 1 and 2 and models of their kind"
            )
        check_clip(parts, "text_encoder", refuse)
        check_width(
            parts, which, "text encoder's", parts.texts["text_encoder"]["hidden_size"], refuse
        )
        check_tokens(parts, "text_encoder", "tokenizer", refuse)
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def prepare(self, denoiser: UNet2DConditionModel) -> None:
        super().prepare(denoiser)
        replace_feed_forward(denoiser)

    def originals(self, denoiser: Any) -> dict[str, Original]:
        return name_layers(denoiser)

    def before_text(self, denoiser: UNet2DConditionModel) -> list[Any]:
        block: Any = denoiser.down_blocks[0]  # of one of several classes
        modules = [denoiser.conv_in, *block.resnets[:1]]
        for attention in getattr(block, "attentions", ())[:1]:
            modules += [layer.attn1 for layer in getattr(attention, "transformer_blocks", ())[:1]]
        return modules

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        # With keys and values the layers look at no embeddings, which may then be one a text.
        given = {} if keys_values is None else {"keys_values": keys_values}
        texts = conditioning if given else repeat_texts(conditioning, len(noisy))
        return {
            "sample": noisy,
            "timestep": times,
            "encoder_hidden_states": texts[TEXT],
            **({"cross_attention_kwargs": given} if given else {}),
        }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The last hidden state of the text encoder: prompts padded and cut to the tokenizer's
        length."""
        encoder, limit = pipeline.text_encoder, pipeline.tokenizer.model_max_length
        tokens = read_tokens(pipeline, "text_encoder", "tokenizer", prompts, limit).input_ids
        return {TEXT: encoder(tokens.to(encoder.device)).last_hidden_state.float().cpu()}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        return {
            "tokens": tokenize(pipeline.tokenizer, prompts, pipeline.tokenizer.model_max_length)
        }

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        return {TEXT: (parts.tokens["tokenizer"].limit, parts.texts["text_encoder"]["hidden_size"])}


def check_width(parts: Parts, which: str, whose: str, width: int, refuse: Refuse) -> None:
    """Refuses a UNet that attends to texts of another width than its text encoders' have."""
    widths = parts.denoiser.get("cross_attention_dim")
    if any(one != width for one in (widths if isinstance(widths, (list, tuple)) else [widths])):
        refuse(
            f"{which} attends to texts of {widths!s:.60} features, its {whose} have {width}: they "
            f"are of different models"
        )
