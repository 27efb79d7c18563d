"""Cross-attention whose keys and values are made once for each text, not once for each noisy sample
of it.

The selected weights act through K = W_k c and V = W_v c alone. So the noisy samples of one text are
simply further query positions of one attention, and the gradient of their summed loss at K and V is
already the sum over samples, timesteps and positions: the weights' own gradient is that, contracted
once with the text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn.functional import linear, scaled_dot_product_attention

from ..errors import UserError

NOT_PLAIN = (
    "spatial_norm",
    "group_norm",
    "norm_cross",
    "norm_q",
    "norm_k",
    "residual_connection",
)  # of diffusers' Attention
KeysValues = dict[str, tuple[torch.Tensor, torch.Tensor]]  # of texts, by layer


class TextAttention(AttnProcessor2_0):
    """Attention of diffusers' own kind, but with given keys and values where a text's are handed
    down."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn: Any,  # diffusers' Attention
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        keys_values: KeysValues | None = None,
    ) -> torch.Tensor:
        if keys_values is None or self.layer not in keys_values:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
        queries = attn.to_q(hidden_states)
        keys, values = (tensor.to(queries.dtype) for tensor in keys_values[self.layer])
        # [texts, samples of a text * positions or tokens, features] -> [texts, heads, ..., features
        # of a head]
        split = lambda tensor: tensor.reshape(
            len(keys), -1, attn.heads, tensor.shape[-1] // attn.heads
        ).transpose(1, 2)
        attended = scaled_dot_product_attention(split(queries), split(keys), split(values))
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).reshape(queries.shape)))


def share_texts(denoiser: UNet2DConditionModel) -> None:
    """Gives every attention of a UNet the processor that takes keys and values from outside. Raises
    UserError where its attention is not the plain one of Stable Diffusion's UNets."""
    for name, processor in denoiser.attn_processors.items():
        layer = name.removesuffix(".processor")
        attn: Any = denoiser.get_submodule(layer)  # diffusers' Attention
        if (
            type(processor) not in (AttnProcessor2_0, TextAttention)
            or any(getattr(attn, kind, None) for kind in NOT_PLAIN)
            or (layer.endswith("attn2") and attn.to_k.bias is not None)
        ):
            raise UserError(
                f"{type(denoiser).__name__}: its attention {layer} is of another kind than in "
                f"Stable Diffusion's UNets"
            )
    denoiser.set_attn_processor(
        {name: TextAttention(name.removesuffix(".processor")) for name in denoiser.attn_processors}
    )


def text_layers(denoiser: torch.nn.Module) -> dict[str, Any]:
    """The cross-attention layers by name."""
    return {name: module for name, module in denoiser.named_modules() if name.endswith(".attn2")}


def project_text(denoiser: torch.nn.Module, embeddings: torch.Tensor) -> KeysValues:
    """Keys and values of texts, {layer: ([texts, tokens, inner], [texts, tokens, inner])}.
    embeddings: [texts, tokens, features]."""
    return {
        name: (layer.to_k(embeddings), layer.to_v(embeddings))
        for name, layer in text_layers(denoiser).items()
    }


def project_text_changed(
    denoiser: torch.nn.Module, embeddings: torch.Tensor, change: Mapping[str, torch.Tensor]
) -> KeysValues:
    """Keys and values of texts as `project_text` would give them under a weight change {parameter
    name: [inner, features]}."""

    def project(layer, module, projection):
        weight = module.get_submodule(projection).weight
        return linear(embeddings, weight + change[f"{layer}.{projection}.weight"].to(weight))

    return {
        layer: (project(layer, module, "to_k"), project(layer, module, "to_v"))
        for layer, module in text_layers(denoiser).items()
    }
