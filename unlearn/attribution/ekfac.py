"""EK-FAC: curvature of linear layers in the eigenbasis of two small matrices each, instead of the
weights' own axes. Source: George et al., Fast approximate natural gradient descent in a
Kronecker-factored eigenbasis, NeurIPS 2018; as curvature of unlearning [FastGDA] (AbU+).

Of a layer with inputs a and gradients g of its outputs, A = E[a a^T] = Q_A . Q_A^T and G = E[g g^T] =
Q_G . Q_G^T. Lambda holds the mean square of each entry of Q_G^T (grad W) Q_A over samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..models.families.interface import KV
from ..models.lora import has_matrices
from ..models.pipelines import Model, select_parameters
from ..models.text_attention import SharedText
from ..storage.hashes import digest, hash_tensors
from .curvature import DiagonalFisher, GradientTaps, check_fisher, per_sample_gradients
from .losses import sample_losses

DIAGONAL, EKFAC = "diagonal", "ek-fac"  # kinds of curvature
EIGENVALUES, OUTPUTS, INPUTS = "eigenvalues", "outputs", "inputs"  # kinds of tensors in a file


def key(kind: str, name: str) -> str:
    """What a tensor of a parameter is called; "" as name: what all layers share."""
    return f"{kind} {name}".strip()


def shares_inputs(model: Model, parameters: Iterable[str]) -> bool:
    """Whether all layers of these weights read one text, so that A is one matrix."""
    is_of_text = set(parameters) <= select_parameters(model.denoiser, KV).keys()
    return (
        is_of_text
        and isinstance(model.family.text, SharedText)
        and not has_matrices(model.denoiser)
    )


def check_linear(model: Model, parameters: Iterable[str]) -> None:
    """Raises UserError where one of these is no weight of a linear layer."""
    modules = dict(model.denoiser.named_modules())
    for name in parameters:
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or not isinstance(modules[layer], torch.nn.Linear):
            raise UserError(
                f"EK-FAC: {name} is no weight of a linear layer; give --weight_selection {KV}, or "
                f"the diagonal Fisher"
            )


def factor_sums(
    model: Model, parameters: dict[str, torch.nn.Parameter], samples: Sequence[Any]
) -> dict[str, torch.Tensor]:
    """Sums over a batch of a a^T and of g g^T of every layer, over samples and positions, {`key`:
    float64 tensor}. samples: as of `curvature.per_sample_gradients`; parameters: tracked."""
    is_shared, sums = shares_inputs(model, parameters), {}
    with GradientTaps(model.denoiser, parameters) as taps:
        sample_losses(model, *samples).sum().backward(inputs=list(parameters.values()))
    for name, parameter in parameters.items():
        parameter.grad = None
        inputs, gradients = (
            part.flatten(0, 1).double()
            for part in taps.taken(name.removesuffix(".weight"), len(samples[0]))
        )
        sums[key(OUTPUTS, name)] = gradients.T @ gradients
        own = key(INPUTS, "" if is_shared else name)
        if own not in sums:
            sums[own] = inputs.T @ inputs
    return sums


def find_bases(sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Eigenvectors of sums of `factor_sums`, a column each, {`key`: float32 tensor}."""
    return {name: torch.linalg.eigh(value)[1].float() for name, value in sums.items()}


def basis_of(bases: Mapping[str, torch.Tensor], kind: str, name: str) -> torch.Tensor:
    """The basis of a parameter's inputs or outputs."""
    return bases[key(kind, name)] if key(kind, name) in bases else bases[kind]


def eigenvalue_sums(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    bases: Mapping[str, torch.Tensor],
    samples: Sequence[Any],
) -> dict[str, torch.Tensor]:
    """Sum over a batch of the squares of Q_G^T (grad W) Q_A of each sample, {`key`: float64}."""
    return {
        key(EIGENVALUES, name): rotate(gradients, bases, name).double().square().sum(dim=0)
        for name, gradients in per_sample_gradients(model, parameters, samples)
    }


def rotate(gradients: torch.Tensor, bases: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Q_G^T g Q_A of gradients [..., out, in] of a parameter, in their dtype."""
    outputs, inputs = (basis_of(bases, kind, name).to(gradients) for kind in (OUTPUTS, INPUTS))
    return outputs.T @ gradients @ inputs


class EkFac(DiagonalFisher):
    """EK-FAC of selected weights, with damping, ready to divide a gradient: diagonal in the layers'
    eigenbases."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], damping: float = 0.0) -> None:
        """tensors: {`key`: tensor}, eigenvalues and bases. damping: a multiple of each layer's mean
        eigenvalue, added to all of them. Source: [FastGDA], Lambda + 0.1 mean(Lambda)."""
        super().__init__(take_eigenvalues(tensors), damping)
        self.identity = digest(hash_tensors(tensors), damping)
        self.bases = {
            name: value for name, value in tensors.items() if not name.startswith(EIGENVALUES)
        }

    def precondition(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Q_G [(Q_G^T g Q_A) / Lambda] Q_A^T, {name: float32 tensor}, on the gradients' device."""
        found = {}
        for name, gradient in gradients.items():
            gradient = gradient.double()
            divided = rotate(gradient, self.bases, name) / self.denominators[name].to(gradient)
            outputs, inputs = (
                basis_of(self.bases, kind, name).to(gradient) for kind in (OUTPUTS, INPUTS)
            )
            found[name] = (outputs @ divided @ inputs.T).float()
        return found


def take_eigenvalues(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The eigenvalues among the tensors of a file, by parameter."""
    start = key(EIGENVALUES, "") + " "
    return {
        name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)
    }


def check_ekfac(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    damping: float,
    remedy: str,
) -> None:
    """Raises UserError as `curvature.check_fisher` of the eigenvalues, and where a basis is missing
    or of another size."""
    check_fisher(path, take_eigenvalues(tensors), parameters, damping, remedy)
    for name, value in parameters.items():
        for kind, size in ((OUTPUTS, value.shape[0]), (INPUTS, value.shape[1])):
            own = key(kind, name) if key(kind, name) in tensors else kind
            if own not in tensors:
                raise UserError(
                    f"--fisher_path {path}: lacks the basis of {kind} of {name}; {remedy}"
                )
            if tensors[own].shape != (size, size) or not torch.isfinite(tensors[own]).all():
                raise UserError(
                    f"--fisher_path {path}: the basis of {kind} of {name}: expected finite numbers "
                    f"[{size}, {size}], found {list(tensors[own].shape)}; {remedy}"
                )
