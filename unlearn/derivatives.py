"""The loss change of images as a directional derivative along weight changes of K and V, and images' own gradients.

A difference of two nearly equal losses loses its digits to rounding; a derivative does not, so that bfloat16 keeps the ranking.
"""

import torch

from .losses import sample_losses
from .text_attention import project_text

PROJECTIONS = ("to_k", "to_v")


def text_gradients(model, latents, noise, timesteps, embeddings, autocast=None):
    """Gradient of the summed loss of each text's samples with respect to the weights of K and V: yields (parameter name,
    [texts, out, in] float32), layer by layer; nothing else of that size is ever held.

    Inputs as in `losses.sample_losses`. The gradient is that of keys and values, summed over samples and positions already,
    contracted once with the text. autocast: dtype of the denoiser's products, float32 where None.
    """
    with torch.enable_grad():
        keys_values = {layer: tuple(tensor.detach().requires_grad_(True) for tensor in pair)
                       for layer, pair in project_text(model.denoiser, embeddings).items()}
        with torch.autocast(latents.device.type, autocast, enabled=autocast is not None):
            losses = sample_losses(model, latents, noise, timesteps, embeddings, keys_values)
        gradients = torch.autograd.grad(losses.sum(), [tensor for pair in keys_values.values() for tensor in pair])
    names = [f"{layer}.{projection}.weight" for layer in keys_values for projection in PROJECTIONS]
    for name, gradient in zip(names, gradients):
        yield name, torch.einsum("nto,nti->noi", gradient.float(), embeddings)


def gradient_dots(changes, autocast=None):
    """A measure for `losses.score_rows`: the gradient of each text's summed loss, at the model's present weights, dotted
    with each of several weight changes: [texts, changes] float64.

    changes: [{parameter name: tensor}, ...], of K and V. At the original weights this is the first order of the loss change
    of every query at once; at theta0 + change / 2, of one query, its midpoint rule. Source: [AbU] appendix A.3.
    """
    stacked = {name: torch.stack([change[name].flatten() for change in changes]) for name in changes[0]}

    def measure(model, latents, noise, timesteps, embeddings):
        dots = torch.zeros(len(embeddings), len(changes), dtype=torch.float64, device=embeddings.device)
        for name, gradients in text_gradients(model, latents, noise, timesteps, embeddings, autocast):
            dots += gradients.flatten(1) @ stacked[name].to(gradients).T
        return dots

    return measure
