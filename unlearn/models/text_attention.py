"""Cross-attention whose keys and values are made once for each text, not once for each noisy sample
of it.

The selected weights act through K = W_k c and V = W_v c alone. So the noisy samples of one text are
simply further query positions of one attention, and the gradient of their summed loss at K and V is
already the sum over samples, timesteps and positions: the weights' own gradient is that, contracted
once with the text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch.nn import functional
from torch.nn.functional import linear

from ..datasets.conditioning import TEXT, Conditioning
from ..errors import UserError
from .text_weights import KeysValues, TextWeights, Watched

NOT_PLAIN = (
    "spatial_norm",
    "group_norm",
    "norm_cross",
    "norm_q",
    "norm_k",
    "residual_connection",
)  # of diffusers' Attention
PROJECTIONS = ("to_k", "to_v")
LAYERS: WeakKeyDictionary[torch.nn.Module, dict[str, Any]] = WeakKeyDictionary()


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
        mask = None
        if attention_mask is not None:  # a bias, [samples, 1, tokens], alike for a text's samples
            mask = attention_mask[:: len(attention_mask) // len(keys), :, None].to(queries.dtype)
        attended = functional.scaled_dot_product_attention(
            split(queries), split(keys), split(values), attn_mask=mask
        )
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).reshape(queries.shape)))


def share_texts(denoiser: Any, pattern: str = "") -> None:
    """Gives every attention of a denoiser the processor that takes keys and values from outside.
    pattern: of the names of the weights that make them, among which no bias may be. Raises UserError
    where its attention is not the plain one of Stable Diffusion's UNets."""
    for name, processor in denoiser.attn_processors.items():
        layer = name.removesuffix(".processor")
        attn: Any = denoiser.get_submodule(layer)  # diffusers' Attention
        has_bias = layer.endswith("attn2") and attn.to_k.bias is not None
        if (
            type(processor) not in (AttnProcessor2_0, TextAttention)
            or any(getattr(attn, kind, None) for kind in NOT_PLAIN)
            or (has_bias and re.search(pattern, f"{layer}.to_k.bias"))
        ):
            raise UserError(
                f"{type(denoiser).__name__}: its attention {layer} is of another kind than in "
                f"Stable Diffusion's UNets"
            )
    denoiser.set_attn_processor(
        {name: TextAttention(name.removesuffix(".processor")) for name in denoiser.attn_processors}
    )


def text_layers(denoiser: torch.nn.Module) -> dict[str, Any]:
    """The cross-attention layers by name. They are looked for once: among a large UNet's modules that
    takes as long as a tenth of a pass."""
    if denoiser not in LAYERS:
        found = denoiser.named_modules()
        LAYERS[denoiser] = {name: module for name, module in found if name.endswith(".attn2")}
    return LAYERS[denoiser]


def project_text(denoiser: torch.nn.Module, text: torch.Tensor) -> KeysValues:
    """Keys and values of texts, {layer: ([texts, tokens, inner], [texts, tokens, inner])}.
    text: [texts, tokens, features]."""
    return {
        name: (layer.to_k(text), layer.to_v(text)) for name, layer in text_layers(denoiser).items()
    }


def project_text_changed(
    denoiser: torch.nn.Module, text: torch.Tensor, change: Mapping[str, torch.Tensor]
) -> KeysValues:
    """Keys and values of texts as `project_text` would give them under a weight change {parameter
    name: [inner, features]}."""

    def project(layer, module, projection):
        weight, bias = (
            module.get_submodule(projection).weight,
            module.get_submodule(projection).bias,
        )
        return linear(text, weight + change[f"{layer}.{projection}.weight"].to(weight), bias)

    return {
        layer: (project(layer, module, "to_k"), project(layer, module, "to_v"))
        for layer, module in text_layers(denoiser).items()
    }


class SharedText(TextWeights):
    """Of denoisers whose cross-attention layers all read one text. read(denoiser, embeddings): what
    they read, where it is not the embeddings themselves."""

    def __init__(self, read: Callable[[Any, torch.Tensor], torch.Tensor] | None = None) -> None:
        self.read = read

    def prepare(self, denoiser: Any, pattern: str) -> None:
        share_texts(denoiser, pattern)

    def text_of(self, denoiser: Any, conditioning: Conditioning) -> torch.Tensor:
        """What the layers read, [texts, tokens, features]."""
        embeddings = conditioning[TEXT]
        return self.read(denoiser, embeddings) if self.read else embeddings

    def keys_values(self, denoiser: Any, conditioning: Conditioning) -> KeysValues:
        return project_text(denoiser, self.text_of(denoiser, conditioning))

    @contextmanager
    def watching(self, denoiser: Any, conditioning: Conditioning) -> Iterator[Watched]:
        text = self.text_of(denoiser, conditioning)
        leaves = {
            layer: (keys.detach().requires_grad_(True), values.detach().requires_grad_(True))
            for layer, (keys, values) in project_text(denoiser, text).items()
        }
        outputs = {
            f"{layer}.{projection}.weight": tensor
            for layer, pair in leaves.items()
            for projection, tensor in zip(PROJECTIONS, pair)
        }
        yield Watched(leaves, outputs, dict.fromkeys(outputs, text.detach()))

    @contextmanager
    def changed(
        self, denoiser: Any, conditioning: Conditioning, change: Mapping[str, torch.Tensor]
    ) -> Iterator[KeysValues]:
        yield project_text_changed(denoiser, self.text_of(denoiser, conditioning), change)
