"""Stable Diffusion 3 and 3.5, medium and large: two CLIP text encoders and T5, which may be left
out, and a transformer whose blocks join text and image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..text_weights import KeysValues, StreamWeights
from .checks import check_colours, check_scaling, check_transformer
from .flow import SELECTIONS, Flow, logit_normal, name_block
from .interface import Original, Parts, Refuse
from .texts import check_clip, check_tokens, read_tokens, tokenize

T5_TOKENS = 77  # as diffusers' training example takes them; its pipeline, 256
CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# Layers by the names of the authors' code, which joins queries, keys and values.
X_BLOCK = {
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
CONTEXT_BLOCK = {
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.proj": ("attn.to_add_out",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
    "adaLN_modulation.1": ("norm1_context.linear",),
}
NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
}
OUTSIDE = {  # of blocks
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
SWAPPED = "adaLN_modulation.1"  # of the last text block and the final layer: scale before shift


class StableDiffusion3(Flow):
    name = "Stable Diffusion 3"
    denoiser = "transformer"
    classes = {"transformer": ("SD3Transformer2DModel",), "vae": ("AutoencoderKL",)}
    encoders = {**CLIPS, "text_encoder_3": "tokenizer_3"}
    optional = ("text_encoder_3", "tokenizer_3")
    encoders_in_files = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        "text_encoder_3": "t5xxl",
    }
    unprojected = ("text_encoder",)
    learns_words = True
    selections = SELECTIONS  # not `attn2`: in 3.5 medium that is self-attention of the image
    text = StreamWeights()
    density = staticmethod(logit_normal)
    patch = 2

    def originals(self, denoiser: Any) -> dict[str, Original]:
        names = {name: Original((layer,)) for name, layer in OUTSIDE.items()}
        last = len(denoiser.transformer_blocks) - 1
        for number in range(last + 1):
            block = f"transformer_blocks.{number}"
            names |= name_block(f"joint_blocks.{number}.x_block", block, X_BLOCK)
            names |= name_block(f"joint_blocks.{number}.context_block", block, CONTEXT_BLOCK)
        joined = f"transformer_blocks.{last}.norm1_context.linear"
        names[f"joint_blocks.{last}.context_block.{SWAPPED}"] = Original((joined,), True)
        names[f"final_layer.{SWAPPED}"] = Original(("norm_out.linear",), True)
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        names = {"pos_embed": "pos_embed.pos_embed"}
        for number in range(len(denoiser.transformer_blocks)):
            names |= {
                f"joint_blocks.{number}.{name}.weight": f"transformer_blocks.{number}.{own}.weight"
                for name, own in NORMS.items()
            }
        return names

    def unread(self, denoiser: Any) -> str:
        """The text's queries in the last block, after which the text is dropped; and keys' biases that add
        the same to all that are compared, in the image's own attention without norms."""
        last = len(denoiser.transformer_blocks) - 1
        queries = rf"^transformer_blocks\.{last}\.attn\.(add_q_proj|norm_added_q)\."
        return queries if denoiser.config.qk_norm else rf"{queries}|\.attn2\.to_k\.bias$"

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == "StableDiffusion3Pipeline"

    def identity(self, pipeline: Any) -> dict:
        return {**super().identity(pipeline), "loss_weight": "sigma^2"}

    def weight(self, levels: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sigma^2: diffusers' training example compares what the prediction makes of the picture,
        x_t - sigma p, with the picture (--precondition_outputs 1, its default)."""
        return levels[timesteps].square()

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        for encoder, tokenizer in CLIPS.items():
            check_clip(parts, encoder, refuse)
            check_tokens(parts, encoder, tokenizer, refuse)
        latent = parts.vae.get("latent_channels"), "its VAE's latents have"
        expected = {
            "in_channels": latent,
            "out_channels": latent,
            "patch_size": (self.patch, "expected"),
            "pooled_projection_dim": (pooled_size(parts), "its text encoders' pooled texts have"),
        }
        if "text_encoder_3" in parts.texts:
            check_tokens(parts, "text_encoder_3", "tokenizer_3", refuse)
            width = parts.texts["text_encoder_3"]["hidden_size"]
            expected["joint_attention_dim"] = (width, "its third text encoder gives")
        check_transformer(parts, which, expected, refuse)
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def most_latents(self, denoiser: Mapping[str, Any]) -> int | None:
        return denoiser["pos_embed_max_size"] * self.patch

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        told = repeat_texts(conditioning, len(noisy))
        return {
            "hidden_states": noisy,
            "timestep": times,
            "encoder_hidden_states": told[TEXT],
            "pooled_projections": told["pooled"],
        }

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The last but one hidden states of both CLIP encoders, side by side and filled up with
        zeros, then T5's last ones (zeros without it); the pooled texts side by side."""
        states, pooled = [], []
        for encoder, tokenizer in CLIPS.items():
            module, limit = (
                getattr(pipeline, encoder),
                getattr(pipeline, tokenizer).model_max_length,
            )
            tokens = read_tokens(pipeline, encoder, tokenizer, prompts, limit).input_ids
            output = module(tokens.to(module.device), output_hidden_states=True)
            states.append(output.hidden_states[-2].float().cpu())
            pooled.append(output[0].float().cpu())
        clip, width = torch.cat(states, dim=-1), pipeline.transformer.config.joint_attention_dim
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        if module := pipeline.text_encoder_3:
            limit = t5_limit(pipeline.tokenizer_3.model_max_length)
            read = read_tokens(pipeline, "text_encoder_3", "tokenizer_3", prompts, limit)
            t5 = module(read.input_ids.to(module.device))[0].float().cpu()
        else:
            t5 = torch.zeros(len(clip), T5_TOKENS, width)
        return {TEXT: torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        limit = pipeline.tokenizer.model_max_length
        tokens = {
            "tokens": tokenize(pipeline.tokenizer, prompts, limit),
            "tokens_2": tokenize(pipeline.tokenizer_2, prompts, limit),
        }
        if third := pipeline.tokenizer_3:
            tokens["tokens_3"] = tokenize(third, prompts, t5_limit(third.model_max_length))
        return tokens

    def text_lengths(self, pipeline: Any, prompts: Sequence[str]) -> list[int] | None:
        """Without T5 its tokens are zeros."""
        if pipeline.text_encoder_3:
            return None
        return [pipeline.tokenizer.model_max_length] * len(prompts)

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        if third := pipeline.tokenizer_3:
            return third, t5_limit(third.model_max_length)
        return super().reader(pipeline)

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        third = parts.tokens.get("tokenizer_3")
        num_tokens = T5_TOKENS if third is None else t5_limit(third.limit)
        tokens = parts.tokens["tokenizer"].limit + num_tokens
        return {
            TEXT: (tokens, parts.denoiser["joint_attention_dim"]),
            "pooled": (pooled_size(parts),),
        }


def t5_limit(limit: int | None) -> int:
    """How many tokens T5 reads, where its tokenizer says that it reads `limit`."""
    return min(T5_TOKENS, limit or T5_TOKENS)


def pooled_size(parts: Parts) -> int:
    """Numbers of both CLIP encoders' pooled texts."""
    return sum(parts.texts[encoder]["projection_dim"] for encoder in CLIPS)
