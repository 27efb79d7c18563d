"""PixArt-alpha and -sigma: T5 with a mask, and a transformer of Stable Diffusion's noise, whose
cross-attention reads projected captions and which predicts variances beside the noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..text_attention import SharedText
from ..text_weights import KeysValues
from .betas import Betas
from .checks import check_colours, check_scaling, check_transformer
from .flow import name_block
from .interface import UNET_SELECTIONS, Original, Parts, Refuse
from .texts import check_tokens, read_tokens, tokenize

SIZES = {"resolution": 2, "aspect_ratio": 1}  # of alpha at 1024 pixels: numbers of each
BLOCK = {  # layers by the names of the authors' code
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
EMBEDDERS = {  # of times and sizes
    "t_embedder": "timestep_embedder",
    "csize_embedder": "resolution_embedder",
    "ar_embedder": "aspect_ratio_embedder",
}
OUTSIDE = {  # of blocks
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    **{
        f"{name}.mlp.{number}": f"adaln_single.emb.{own}.linear_{1 + number // 2}"
        for name, own in EMBEDDERS.items()
        for number in (0, 2)
    },
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
}


class PixArt(Betas):
    denoiser = "transformer"
    classes = {"transformer": ("PixArtTransformer2DModel",), "vae": ("AutoencoderKL",)}
    encoders = {"text_encoder": "tokenizer"}
    # Weights alone: a bias adds the same to the keys, or values, of every text.
    selections = {**UNET_SELECTIONS, "cross-attn-kv": r"\.attn2\.to_[kv]\.weight$"}
    text = SharedText(lambda denoiser, embeddings: project_captions(denoiser, embeddings))
    predictions = ("epsilon",)
    of_sizes = tuple(SIZES)
    patch = 2

    def __init__(self, name: str, pipeline: str, num_tokens: int) -> None:
        self.name, self.pipeline, self.num_tokens = name, pipeline, num_tokens

    def unread(self, denoiser: Any) -> str:
        """The keys' biases: they add the same to all keys that a query is compared with, and a softmax
        does not see that."""
        return r"\.attn[12]\.to_k\.bias$"

    def originals(self, denoiser: Any) -> dict[str, Original]:
        names = {name: Original((layer,)) for name, layer in OUTSIDE.items()}
        for number in range(len(denoiser.transformer_blocks)):
            names |= name_block(f"blocks.{number}", f"transformer_blocks.{number}", BLOCK)
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        names = {"final_layer.scale_shift_table": "scale_shift_table"}
        for number in range(len(denoiser.transformer_blocks)):
            table = f"{number}.scale_shift_table"
            names[f"blocks.{table}"] = f"transformer_blocks.{table}"
        return names

    def spare_tensors(self, denoiser: Any) -> dict[str, tuple[int | None, ...]]:
        """Positions, which diffusers computes, and the empty prompt's embedding, which it reads of its
        text encoder: as many as the model takes latents and tokens, by which models of another size
        and of alpha and sigma, whose weights have the same names, are told apart."""
        positions = tuple(denoiser.pos_embed.pos_embed.shape)
        texts = (self.num_tokens, denoiser.config.caption_channels)
        return {"pos_embed": positions, "y_embedder.y_embedding": texts}

    def owns(self, pipeline: str, classes: Mapping[str, str]) -> bool:
        return pipeline == self.pipeline

    def check_fit(self, parts: Parts, which: str, refuse: Refuse) -> None:
        check_colours(parts, refuse)
        check_tokens(parts, "text_encoder", "tokenizer", refuse)
        width = parts.texts["text_encoder"]["hidden_size"]
        expected = {
            "in_channels": (parts.vae.get("latent_channels"), "its VAE's latents have"),
            "caption_channels": (width, "its text encoder gives"),
            "patch_size": (self.patch, "expected"),
        }
        check_transformer(parts, which, expected, refuse)
        given, made = parts.denoiser["in_channels"], parts.denoiser.get("out_channels")
        if made not in (given, 2 * given):
            refuse(
                f"{which} takes {given} channels and gives {made!s:.20}; expected {given}, or "
                f"{2 * given} where it predicts variances too (learned sigma)"
            )
        self.check_schedule(parts, refuse)
        check_scaling(parts, refuse)

    def before_text(self, denoiser: Any) -> list[Any]:
        return [denoiser.pos_embed, denoiser.transformer_blocks[0].attn1]

    def inputs(
        self,
        denoiser: Any,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        keys_values: KeysValues | None = None,
    ) -> dict[str, Any]:
        told = repeat_texts(conditioning, len(noisy))
        given = {} if keys_values is None else {"keys_values": keys_values}
        return {
            "hidden_states": noisy,
            "timestep": times,
            "encoder_hidden_states": told[TEXT],
            "encoder_attention_mask": told["mask"],
            "added_cond_kwargs": {name: told.get(name) for name in SIZES},
            **({"cross_attention_kwargs": given} if given else {}),
        }

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """The noise: variances, which some predict too, stand in the second half of the channels."""
        return output[:, : noisy.shape[1]]

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """T5's last hidden states and the mask of its tokens; the prompts in lower case, as the
        pipeline reads them."""
        encoder, (_, limit) = pipeline.text_encoder, self.reader(pipeline)
        read = read_tokens(pipeline, "text_encoder", "tokenizer", lower(prompts), limit)
        tokens, mask = read.input_ids.to(encoder.device), read.attention_mask
        states = encoder(tokens, attention_mask=mask.to(encoder.device))[0]
        return {TEXT: states.float().cpu(), "mask": mask.float()}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        return {"tokens": tokenize(pipeline.tokenizer, lower(prompts), self.reader(pipeline)[1])}

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        return pipeline.tokenizer, min(self.num_tokens, pipeline.tokenizer.model_max_length)

    def encode_sizes(
        self, pipeline: Any, sizes: Sequence[tuple[int, int]], resolution: int
    ) -> dict[str, torch.Tensor]:
        """Height and width of the square that is trained on, and their ratio, for those that were
        trained to be told."""
        told = {"resolution": [resolution, resolution], "aspect_ratio": [1]}
        is_told = pipeline.transformer.use_additional_conditions
        return {
            name: torch.tensor([numbers] * len(sizes), dtype=torch.float32)
            for name, numbers in (told if is_told else {}).items()
        }

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        limit, width = parts.tokens["tokenizer"].limit, parts.denoiser["caption_channels"]
        tokens = min(self.num_tokens, limit or self.num_tokens)
        is_told = parts.denoiser.get("use_additional_conditions")
        if is_told is None:
            is_told = parts.denoiser.get("sample_size") == 128
        sizes = {name: (number,) for name, number in SIZES.items()} if is_told else {}
        return {TEXT: (tokens, width), "mask": (tokens,), **sizes}


def project_captions(denoiser: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Captions as the layers read them, of the embeddings' dtype."""
    dtype = denoiser.caption_projection.linear_1.weight.dtype
    return denoiser.caption_projection(embeddings.to(dtype)).to(embeddings.dtype)


def lower(prompts: Sequence[str]) -> list[str]:
    """Prompts as the pipeline reads them."""
    return [prompt.lower().strip() for prompt in prompts]
