"""Gradients of single images, reduced at once to a few numbers each, and the scores that TRAK makes
of them.

[TRAK]: Park et al., ICML 2023, arXiv 2303.14186. [Journey]: Georgiev et al. 2023, arXiv 2312.06205.
[D-TRAK]: Zheng et al., ICLR 2024, arXiv 2311.00500.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..attribution.draws import CHUNK_IMAGES, chunk_noise, rows_of
from ..attribution.losses import sample_losses
from ..datasets.conditioning import Conditioning, count_texts, map_tensors, repeat_texts
from ..datasets.training_sets import TrainingSet, check_pixels
from ..errors import UserError
from ..models.generation import generate_latents
from ..models.pipelines import Model
from ..runtime.programs import progress
from ..runtime.signals import finishing
from ..storage.artifacts import whole_file
from ..storage.chunks import read_array_chunk, write_array_chunk
from ..storage.hashes import digest
from ..storage.reading import read_array
from ..storage.records import keep_complete, record_path, write_record
from ..storage.sharing import Share, build_once

BLOCK_ROWS = 4096  # feature rows in memory at once
Reduce = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]  # of an image's gradients, to [size]


def output_norms(
    model: Model,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """|| prediction ||^2 of each sample: [batch] float64. Source: [D-TRAK] section 3, the squared
    L2 norm of the output."""
    prediction = model.predict(model.diffuse(latents, noise, timesteps), timesteps, conditioning)
    return prediction.double().square().sum(dim=tuple(range(1, prediction.ndim)))


def output_means(
    model: Model,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
) -> torch.Tensor:
    """The prediction's mean over pixels of each sample: [batch] float64. Source: [DAS]."""
    prediction = model.predict(model.diffuse(latents, noise, timesteps), timesteps, conditioning)
    return prediction.double().mean(dim=tuple(range(1, prediction.ndim)))


FUNCTIONS = {
    "loss": sample_losses,
    "norm": output_norms,
    "mean": output_means,
}  # whose gradients are taken, of samples as in losses.sample_losses


def mean_gradient(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    function: str,
    samples: Sequence[Any],
    batch_size: int,
) -> dict[str, torch.Tensor]:
    """Gradient of a function's mean over samples, {name: tensor}; `batch_size` samples go through
    the model at once.

    samples: latents, noise, timesteps, conditioning (a text a sample), on the model's device;
    parameters: `tracked`.
    """
    count = len(samples[0])
    sums: list[torch.Tensor] = []
    for start in range(0, count, batch_size):
        values = FUNCTIONS[function](
            model, *map_tensors(itemgetter(slice(start, start + batch_size)), samples)
        )
        gradients = torch.autograd.grad(
            values.sum() / count, list(parameters.values()), materialize_grads=True
        )
        sums = [sum + gradient for sum, gradient in zip(sums, gradients)] or list(gradients)
    return dict(zip(parameters, sums))


def normalised_gradient(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    function: str,
    samples: Sequence[Any],
) -> dict[str, torch.Tensor]:
    """Mean over samples of the gradient of a function of each, brought to length 1 over all weights,
    {name: tensor}; one sample goes through the model at once. Zero gradients stay zero. Arguments
    as of `mean_gradient`."""
    count, sums = len(samples[0]), {}
    for number in range(count):
        own = map_tensors(itemgetter(slice(number, number + 1)), samples)
        gradient = mean_gradient(model, parameters, function, own, 1)
        length = torch.stack([part.double().norm() for part in gradient.values()]).norm()
        scale = 1 / (count * float(length)) if length > 0 else 0.0
        for name, part in gradient.items():
            sums[name] = sums[name] + scale * part if number else scale * part
    return sums


def view_samples(
    training_set: TrainingSet,
    view: int,
    image: int,
    grid: Sequence[int],
    normals: np.ndarray,
    device: torch.device | str,
) -> tuple[Any, ...]:
    """The samples of one view of an image: each caption at each timestep. normals: [captions *
    timesteps, C, h, w]."""
    latent, conditioning = training_set.image_tensors(view, image, device)
    noise = torch.from_numpy(normals).to(device)
    return (
        latent.expand_as(noise),
        noise,
        torch.tensor(grid, device=device).repeat(count_texts(conditioning)),
        repeat_texts(conditioning, len(noise)),
    )


def reduce_images(
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    function: str,
    training_set: TrainingSet,
    images: Sequence[int],
    grid: Sequence[int],
    noise_seed: int,
    batch_size: int,
    reduce: Reduce,
    pool: Executor,
    is_normalised: bool = False,
) -> np.ndarray:
    """`reduce` of each image's mean gradient over captions and grid, under the image's own noise,
    as in losses.score_rows: [images, views, size] float32. reduce: from {name: tensor} to [size];
    is_normalised: whether `normalised_gradient` takes the mean.

    One backward pass an image and view, whose samples fill the batch: on a CPU as fast as
    per-sample gradients of many images at once (vmap, or outer products by layer), and only one
    gradient is ever held.
    """
    num_views = training_set.latents.shape[0]
    rows = rows_of(images, len(training_set), num_views)
    normals = chunk_noise(training_set, rows, grid, noise_seed, pool)
    reduced = []
    for row, own in zip(rows, normals):
        place = divmod(int(row), len(training_set))
        given = (
            model,
            parameters,
            function,
            view_samples(training_set, *place, grid, own, model.device),
        )
        gradient = (
            normalised_gradient(*given) if is_normalised else mean_gradient(*given, batch_size)
        )
        reduced.append(reduce(gradient))
    return (
        torch.stack(reduced)
        .float()
        .cpu()
        .numpy()
        .reshape(num_views, len(images), -1)
        .swapaxes(0, 1)
    )


def cache_reduced(
    path: Path,
    identity: dict,
    training_set: TrainingSet,
    compute: Callable[[Sequence[int], Executor], np.ndarray],
    overwrite: bool,
) -> np.ndarray:
    """What `compute(images, pool)` gives of every image, [N, views, size] float32, memory-mapped
    from `path` (.npy). Chunks of images stand beside it until all are done, so that a run that was
    killed goes on and processes share them. Raises UserError where the file was made with other
    settings and may not be overwritten."""
    starts = range(0, len(training_set), CHUNK_IMAGES)
    images = [range(start, min(start + CHUNK_IMAGES, len(training_set))) for start in starts]

    def is_kept():
        return keep_complete(
            path, identity, overwrite, "give --overwrite to replace it, or another --result_dir"
        )

    def fill(folder):
        chunks = {folder / f"{some.start:08d}.npy": some for some in images}
        fill_chunks(folder, chunks, compute, path.parent.name)
        return chunks

    def write(chunks):
        join_chunks(path, identity, chunks, training_set)

    build_once(path, digest(identity), is_kept, fill, write)
    return read_array(path, "gradients")


def fill_chunks(
    folder: Path,
    chunks: dict[Path, range],
    compute: Callable[[Sequence[int], Executor], np.ndarray],
    description: str,
) -> None:
    """Writes what `compute(images, pool)` gives of every chunk, {path in folder: images}; those
    that other processes are at are theirs. Returns when all are there, or the folder is not,
    because another process was done with it."""
    done = sum(len(images) for chunk, images in chunks.items() if chunk.exists())
    with (
        ThreadPoolExecutor(4) as pool,
        progress(
            sum(map(len, chunks.values())), f"gradients, {description}", "images", done
        ) as bar,
        Share(folder, {chunk: chunk.stem for chunk in chunks}, Path.exists) as share,
    ):
        for chunk in share:
            with finishing(), suppress(FileNotFoundError):
                write_array_chunk(chunk, compute(chunks[chunk], pool))
            share.release(chunk)
            bar.update(len(chunks[chunk]))


def join_chunks(
    path: Path, identity: dict, chunks: dict[Path, range], training_set: TrainingSet
) -> None:
    """Writes the arrays of all chunks as one (.npy float32), chunk by chunk, and its record."""
    first = read_array_chunk(next(iter(chunks)))
    record_path(path).unlink(missing_ok=True)
    with whole_file(path) as file:
        np.lib.format.write_array_header_1_0(
            file,
            {
                "descr": "<f4",
                "fortran_order": False,
                "shape": (len(training_set), *first.shape[1:]),
            },
        )
        for chunk in chunks:
            array = read_array_chunk(chunk)
            check_pixels(
                f"gradients of {training_set.ids[chunks[chunk][0]]} and the next "
                f"{len(array) - 1} images",
                array,
            )
            file.write(array.tobytes())
    write_record(path, identity)


def kernel_scores(features: np.ndarray, queries: np.ndarray, damping: float) -> np.ndarray:
    """phi(z)^T (Phi^T Phi + lambda I)^-1 phi(z_hat) of all views of all images, [queries, N, views]
    float64; Phi holds every view as a row, lambda is `damping` times the mean of the diagonal of
    Phi^T Phi.

    features: [N, views, size]; queries: [queries, size]. Removing an image of high score raises the
    function that the gradients are of. Source: [TRAK] Eq. 13 without the diagonal Q, which [D-TRAK]
    leaves out; lambda as in [D-TRAK].
    """
    rows = features.reshape(-1, features.shape[-1])
    blocks = range(0, len(rows), BLOCK_ROWS)
    kernel = np.zeros((rows.shape[1], rows.shape[1]))
    for start in blocks:
        block = np.asarray(rows[start : start + BLOCK_ROWS], np.float64)
        kernel += block.T @ block
    kernel[np.diag_indices_from(kernel)] += damping * np.trace(kernel) / len(kernel)
    solved = np.linalg.solve(kernel, np.asarray(queries, np.float64).T)
    scores = [np.asarray(rows[start : start + BLOCK_ROWS], np.float64) @ solved for start in blocks]
    return np.concatenate(scores).T.reshape(len(queries), *features.shape[:2])


# prediction type -> the latents that a prediction expects at the end, from alpha-bar, noisy
# latents, prediction
EXPECTED = {
    "epsilon": lambda alpha_bar, noisy, prediction: (
        (noisy - (1 - alpha_bar).sqrt() * prediction) / alpha_bar.sqrt()
    ),
    "sample": lambda alpha_bar, noisy, prediction: prediction,
    "v_prediction": lambda alpha_bar, noisy, prediction: (
        alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * prediction
    ),
}


@torch.no_grad()
def expected_latents(
    model: Model, conditioning: Conditioning, start: torch.Tensor, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model expects the final latents to be at each step of the sampling trajectory from
    `start`: latents [steps, C, h, w] and the steps' timesteps, on the model's device.

    conditioning: {name: [1, ...]}; start: noise [C, h, w]; sampled as in
    generation.generate_latents, without guidance. Source: [Journey], which attributes a step by
    what the model expects there, not by the final image. Raises UserError where a family samples
    between its training timesteps.
    """
    if model.prediction_type not in EXPECTED:
        raise UserError(
            f"--methods journeytrak: {model.family.name} samples between its training timesteps, at "
            f"which no training image has a gradient; leave it out"
        )
    seen, steps = [], []
    generate_latents(
        model,
        conditioning,
        start[None],
        num_steps,
        callback=lambda latents, timestep: (
            seen.append(latents[0].clone()),
            steps.append(int(timestep)),
        ),
    )
    noisy, timesteps = torch.stack(seen), torch.tensor(steps, device=model.device)
    prediction = model.predict(noisy, timesteps, repeat_texts(conditioning, len(noisy)))
    return EXPECTED[model.prediction_type](
        model.alpha_bars[timesteps][:, None, None, None], noisy, prediction
    ), timesteps
