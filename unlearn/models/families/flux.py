"""FLUX.1, dev and schnell: T5 for the text, CLIP for a pooled one, and a transformer over packed
latents, 2 x 2 of them in one position."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ...errors import UserError
from ..text_weights import KeysValues, StreamWeights
from .checks import check_colours, check_scaling, check_transformer
from .flow import SELECTIONS, name_block
from .guidance import identify_guidance, read_guidance, tell_guidance
from .interface import Original, Parts, Refuse
from .packing import Packed, pack, packed_channels
from .texts import check_clip, check_tokens, read_tokens, tokenize

T5_TOKENS = 512
# Layers by the names of the authors' code, which joins queries, keys and values, and of a single block
# what reads the same input.
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
OUTSIDE = {  # of blocks
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
# XLabs' LoRA name their own layers beside the attention's
XLABS_DOUBLE = {
    "processor.qkv_lora1": DOUBLE["img_attn.qkv"],
    "processor.proj_lora1": DOUBLE["img_attn.proj"],
    "processor.qkv_lora2": DOUBLE["txt_attn.qkv"],
    "processor.proj_lora2": DOUBLE["txt_attn.proj"],
}
XLABS_SINGLE = {"processor.qkv_lora": SINGLE["linear1"][:3], "processor.proj_lora": ("proj_out",)}


class Flux(Packed):
    name = "FLUX.1"
    denoiser = "transformer"
    classes = {"transformer": ("FluxTransformer2DModel",), "vae": ("AutoencoderKL",)}
    encoders = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    encoders_in_files = {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
    learns_words = True
    # Of the double blocks: in single blocks text and image share keys and values.
    selections = SELECTIONS
    text = StreamWeights()
    # kohya numbers T5 as in Stable Diffusion 3, OneTrainer by its place.
    trainers_encoders = {
        "te": "text_encoder",
        "te1": "text_encoder",
        "te2": "text_encoder_2",
        "te3": "text_encoder_2",
    }

    def originals(self, denoiser: Any) -> dict[str, Original]:
        swapped = Original(("norm_out.linear",), is_swapped=True)
        names = {"final_layer.adaLN_modulation.1": swapped}
        names |= {name: Original((layer,)) for name, layer in OUTSIDE.items()}
        for kind, tables in (
            ("", DOUBLE | XLABS_DOUBLE),
            ("single_", SINGLE | XLABS_SINGLE),
        ):
            for number in range(len(getattr(denoiser, f"{kind}transformer_blocks"))):
                names |= name_block(
                    f"{kind or 'double_'}blocks.{number}",
                    f"{kind}transformer_blocks.{number}",
                    tables,
                )
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        return name_norms(denoiser)

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == "FluxPipeline"

    def identity(self, pipeline: Any) -> dict:
        return {**super().identity(pipeline), **identify_guidance(pipeline)}

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        check_clip(parts, "text_encoder", refuse)
        for encoder, tokenizer in self.encoders.items():
            check_tokens(parts, encoder, tokenizer, refuse)
        packed = packed_channels(parts.vae.get("latent_channels"))
        texts = {encoder: text["hidden_size"] for encoder, text in parts.texts.items()}
        expected = {
            "in_channels": (packed, "its VAE's latents make, packed,"),
            "joint_attention_dim": (texts["text_encoder_2"], "its second text encoder gives"),
            "pooled_projection_dim": (texts["text_encoder"], "its text encoder gives"),
        }
        check_transformer(parts, which, expected, refuse)
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

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
            "guidance": read_guidance(denoiser, told, noisy),
            "encoder_hidden_states": told[TEXT],
            "pooled_projections": told["pooled"],
            "txt_ids": torch.zeros(told[TEXT].shape[1], 3, device=noisy.device),
            "img_ids": FluxPipeline._prepare_latent_image_ids(
                number, height // 2, width // 2, noisy.device, noisy.dtype
            ),
        }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """T5's last hidden states, and CLIP's pooled text."""
        clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
        limit = pipeline.tokenizer.model_max_length
        short = read_tokens(pipeline, "text_encoder", "tokenizer", prompts, limit).input_ids
        limit = t5_limit(pipeline.tokenizer_2.model_max_length)
        long = read_tokens(pipeline, "text_encoder_2", "tokenizer_2", prompts, limit).input_ids
        return {
            TEXT: t5(long.to(t5.device))[0].float().cpu(),
            "pooled": clip(short.to(clip.device)).pooler_output.float().cpu(),
        }

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        tokenizer, limit = self.reader(pipeline)
        own = pipeline.tokenizer
        return {
            "tokens": tokenize(own, prompts, own.model_max_length),
            "tokens_2": tokenize(tokenizer, prompts, limit),
        }

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer_2, t5_limit(pipeline.tokenizer_2.model_max_length)

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        tokens = t5_limit(parts.tokens["tokenizer_2"].limit)
        return {
            TEXT: (tokens, parts.denoiser["joint_attention_dim"]),
            "pooled": (parts.denoiser["pooled_projection_dim"],),
        }

    def guide(
        self, pipeline: Any, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Conditioning, None]:
        """The guidance is something that the model is told; there is no second pass."""
        if pipeline.transformer.config.guidance_embeds:
            return tell_guidance(conditioning, guidance_scale), None
        if guidance_scale != 1:
            raise UserError(
                f"guidance {guidance_scale}: this model of {self.name} takes none (its "
                f"guidance_embeds is false, as in schnell); give 1"
            )
        return conditioning, None


def name_norms(denoiser: Any) -> dict[str, str]:
    """Weights of the norms of queries and keys of a FLUX transformer, by their names in the authors'
    code."""
    names = {}
    for kind, norms in (("", DOUBLE_NORMS), ("single_", SINGLE_NORMS)):
        for number in range(len(getattr(denoiser, f"{kind}transformer_blocks"))):
            names |= {
                f"{kind or 'double_'}blocks.{number}.{name}.scale": (
                    f"{kind}transformer_blocks.{number}.{own}.weight"
                )
                for name, own in norms.items()
            }
    return names


def t5_limit(limit: int | None) -> int:
    """How many tokens T5 reads, where its tokenizer says that it reads `limit`."""
    return min(T5_TOKENS, limit or T5_TOKENS)
