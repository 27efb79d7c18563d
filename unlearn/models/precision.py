"""Weights in half precision, where float32 does not fit: bfloat16 for denoiser and text encoders, but
float32 for what is unlearned, and for the VAE, which is small.

A weight in bfloat16 has eight binary digits: of a change of less than 1 / 500 nothing would be left.
So keys, values and a LoRA's matrices are float32 and are multiplied in float32; only what they give
is rounded, which is as likely up as down. Derivatives survive that, differences of two nearly equal
losses do not.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from .families.interface import KV, Family
from .lora import MATRICES

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHTS = tuple(DTYPES)


def check_weights_type(weights: str, item: str) -> None:
    """Raises UserError, naming `item`, where there is no such precision of weights."""
    if weights not in DTYPES:
        raise UserError(f"{item} {weights!r:.40}: expected {' or '.join(DTYPES)}")


def check_scoring(scoring: str | None, weights: str) -> None:
    """Raises UserError where scores would be differences that half precision does not survive."""
    if weights != "fp32" and scoring in ("exact", "output"):
        raise UserError(
            f"--scoring {scoring}: differences of two nearly equal numbers, of which weights in "
            f"{weights} leave nothing; give --scoring removal (midpoint or gradient of "
            f"compute_influence.py), or hold the weights in fp32"
        )


class KeptLinear(torch.nn.Linear):
    """A layer of a denoiser in half precision whose weights stay float32: it multiplies in float32 and
    gives what it was given, in that precision."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def halve(pipeline: Any, family: Family, dtype: torch.dtype) -> None:
    """Brings denoiser and text encoders of a pipeline to a dtype, in place, but for the weights that
    may be unlearned."""
    denoiser = getattr(pipeline, family.denoiser)
    kept = re.compile(f"{family.selections[KV]}|{MATRICES}")
    modules = dict(denoiser.named_modules())
    layers = {
        name.rpartition(".")[0]
        for name, _ in denoiser.named_parameters()
        if kept.search(name.replace(".base_layer.", "."))  # of a layer beside which a LoRA stands
    }
    own = {id(value) for layer in layers for value in modules[layer].parameters(recurse=False)}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if id(tensor) in own else dtype)
    for layer in layers:
        # Those of a stream and a LoRA's matrices see to it themselves.
        if type(modules[layer]) is torch.nn.Linear and not re.search(MATRICES, f"{layer}."):
            modules[layer].__class__ = KeptLinear
    for name in family.encoders:
        if (encoder := getattr(pipeline, name, None)) is not None:
            encoder.to(dtype)


def cast_inputs(inputs: Mapping[str, Any], names: tuple[str, ...], dtype: torch.dtype) -> dict:
    """A pass's arguments with those of these names in a dtype, within groups of them too."""
    return {
        name: value.to(dtype)
        if name in names
        else cast_inputs(value, names, dtype)
        if name == "added_cond_kwargs"
        else value
        for name, value in inputs.items()
    }


def check_masters(parameters: Mapping[str, torch.Tensor], selection: str) -> None:
    """Raises UserError where weights that are to be changed are not float32."""
    for name, value in parameters.items():
        if value.dtype in (torch.bfloat16, torch.float16):
            raise UserError(
                f"--weight_selection {selection}: {name} is in half precision (weights bf16), in "
                f"which a small change is rounded away; select cross-attn-kv, or a LoRA's, or give "
                f"the weights fp32"
            )
