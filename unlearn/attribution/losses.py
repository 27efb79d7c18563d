"""Losses of images under a model, on a fixed grid of timesteps with noise that belongs to the
image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..datasets.conditioning import Conditioning, count_texts, map_tensors
from ..datasets.training_sets import TrainingSet, check_pixels
from ..models.passes import remembered, sharing_prefix
from ..models.pipelines import Model
from ..models.text_weights import KeysValues


def sample_losses(
    model: Model,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    keys_values: KeysValues | None = None,
    cells: torch.Tensor | None = None,
) -> torch.Tensor:
    """|| prediction - target ||^2 of each sample, mean over pixels, times training's weight: [batch] float64, on the model's
    device.

    latents, noise: [batch, C, h, w]; timesteps: [batch] int64; conditioning: {name: [texts, ...]},
    each of batch / texts successive samples; keys_values: its texts', where they are known; cells:
    bool [h, w], where only these pixels count. Source: [AbU] section 4.
    """
    error = model.predict(
        model.diffuse(latents, noise, timesteps), timesteps, conditioning, keys_values
    ) - model.target(latents, noise, timesteps)
    squares = error.double().square()
    losses = (
        squares.mean(dim=tuple(range(1, error.ndim)))
        if cells is None
        else (squares[..., cells].mean(dim=(1, 2)))
    )
    weight = model.family.weight(model.levels, timesteps)
    return losses if weight is None else weight * losses


def loss_sums(
    model: Model,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    keys_values: KeysValues | None = None,
    cells: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of the losses of each text's samples: [texts] float64. Inputs as in `sample_losses`."""
    with torch.no_grad():
        return (
            sample_losses(model, latents, noise, timesteps, conditioning, keys_values, cells)
            .reshape(count_texts(conditioning), -1)
            .sum(dim=1)
        )


@contextmanager
def changed_losses(
    model: Model, changes: Sequence[Mapping[str, torch.Tensor]]
) -> Iterator[Callable[[Sequence[int]], Callable[..., torch.Tensor]]]:
    """Yields measure_of(numbers): the measure for `score_rows` of each text's `loss_sums` under
    some of several weight changes of K and V, [texts, numbers] float64. changes: [{parameter name:
    tensor}, ...]; the model itself is not changed."""
    text = model.family.text

    def changed_sums(model, number, *samples):
        with text.changed(model.denoiser, samples[-1], changes[number]) as keys_values:
            return loss_sums(model, *samples, keys_values=keys_values)

    def measure_of(numbers):
        def measure(model, *samples):
            with torch.no_grad(), remembered():
                return torch.stack(
                    [changed_sums(model, number, *samples) for number in numbers], dim=1
                )

        return measure

    with sharing_prefix(model.family.before_text(model.denoiser)):
        yield measure_of


def score_rows(
    model: Model,
    training_set: TrainingSet,
    rows: np.ndarray,
    grid: Sequence[int],
    noises: np.ndarray,
    batch_size: int,
    measure: Callable[..., torch.Tensor] = loss_sums,
) -> np.ndarray:
    """Losses [rows] float64, each the mean over captions and grid; `batch_size` samples go through
    the model at once.

    noises: [rows, captions * timesteps, C, h, w] in the order caption, timestep. measure: what is
    averaged, from a model and samples (`sample_losses`) to its sum over the samples of each text,
    [texts, ...]; the result is then [rows, ...].
    """
    views, images = np.divmod(rows, len(training_set))
    of_images = f"of {training_set.ids[images[0]]} to {training_set.ids[images[-1]]}"

    def read(name: str, array: np.ndarray) -> torch.Tensor:
        check_pixels(f"{name} {of_images}", array)
        return torch.from_numpy(np.asarray(array, np.float32))

    latents = read("latents", training_set.latents[views, images])
    num_captions, shape, sums = training_set.embeddings.shape[1], latents.shape[1:], []
    drawn = torch.from_numpy(np.asarray(noises, np.float32))
    latents = latents.repeat_interleave(num_captions, dim=0)
    drawn, timesteps = drawn.reshape(len(latents), len(grid), *shape), torch.tensor(grid)
    # A batch is a block of texts x timesteps, so that a text's keys and values are made once.
    num_blocks = -(-len(latents) // max(1, batch_size // len(grid)))
    for texts in torch.arange(len(latents)).tensor_split(num_blocks):
        owners, captions = np.divmod(texts.numpy(), num_captions)
        conditioning = {  # of this block alone: a text may take 30 MB
            name: read(name, array)
            for name, array in training_set.texts(images[owners], captions).items()
        }
        partial = 0
        for slots in torch.arange(len(grid)).split(batch_size):
            latent, normals, told = map_tensors(
                lambda tensor: tensor.to(model.device, non_blocking=True),
                (
                    latents[texts],
                    drawn[texts][:, slots],
                    conditioning,
                ),
            )
            times = timesteps[slots].to(model.device).repeat(len(texts))
            partial = partial + measure(
                model,
                latent.repeat_interleave(len(slots), dim=0),
                normals.flatten(0, 1),
                times,
                told,
            )
        sums.append(partial)
    sums = torch.cat(sums).cpu()
    return (
        sums.reshape(len(rows), num_captions, *sums.shape[1:]).sum(dim=1)
        / (num_captions * len(grid))
    ).numpy()
