"""The loss change of images as a directional derivative along weight changes of K and V, and
images' own gradients.

A difference of two nearly equal losses loses its digits to rounding; a derivative does not, so that
bfloat16 keeps the ranking.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import cast

import numpy as np
import torch

from ..datasets.conditioning import Conditioning, count_texts, repeat_texts
from ..models.pipelines import Model
from ..noise import image_generator
from .losses import sample_losses

PROBES = 2  # random directions for each sample's curvature: one more costs one more backward pass


def text_gradients(
    model: Model,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    autocast: torch.dtype | None = None,
    cells: torch.Tensor | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradient of the summed loss of each text's samples with respect to the weights of K and V:
    yields (parameter name, [texts, out, in] float32), layer by layer; nothing else of that size is
    ever held.

    Inputs as in `losses.sample_losses`. The gradient is that of keys and values, summed over
    samples and positions, contracted once with the text. autocast: dtype of the denoiser's
    products, float32 where None.
    """
    num_texts = count_texts(conditioning)
    with torch.enable_grad(), model.family.text.watching(model.denoiser, conditioning) as watched:
        with torch.autocast(latents.device.type, autocast, enabled=autocast is not None):
            losses = sample_losses(
                model, latents, noise, timesteps, conditioning, watched.keys_values, cells
            )
        gradients = torch.autograd.grad(losses.sum(), list(watched.outputs.values()))
    for name, gradient in zip(watched.outputs, gradients):
        yield name, watched.contract(name, gradient, num_texts)


def dot(
    named_gradients: Iterable[tuple[str, torch.Tensor]], changes: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Inner products [texts, changes] float64 of gradients, pairs of name and [texts, out, in],
    with stacked weight changes."""
    products = (
        (gradient.flatten(1) @ changes[name].T).double() for name, gradient in named_gradients
    )
    return cast(torch.Tensor, sum(products))  # 0 only without any gradient


def stack_changes(changes: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weight changes [{name: [out, in]}, ...] as {name: [changes, out * in]}."""
    return {
        name: torch.stack([change[name].flatten() for change in changes]) for name in changes[0]
    }


def gradient_dots(
    changes: Sequence[Mapping[str, torch.Tensor]], autocast: torch.dtype | None = None
) -> Callable[..., torch.Tensor]:
    """A measure for `losses.score_rows`: the gradient of each text's summed loss, at the model's
    present weights, dotted with each of several weight changes: [texts, changes] float64.

    changes: [{parameter name: tensor}, ...] of K and V, on the model's device. At theta0 this is
    the first order of the loss change, [AbU] appendix A.3; at theta0 + change / 2 its midpoint
    rule.
    """
    stacked = stack_changes(changes)
    return lambda model, *samples: dot(text_gradients(model, *samples, autocast=autocast), stacked)


def second_order_dots(
    changes: Sequence[Mapping[str, torch.Tensor]],
    autocast: torch.dtype | None = None,
    num_probes: int = PROBES,
) -> Callable[..., torch.Tensor]:
    """A measure for `losses.score_rows`: first and second order of the loss change at the model's
    present weights, for each of several weight changes: [texts, changes] float64.

    The loss of a sample is || p - target ||^2, whose change along D is 2 (p - target) . J D + || J
    D ||^2 where the prediction p is linear (Gauss-Newton). || J D ||^2 is the mean of (D . J^T v)^2
    over random signs v, the same few for all changes. A query's own exemplars lie in a minimum of
    their loss: their rise is this second term almost alone. changes: as for `gradient_dots`.
    """
    stacked = stack_changes(changes)

    def measure(model, latents, noise, timesteps, conditioning):
        num_texts, num_samples = count_texts(conditioning), len(latents)
        texts = repeat_texts(conditioning, num_samples)  # a square needs each sample's own
        with torch.enable_grad(), model.family.text.watching(model.denoiser, texts) as watched:
            with torch.autocast(latents.device.type, autocast, enabled=autocast is not None):
                prediction = model.predict(
                    model.diffuse(latents, noise, timesteps), timesteps, texts, watched.keys_values
                )
            errors = (prediction - model.target(latents, noise, timesteps)).detach()
            num_pixels = prediction[0].numel()
            weight = model.family.weight(model.levels, timesteps)
            root = 1 if weight is None else weight.sqrt()[:, None, None, None]
            directions = [
                2 / num_pixels * errors * root**2,
                *(signs / num_pixels**0.5 * root for signs in probe_signs(noise, num_probes)),
            ]
            dots = [
                dot(
                    (
                        (name, watched.contract(name, gradient, num_samples))
                        for name, gradient in zip(
                            watched.outputs,
                            torch.autograd.grad(
                                prediction,
                                list(watched.outputs.values()),
                                direction.to(prediction.dtype),
                                retain_graph=number < num_probes,
                            ),
                        )
                    ),
                    stacked,
                )
                for number, direction in enumerate(directions)
            ]
        change = dots[0] + torch.stack([probe.square() for probe in dots[1:]]).mean(dim=0)
        return change.reshape(num_texts, -1, len(changes)).sum(dim=1)

    return measure


@cache
def probe_pattern(number: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed order of a sample's numbers and a sign for each: (int64 [size], float32 [size])."""
    generator = np.random.Generator(image_generator(number, "probe", str(size)))
    return torch.from_numpy(generator.permutation(size)), torch.from_numpy(
        generator.choice(np.array([-1, 1], np.float32), size)
    )


def probe_signs(noise: torch.Tensor, num_probes: int) -> Iterator[torch.Tensor]:
    """Random signs [num_probes][batch, C, h, w] that belong to the image as its noise does: that
    noise's signs in another order, times fixed ones, so that they have nothing to do with what the
    noise itself does to a prediction."""
    for number in range(num_probes):
        order, signs = (
            tensor.to(noise.device) for tensor in probe_pattern(number, noise[0].numel())
        )
        yield (noise.flatten(1)[:, order].sign() * signs).reshape(noise.shape)
