"""Sana: Gemma 2 for the text, after an instruction, a VAE that brings 32 x 32 pixels to one latent, and
a transformer of linear attention, whose cross-attention reads projected captions."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..text_weights import KeysValues, StreamWeights
from .checks import check_scaling, check_transformer
from .flow import Flow, name_block
from .interface import UNET_SELECTIONS, UNET_TARGETS, Original, Parts, Refuse
from .texts import check_tokens, read_tokens, tokenize

TOKENS = 300  # that are kept of a prompt: the first one and the last ones
# What stands before every prompt but the empty one of guidance, as the pipeline has it where nobody
# says otherwise. Diffusers' training example leaves it out where nobody asks for it.
DEFAULTS = inspect.signature(SanaPipeline.__call__).parameters
INSTRUCTION = "\n".join(DEFAULTS["complex_human_instruction"].default)
BLOCK = {  # layers by the names of the authors' code
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
OUTSIDE = {  # of blocks
    "x_embedder.proj": "patch_embed.proj",
    "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
NORMS = {
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
}


class Sana(Flow):
    name = "Sana"
    denoiser = "transformer"
    classes = {
        "transformer": ("SanaTransformer2DModel",),
        "vae": ("AutoencoderDC",),
        "text_encoder": ("Gemma2Model",),
    }
    encoders = {"text_encoder": "tokenizer"}
    # Weights alone: a bias adds the same to the keys, or values, of every text.
    selections = {**UNET_SELECTIONS, "cross-attn-kv": r"\.attn2\.to_[kv]\.weight$"}
    text = StreamWeights()
    longest = 2 * TOKENS  # with the instruction
    lora_targets = {
        "attention": UNET_TARGETS["attention"],
        "linear": rf"{UNET_TARGETS['attention']}|\.ff\.conv_(inverted|point)$",
    }

    def unread(self, denoiser: Any) -> str | None:
        """The biases of the text's keys, where nothing norms these: one adds the same to the keys of
        all tokens, which attention does not see."""
        return r"\.attn2\.to_k\.bias$" if denoiser.config.qk_norm is None else None

    def originals(self, denoiser: Any) -> dict[str, Original]:
        names = {name: Original((layer,)) for name, layer in OUTSIDE.items()}
        for number in range(len(denoiser.transformer_blocks)):
            names |= name_block(f"blocks.{number}", f"transformer_blocks.{number}", BLOCK)
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        names = {
            "attention_y_norm.weight": "caption_norm.weight",
            "final_layer.scale_shift_table": "scale_shift_table",
        }
        for number in range(len(denoiser.transformer_blocks)):
            block, own = f"blocks.{number}", f"transformer_blocks.{number}"
            names[f"{block}.scale_shift_table"] = f"{own}.scale_shift_table"
            names |= {
                f"{block}.mlp.depth_conv.conv.{kind}": f"{own}.ff.conv_depth.{kind}"
                for kind in ("weight", "bias")
            }
            names |= {
                f"{block}.{name}.weight": f"{own}.{norm}.weight" for name, norm in NORMS.items()
            }
        return names

    def spare_tensors(self, denoiser: Any) -> dict[str, tuple[int | None, ...]]:
        """Positions, which are not added, and the empty prompt's embedding, which diffusers reads of
        its text encoder."""
        width = denoiser.config.caption_channels
        return {"pos_embed": (1, None, None), "y_embedder.y_embedding": (None, width)}

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == "SanaPipeline"

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        if parts.denoiser.get("guidance_embeds"):
            refuse(
                f"{which} is told a guidance (guidance_embeds), as that of SANA-Sprint, which is "
                f"trained in another way; supported is {self.name}"
            )
        check_tokens(parts, "text_encoder", "tokenizer", refuse, self.longest)
        latent = parts.vae.get("latent_channels"), "its VAE's latents have"
        width = parts.texts["text_encoder"]["hidden_size"]
        expected = {
            "in_channels": latent,
            "out_channels": latent,
            "caption_channels": (width, "its text encoder gives"),
            "patch_size": (self.patch, "expected"),
            "timestep_scale": (1, "expected"),
        }
        check_transformer(parts, which, expected, refuse)
        if (colours := parts.vae.get("in_channels")) != 3:
            refuse(f"its VAE takes {colours!s:.20} channels; expected 3, a picture's")
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def check_schedule(self, parts: Parts, refuse: Refuse) -> None:
        """Of the solver that Sana's pipelines have, too."""
        if isinstance(parts.scheduler, DPMSolverMultistepScheduler):
            config = parts.scheduler.config
            kind = config.get("prediction_type"), config.get("use_flow_sigmas")
            if kind != ("flow_prediction", True) or config.get("algorithm_type") != "dpmsolver++":
                refuse(
                    f"its scheduler has the prediction_type {kind[0]!s:.40}, use_flow_sigmas "
                    f"{kind[1]!s:.20} and algorithm_type {config.get('algorithm_type')!s:.40}; "
                    f"expected flow_prediction, true and dpmsolver++"
                )
        else:
            super().check_schedule(parts, refuse)

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
            "encoder_attention_mask": told["mask"],
        }

    # Pictures and prompts.

    def pixels_a_latent(self, vae: Mapping[str, Any]) -> int | None:
        blocks = vae.get("encoder_block_out_channels")
        return 2 ** (len(blocks) - 1) if isinstance(blocks, (list, tuple)) and blocks else None

    def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        return vae.encode(pixels).latent  # there is no posterior

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The last hidden states after the instruction and the mask of their tokens; the prompts in
        lower case, as the pipeline reads them."""
        return self.encode_texts(pipeline, instruct(prompts), self.with_instruction(pipeline))

    def encode_empty(self, pipeline: Any) -> dict[str, torch.Tensor]:
        """The empty text, without the instruction."""
        return self.encode_texts(pipeline, [""], self.kept(pipeline))

    def encode_texts(
        self, pipeline: Any, texts: Sequence[str], limit: int
    ) -> dict[str, torch.Tensor]:
        """Of texts as they are and of `limit` tokens what is kept of them."""
        encoder, kept = pipeline.text_encoder, self.kept(pipeline)
        read = read_tokens(pipeline, "text_encoder", "tokenizer", texts, limit)
        tokens, mask = (
            tensor.to(encoder.device) for tensor in (read.input_ids, read.attention_mask)
        )
        states = encoder(tokens, attention_mask=mask, use_cache=False)[0].float()
        own = [0, *range(limit + 1 - kept, limit)]
        return {TEXT: states[:, own].cpu(), "mask": mask[:, own].float().cpu()}

    def kept(self, pipeline: Any) -> int:
        """Tokens whose states are kept."""
        return min(TOKENS, pipeline.tokenizer.model_max_length)

    def with_instruction(self, pipeline: Any) -> int:
        """Tokens that are read of a prompt and the instruction."""
        tokenizer = pipeline.tokenizer
        tokenizer.padding_side = "right"  # as the pipeline has it
        return len(tokenizer.encode(INSTRUCTION)) + self.kept(pipeline) - 2

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        limit = self.with_instruction(pipeline)
        return {"tokens": tokenize(pipeline.tokenizer, instruct(prompts), limit)}

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, self.kept(pipeline) - 1

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        tokens = min(TOKENS, parts.tokens["tokenizer"].limit or TOKENS)
        return {TEXT: (tokens, parts.denoiser["caption_channels"]), "mask": (tokens,)}

    # Pictures made.

    def sampler(self, pipeline: Any, num_steps: int, latent_shape: Sequence[int]) -> Any:
        """The pipeline's own solver, whose steps are deterministic."""
        if not isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
            return super().sampler(pipeline, num_steps, latent_shape)
        scheduler: Any = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps)
        return scheduler


def instruct(prompts: Sequence[str]) -> list[str]:
    """Prompts after the instruction, as the pipeline reads them."""
    return [INSTRUCTION + prompt.lower().strip() for prompt in prompts]
