"""The diagonal Fisher: mean over samples of the squared gradient of each sample's own loss, and its
inverse."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import unfold

from ..datasets.conditioning import map_tensors
from ..errors import UserError
from ..models.pipelines import Model
from ..models.unets import check_shapes
from ..storage.hashes import digest, hash_tensors
from .losses import sample_losses


class GradientTaps:
    """Records, for some linear layers and convolutions, the input and the gradient of the output,
    from which every sample's own weight gradient follows. A context manager."""

    def __init__(self, denoiser: torch.nn.Module, names: Iterable[str]) -> None:
        modules = dict(denoiser.named_modules())
        self.layers = {name.rpartition(".")[0]: modules[name.rpartition(".")[0]] for name in names}
        self.inputs = {name: [] for name in self.layers}
        self.output_gradients = {name: {} for name in self.layers}

    def __enter__(self) -> "GradientTaps":
        self.hooks = [
            layer.register_forward_hook(partial(self.record_forward, name))
            for name, layer in self.layers.items()
        ]
        return self

    def record_forward(
        self,
        name: str,
        layer: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        """Keeps the input and asks for the gradient of the output. A feed-forward layer takes the
        batch in several blocks."""
        gradients = self.output_gradients[name]
        output.register_hook(partial(gradients.__setitem__, len(self.inputs[name])))
        self.inputs[name].append(inputs[0].detach())

    def taken(self, name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's input [batch, positions, in] and the gradient of its output [batch, positions,
        out]; of a convolution, what its kernel sees at each position."""
        calls = sorted(self.output_gradients[name])  # others gave what the loss does not look at
        inputs = torch.cat([self.inputs[name][call] for call in calls])
        gradients = torch.cat([self.output_gradients[name][call] for call in calls])
        layer: Any = self.layers[name]
        if isinstance(self.layers[name], torch.nn.Conv2d):
            patches = unfold(inputs, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            return patches.transpose(1, 2), gradients.flatten(2).transpose(1, 2)
        inputs, gradients = (
            part.reshape(batch, -1, part.shape[-1]) for part in (inputs, gradients)
        )
        return inputs, gradients

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()


def is_tapped(layer: torch.nn.Module) -> bool:
    """Whether `GradientTaps` knows a layer: a linear one, or a plain convolution."""
    if isinstance(layer, torch.nn.Conv2d):
        is_padded = isinstance(layer.padding, tuple) and layer.padding_mode == "zeros"
        return layer.groups == 1 and is_padded
    return isinstance(layer, torch.nn.Linear)


def per_sample_gradients(
    model: Model, parameters: dict[str, torch.nn.Parameter], samples: Sequence[Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradient of each sample's loss with respect to each selected parameter: yields (name, [batch,
    *shape]).

    Linear layers (all of K and V) and convolutions take one backward pass for the batch; where the
    selection holds other layers, each sample takes its own. samples: latents, noise, timesteps, conditioning as in
    `losses.sample_losses`, a text a sample.
    """
    modules = dict(model.denoiser.named_modules())
    if all(is_tapped(modules[name.rpartition(".")[0]]) for name in parameters):
        with GradientTaps(model.denoiser, parameters) as taps:
            # The sum keeps each sample's gradient its own: no factor of the batch's size to undo.
            losses = sample_losses(model, *samples)
            losses.sum().backward(inputs=list(parameters.values()))
        for name in parameters:
            layer, _, kind = name.rpartition(".")
            inputs, gradients = taps.taken(layer, len(samples[0]))
            if kind == "weight":
                own = torch.einsum("bto,bti->boi", gradients, inputs)
                yield name, own.reshape(len(own), *parameters[name].shape)
            else:
                yield name, gradients.sum(dim=1)
    else:
        rows = [
            torch.autograd.grad(
                sample_losses(model, *map_tensors(itemgetter(slice(i, i + 1)), samples)).sum(),
                list(parameters.values()),
            )
            for i in range(len(samples[0]))
        ]
        for name, gradients in zip(parameters, zip(*rows)):
            yield name, torch.stack(gradients)
    for parameter in parameters.values():
        parameter.grad = None


def squared_gradient_sums(
    model: Model, parameters: dict[str, torch.nn.Parameter], samples: Sequence[Any]
) -> dict[str, torch.Tensor]:
    """Sum over the batch of the squared gradient of each sample, {name: float64 tensor}.
    Source: [AbU] section 4.1, every sample weighted alike."""
    return {
        name: gradients.double().square().sum(dim=0)
        for name, gradients in per_sample_gradients(model, parameters, samples)
    }


class DiagonalFisher:
    """The diagonal of the Fisher matrix of selected parameters, with damping, ready to divide a
    gradient."""

    def __init__(self, diagonal: Mapping[str, torch.Tensor], damping: float = 0.0) -> None:
        """diagonal: {name: tensor}. damping: a multiple of each parameter's mean entry, added to
        its entries."""
        self.identity = digest(hash_tensors(diagonal), damping)
        self.damping = damping
        self.warnings: list[str] = []  # see `fishers.compare_images`
        self.denominators = {
            name: entries.double() + damping * entries.double().mean()
            for name, entries in diagonal.items()
        }

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """F^-1 g, {name: float32 tensor}, on the gradients' device."""
        return {
            name: (gradient.double() / self.denominators[name].to(gradient.device)).float()
            for name, gradient in gradients.items()
        }


def check_fisher(
    path: str | Path,
    diagonal: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    damping: float,
    remedy: str = "make it again",
) -> None:
    """Raises UserError where a Fisher lacks selected parameters, has other shapes, negative or
    non-finite entries, or zero ones that no damping lifts; the message names the parameter and ends
    with what to do."""
    missing = [name for name in parameters if name not in diagonal]
    if missing:
        raise UserError(
            f"--fisher_path {path}: lacks {len(missing)} of the {len(parameters)} selected "
            f"parameters, first {missing[0]}; {remedy}"
        )
    check_shapes(path, diagonal, parameters, "Fisher of")
    for name, entries in diagonal.items():
        if not torch.isfinite(entries).all():
            raise UserError(f"--fisher_path {path}: {name} has NaN or infinite entries; {remedy}")
        if (entries < 0).any():
            raise UserError(
                f"--fisher_path {path}: {name} has negative entries, which a mean of squares "
                f"cannot; {remedy}"
            )
        if damping <= 0 and (entries == 0).any():
            raise UserError(
                f"--fisher_path {path}: {name} has {int((entries == 0).sum())} zero entries, "
                f"which cannot be "
                "divided by; give a positive --damping (try 0.1)"
            )
        if damping > 0 and entries.mean() == 0:
            raise UserError(
                f"--fisher_path {path}: {name} is zero throughout, and no --damping helps; {remedy}"
            )
