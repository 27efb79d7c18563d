"""FLUX.2, dev and klein: a language model for the text, of three of whose layers the states stand side
by side, a VAE whose packed latents are normalised by their own mean and variance, and a transformer
over packed latents that is told a guidance (dev) or guided by a second pass (klein, where it is not
distilled)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from transformers import AutoTokenizer

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ...errors import UserError
from ..text_weights import KeysValues, StreamWeights
from .checks import check_colours, check_transformer
from .flow import ATTENTION, SELECTIONS, name_block
from .flux import DOUBLE as FLUX_1_DOUBLE
from .flux import name_norms
from .guidance import identify_guidance, read_guidance, tell_guidance
from .interface import Original, Parts, Refuse
from .packing import Standardised, pack, packed_channels
from .texts import check_tokens, read_tokens, tokenize

TOKENS = 512  # as the pipelines and diffusers' training examples take them
# What Qwen3's and Mistral's chats (Tekken, version 7) put around a user's message, of Qwen3's without thinking, of
# Mistral's with the system's before it. Written out, because a template that came with a model is a program.
QWEN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
MISTRAL = "<s>[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT][INST]{}[/INST]"
# Layers by the names of the authors' code. Blocks share their modulation; those of a single block are
# joined in diffusers too.
DOUBLE = {
    **{name: layers for name, layers in FLUX_1_DOUBLE.items() if "attn" in name},
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
OUTSIDE = {  # of blocks
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
JOINED = r"^single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)$"


class Flux2(Standardised):
    denoiser = "transformer"
    encoders = {"text_encoder": "tokenizer"}
    selections = SELECTIONS  # of the double blocks, as in FLUX.1
    text = StreamWeights()
    longest = TOKENS
    lora_targets = {
        "attention": rf"{ATTENTION}|{JOINED}",
        "linear": rf"{ATTENTION}|{JOINED}|\.ff(_context)?\.linear_(in|out)$",
    }

    def __init__(self, name: str, pipeline: str, encoder: str, layers: Sequence[int]) -> None:
        """encoder: class of the text encoder; layers: whose states are read, of them."""
        self.name, self.pipeline, self.layers = name, pipeline, tuple(layers)
        self.classes = {
            "transformer": ("Flux2Transformer2DModel",),
            "vae": ("AutoencoderKLFlux2",),
            "text_encoder": (encoder,),
        }

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == self.pipeline

    def originals(self, denoiser: Any) -> dict[str, Original]:
        names = {name: Original((layer,)) for name, layer in OUTSIDE.items()}
        names["final_layer.adaLN_modulation.1"] = Original(("norm_out.linear",), is_swapped=True)
        for kind, table in (("", DOUBLE), ("single_", SINGLE)):
            for number in range(len(getattr(denoiser, f"{kind}transformer_blocks"))):
                block = f"{kind}transformer_blocks.{number}"
                names |= name_block(f"{kind or 'double_'}blocks.{number}", block, table)
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        return name_norms(denoiser)

    def identity(self, pipeline: Any) -> dict:
        return {**super().identity(pipeline), **identify_guidance(pipeline)}

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        check_tokens(parts, "text_encoder", "tokenizer", refuse, self.longest)
        channels, width = (
            parts.vae.get("latent_channels"),
            parts.texts["text_encoder"]["hidden_size"],
        )
        expected = {
            "in_channels": (packed_channels(channels), "its VAE's latents make, packed,"),
            "joint_attention_dim": (
                len(self.layers) * width if isinstance(width, int) else None,
                f"{len(self.layers)} layers of its text encoder give",
            ),
            "patch_size": (1, "expected"),
        }
        check_transformer(parts, which, expected, refuse)
        self.check_schedule(parts, refuse)
        epsilon = parts.vae.get("batch_norm_eps")
        if not isinstance(epsilon, float) or not 0 <= epsilon < math.inf:
            refuse(f"its VAE's batch_norm_eps: expected a number, found {epsilon!r:.80}")

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        told = repeat_texts(conditioning, len(noisy))
        height, width = noisy.shape[2:]
        return {
            "hidden_states": pack(noisy),
            "timestep": times / 1000,  # the transformer multiplies by 1000 again
            "guidance": read_guidance(denoiser, told, noisy),
            "encoder_hidden_states": told[TEXT],
            "txt_ids": number_positions(noisy, (1, 1, 1, told[TEXT].shape[1])),
            "img_ids": number_positions(noisy, (1, height // 2, width // 2, 1)),
        }

    # The VAE.

    def scaling(self, vae: Any) -> list:
        return [vae.config.batch_norm_eps]  # mean and variance stand among its weights

    def statistics(self, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, h, w] each: those of packed latents, the same in each 2 x 2."""
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
        mean, deviation = (
            values.to(latents).reshape(-1, 2, 2).repeat(1, height, width)
            for values in (vae.bn.running_mean, deviation)
        )
        return mean, deviation

    # The text.

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """States of three layers, side by side; those of padding too, which the transformer reads."""
        encoder, (_, tokens) = pipeline.text_encoder, self.reader(pipeline)
        messages = self.write(pipeline, prompts)
        how = pipeline, "text_encoder", "tokenizer", messages, tokens, self.adds_special
        read = read_tokens(*how).to(encoder.device)
        kept = {name: read[name] for name in ("input_ids", "attention_mask")}
        states = encoder.model(**kept, output_hidden_states=True, use_cache=False).hidden_states
        return {TEXT: torch.cat([states[layer] for layer in self.layers], dim=-1).float().cpu()}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        tokenizer, tokens = self.reader(pipeline)
        messages = self.write(pipeline, prompts)
        return {"tokens": tokenize(tokenizer, messages, tokens, self.adds_special)}

    adds_special = True  # whether the tokenizer puts tokens around messages

    def write(self, pipeline: Any, prompts: Sequence[str]) -> list[str]:
        """The messages of prompts: a user's, to which the answer begins without thinking."""
        return [QWEN.format(prompt) for prompt in prompts]

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, min(TOKENS, pipeline.tokenizer.model_max_length)

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        tokens = min(TOKENS, parts.tokens["tokenizer"].limit or TOKENS)
        return {TEXT: (tokens, parts.denoiser["joint_attention_dim"])}

    # Pictures made.

    def guide(
        self, pipeline: Any, conditioning: Conditioning, guidance_scale: float
    ) -> tuple[Conditioning, Conditioning | None]:
        """Dev is told the guidance; klein takes a second pass, where it is not distilled."""
        if pipeline.transformer.config.guidance_embeds:
            return tell_guidance(conditioning, guidance_scale), None
        if guidance_scale != 1 and pipeline.config.get("is_distilled", True):
            raise UserError(
                f"guidance {guidance_scale}: this model of {self.name} takes none (it is distilled); "
                f"give 1"
            )
        return super().guide(pipeline, conditioning, guidance_scale)

    def shift(self, config: Any, positions: int, num_steps: int) -> float:
        return compute_empirical_mu(positions, num_steps)


class Flux2Dev(Flux2):
    adds_special = False  # they are written with the messages

    def load_tokenizers(self, name: Any, classes: Mapping[str, str]) -> dict[str, Any]:
        """Of what reads texts and pictures, what reads texts: the rest takes torchvision."""
        if not classes.get("tokenizer", "").endswith("Processor"):
            return {}
        return {
            "tokenizer": AutoTokenizer.from_pretrained(
                name, subfolder="tokenizer", trust_remote_code=False
            )
        }

    def write(self, pipeline: Any, prompts: Sequence[str]) -> list[str]:
        """The messages of prompts: the system's, and a user's, who shows no picture."""
        return [
            MISTRAL.format(pipeline.system_message, prompt.replace("[IMG]", ""))
            for prompt in prompts
        ]


def number_positions(like: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """Numbers [positions, 4] of all positions of a box with these sides, the last fastest."""
    axes = [torch.arange(side, device=like.device) for side in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
