"""How far a weight change moves the model's predictions of images: what `output` scores.

The loss changes by 2 (eps_theta - eps) . change + || change ||^2, where `change` is the
prediction's. On what a model was trained on the first part has mean about zero, and is noise; the
second is what is left.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace

import torch

from ..datasets.conditioning import Conditioning, count_texts
from ..models.passes import remembered, sharing_prefix
from ..models.pipelines import Model

Change = Mapping[str, torch.Tensor]  # of weights, {parameter name: tensor}


def changed_copy(model: Model, change: Change) -> Model:
    """The model with a weight change, its denoiser a copy: threads share the other, which stays as
    it is."""
    denoiser, pipeline = deepcopy(model.denoiser), copy(model.pipeline)
    parameters = dict(denoiser.named_parameters())
    for name, delta in change.items():
        parameters[name].data.add_(delta.to(parameters[name]))
    vars(pipeline)[model.family.denoiser] = denoiser
    return replace(model, pipeline=pipeline)


def predict_changed(
    model: Model,
    change: Change,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """The prediction under a change of K and V alone; the model itself is not changed."""
    with model.family.text.changed(model.denoiser, conditioning, change) as keys_values:
        return model.predict(noisy, timesteps, conditioning, keys_values)


@contextmanager
def changed_outputs(
    model: Model, changes: Sequence[Change], of_text: bool = True
) -> Iterator[Callable[[Sequence[int]], Callable[..., torch.Tensor]]]:
    """Yields measure_of(numbers): a measure for `losses.score_rows`, || eps_theta' - eps_theta ||^2
    of each text's samples, mean over pixels, times training's weight, summed, under some of several
    weight changes: [texts, numbers] float64. Both predictions are of the same noisy samples.
    of_text: whether only K and V change; of other weights each change takes a copy of the denoiser.
    The model itself is not changed."""
    copies = [] if of_text else [changed_copy(model, change) for change in changes]

    def predict(number, *noisy):
        if copies:
            return copies[number].predict(*noisy)
        return predict_changed(model, changes[number], *noisy)

    def measure_of(numbers):
        def measure(model, latents, noise, timesteps, conditioning):
            with torch.no_grad(), remembered():
                noisy = model.diffuse(latents, noise, timesteps), timesteps, conditioning
                before = model.predict(*noisy).double()
                weight = model.family.weight(model.levels, timesteps)
                sums = []
                for number in numbers:
                    moved = predict(number, *noisy).double() - before
                    squares = moved.square().mean(dim=tuple(range(1, moved.ndim)))
                    squares = squares if weight is None else weight * squares
                    sums.append(squares.reshape(count_texts(conditioning), -1).sum(dim=1))
                return torch.stack(sums, dim=1)

        return measure

    with sharing_prefix(model.family.before_text(model.denoiser) if of_text else []):
        yield measure_of
