"""Transformers whose blocks read text and image as one sequence, as Z-Image's and Lumina2's do: there
text and image share keys and values. The text has its own in the few blocks that read it alone before.

Diffusers' own passes cut every text to its length, so that no two samples of a batch are alike; here
texts are padded to one length and masked: samples can be stacked, and gradients told apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from ...datasets.conditioning import TEXT, Conditioning, repeat_texts
from ..text_weights import KeysValues, StreamWeights
from .flow import Flow, falling_sigmas
from .interface import Original, Parts
from .texts import count_read, read_tokens, tokenize

REFINER = r"^context_refiner\.\d+\.att(entio)?n\."
SELECTIONS = {  # of a transformer's parameters, by name
    "cross-attn-kv": rf"{REFINER}to_[kv]\.weight$",
    "cross-attn": REFINER,
    "attn": r"\.att(entio)?n\.",
    "all": r"",
}
ATTENTION = r"\.att(entio)?n\.to_(q|k|v|out\.0)$"
TARGETS = {  # of LoRA that are trained: the attention's layers, or all of every block
    "attention": ATTENTION,
    "linear": rf"{ATTENTION}|\.feed_forward\.(w|linear_)[123]$|\.\d+\.adaLN_modulation\.0$"
    r"|\.\d+\.norm1\.linear$",
}


class SingleStream(Flow):
    """A family whose transformer has one stream, and one text encoder that is a language model."""

    denoiser = "transformer"
    encoders = {"text_encoder": "tokenizer"}
    selections = SELECTIONS
    lora_targets = TARGETS
    text = StreamWeights()
    patch = 2
    longest: int = 0
    renamed: Mapping[str, str]  # parts of layers' names -> those of the authors' code

    def originals(self, denoiser: Any) -> dict[str, Original]:
        names = {}
        for name, layer in denoiser.named_modules():
            block, _, last = name.rpartition(".")
            if not isinstance(layer, torch.nn.Linear) or last in ("to_k", "to_v"):
                continue
            layers = (name,)
            if last == "to_q":
                name, layers = f"{block}.qkv", tuple(f"{block}.to_{each}" for each in "qkv")
            names[self.rename(name)] = Original(layers)
        return names

    def original_tensors(self, denoiser: Any) -> dict[str, str]:
        return {self.rename(name): name for name in denoiser.state_dict()}

    def spare_tensors(self, denoiser: Any) -> dict[str, tuple[int | None, ...]]:
        return {"norm_final.weight": (None,)}  # which the authors' code does not read either

    def rename(self, name: str) -> str:
        """A layer's or weight's name in the authors' code."""
        for own, original in self.renamed.items():
            name = name.replace(own, original)
        return name

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
            "timestep": (1000 - times) / 1000,  # from noise at 0 to the picture at 1
            "encoder_hidden_states": told[TEXT],
            "encoder_attention_mask": told["mask"],
        }

    def read(self, output: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
        """The direction to noise: the transformer's is that to the picture."""
        return -output

    def wrap(self, prompts: Sequence[str]) -> list[str]:
        """Prompts with what the pipeline puts around them."""
        raise NotImplementedError

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return self.encode_texts(pipeline, self.wrap(prompts))

    def encode_texts(self, pipeline: Any, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The last but one hidden states of texts as they are, and the mask of their tokens; zeros
        where there are none."""
        encoder, limit = pipeline.text_encoder, self.limit(pipeline)
        read = read_tokens(pipeline, "text_encoder", "tokenizer", texts, limit)
        tokens, mask = (
            tensor.to(encoder.device) for tensor in (read.input_ids, read.attention_mask)
        )
        output = encoder(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
        # Not multiplied by the mask, which would leave negative zeros.
        states = torch.where(mask[..., None] > 0, output.hidden_states[-2].float(), 0)
        order = mask.argsort(dim=1, descending=True, stable=True)  # some tokenizers pad the left
        states = states.take_along_dim(order[..., None], dim=1)
        return {TEXT: states.cpu(), "mask": mask.take_along_dim(order, dim=1).float().cpu()}

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
        limit = self.limit(pipeline)
        return {"tokens": tokenize(pipeline.tokenizer, self.wrap(prompts), limit)}

    def text_lengths(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        return count_read(pipeline.tokenizer, self.wrap(prompts), self.limit(pipeline))

    def limit(self, pipeline: Any) -> int:
        """Tokens that are read of a prompt and what stands around it."""
        return min(self.longest, pipeline.tokenizer.model_max_length)

    def reader(self, pipeline: Any) -> tuple[Any, int]:
        around = pipeline.tokenizer(self.wrap([""]), verbose=False).input_ids[0]
        return pipeline.tokenizer, self.limit(pipeline) - len(around)

    def shapes(self, parts: Parts) -> dict[str, tuple[int, ...]]:
        tokens = min(self.longest, parts.tokens["tokenizer"].limit or self.longest)
        return {TEXT: (tokens, parts.denoiser["cap_feat_dim"]), "mask": (tokens,)}

    def steps(self, num_steps: int) -> dict[str, Any]:
        return falling_sigmas(num_steps)


def run_block(transformer: Any, block: Any, *inputs: Any) -> torch.Tensor:
    """What a block of a transformer gives, with gradient checkpointing where that is on."""
    if torch.is_grad_enabled() and transformer.gradient_checkpointing:
        return transformer._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


def image_ids(height: int, width: int, lengths: torch.Tensor) -> torch.Tensor:
    """Where the positions of an image stand, int64 [batch, height * width, 3]: after texts of these
    lengths, then row and column."""
    rows, columns = (
        torch.arange(size, device=lengths.device).reshape(shape).expand(height, width).flatten()
        for size, shape in ((height, (-1, 1)), (width, (1, -1)))
    )
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=1)
    return places + pad(lengths.long()[:, None, None], (0, 2))


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """Latents [batch, C, h, w] as positions [batch, h / 2 * w / 2, 4 C], a pixel's channels together."""
    number, channels, height, width = latents.shape
    blocks = latents.reshape(number, channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(positions: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Latents of this shape, [batch, C, h, w], of positions."""
    number, channels, height, width = shape
    blocks = positions.reshape(number, height // 2, width // 2, 2, 2, channels)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(number, channels, height, width)
