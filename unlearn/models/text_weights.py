"""How the weights of a text's keys and values are reached: watched for their gradients, and taken
with a change, while the denoiser itself stays as it is.

Threads share a denoiser; what one of them watches or changes is its own.
"""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import linear

from ..datasets.conditioning import Conditioning
from ..errors import UserError

KeysValues = dict[str, tuple[torch.Tensor, torch.Tensor]]  # of texts, by layer
THREAD = threading.local()  # `watched` and `change` of a `StreamWeights`' pass in this thread


@dataclass
class Watched:
    """What a pass made of texts by the weights of keys and values: the gradient at these outputs,
    contracted with the inputs, is the weights'."""

    keys_values: KeysValues | None  # that the pass is to take, where a text's are made once
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)  # weight -> [n, tokens, out]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)  # weight -> [n, tokens, in]

    def contract(self, name: str, gradient: torch.Tensor, num_texts: int) -> torch.Tensor:
        """Gradients of a weight, [num_texts, out, in] float32, from that of its outputs: summed over
        the samples of a text."""
        outputs, inputs = (
            tensor.reshape(num_texts, -1, tensor.shape[-1]).float()
            for tensor in (gradient, self.inputs[name])
        )
        return torch.einsum("nto,nti->noi", outputs, inputs)


class TextWeights:
    """The weights that make keys and values of a text, in one kind of denoiser."""

    def prepare(self, denoiser: Any, pattern: str) -> None:
        """Changes a denoiser, in place, so that these weights can be reached. pattern: of their
        names. Raises UserError where its attention is of another kind."""
        raise NotImplementedError

    def keys_values(self, denoiser: Any, conditioning: Conditioning) -> KeysValues | None:
        """Keys and values of texts, made once a text; None where each sample has its own."""
        raise NotImplementedError

    def watching(
        self, denoiser: Any, conditioning: Conditioning
    ) -> AbstractContextManager[Watched]:
        """Within it, a pass that takes the Watched's `keys_values` is watched."""
        raise NotImplementedError

    def changed(
        self, denoiser: Any, conditioning: Conditioning, change: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[KeysValues | None]:
        """Within it, passes that take the keys and values it gives are those of a weight change
        {parameter name: tensor}."""
        raise NotImplementedError


class StreamLinear(torch.nn.Linear):
    """A projection of a text that this thread may watch, or take with a change."""

    weight_name: str

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        change = (getattr(THREAD, "change", None) or {}).get(self.weight_name)
        weight = self.weight if change is None else self.weight + change.to(self.weight)
        if input.dtype == weight.dtype:
            output = linear(input, weight, self.bias)
        else:  # float32 weights of a denoiser in half precision
            bias = None if self.bias is None else self.bias.to(weight)
            output = linear(input.to(weight), weight, bias).to(input)
        if watched := getattr(THREAD, "watched", None):
            output = output if output.requires_grad else output.requires_grad_(True)
            watched.outputs[self.weight_name] = output
            watched.inputs[self.weight_name] = input.detach()
        return output


class StreamWeights(TextWeights):
    """Of denoisers whose layers each have a text stream of their own, which depends on image and
    timestep: nothing can be made once a text."""

    def prepare(self, denoiser: Any, pattern: str) -> None:
        modules = dict(denoiser.named_modules())
        for name, _ in denoiser.named_parameters():
            if not re.search(pattern, name):
                continue
            module = modules[name.rpartition(".")[0]]
            if type(module) not in (torch.nn.Linear, StreamLinear):
                raise UserError(
                    f"{type(denoiser).__name__}: {name} is of the class {type(module).__name__}; "
                    f"expected Linear"
                )
            module.__class__, module.weight_name = StreamLinear, name

    def keys_values(self, denoiser: Any, conditioning: Conditioning) -> None:
        return None

    @contextmanager
    def watching(self, denoiser: Any, conditioning: Conditioning) -> Iterator[Watched]:
        THREAD.watched = Watched(None)
        try:
            yield THREAD.watched
        finally:
            THREAD.watched = None

    @contextmanager
    def changed(
        self, denoiser: Any, conditioning: Conditioning, change: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        THREAD.change = change
        try:
            yield None
        finally:
            THREAD.change = None
