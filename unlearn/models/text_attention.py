"""Cross-attention whose keys and values are made once for each text, not once for each noisy sample
of it.

The selected weights act through K = W_k c and V = W_v c alone. So the noisy samples of one text are
simply further query positions of one attention, and the gradient of their summed loss at K and V is
already the sum over samples, timesteps and positions: the weights' own gradient is that, contracted
once with the text.
"""

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


class TextAttention(AttnProcessor2_0):
    """Attention of diffusers' own kind, but with given keys and values where a text's are handed
    down."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        keys_values=None,
    ):
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


def share_texts(denoiser):
    """Gives every attention of a UNet the processor that takes keys and values from outside. Raises
    UserError where its attention is not the plain one of Stable Diffusion's UNets."""
    for name, processor in denoiser.attn_processors.items():
        layer = name.removesuffix(".processor")
        attn = denoiser.get_submodule(layer)
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


def text_layers(denoiser):
    """The cross-attention layers by name."""
    return {name: module for name, module in denoiser.named_modules() if name.endswith(".attn2")}


def project_text(denoiser, embeddings):
    """Keys and values of texts, {layer: ([texts, tokens, inner], [texts, tokens, inner])}.
    embeddings: [texts, tokens, features]."""
    return {
        name: (layer.to_k(embeddings), layer.to_v(embeddings))
        for name, layer in text_layers(denoiser).items()
    }


def project_text_changed(denoiser, embeddings, change):
    """Keys and values of texts as `project_text` would give them under a weight change {parameter
    name: [inner, features]}."""
    return {
        layer: tuple(
            linear(embeddings, weight + change[name].to(weight))
            for name, weight in (
                (f"{layer}.{projection}.weight", module.get_submodule(projection).weight)
                for projection in ("to_k", "to_v")
            )
        )
        for layer, module in text_layers(denoiser).items()
    }
