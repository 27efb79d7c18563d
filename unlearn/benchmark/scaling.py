"""How cost grows with images and timesteps: training sets of any size in a model's own shapes, made
up and memory-mapped."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..attribution.derivatives import second_order_dots
from ..attribution.losses import loss_sums
from ..attribution.sweeps import Sweep
from ..datasets.training_sets import TrainingSet
from ..noise import timestep_grid
from ..runtime.programs import log
from ..storage.reading import read_array
from .meters import metered
from .workloads import Bench

GRIDS = (1, 2, 5, 10)  # timesteps of the smallest training set; the others have one
WRITTEN_AT_ONCE = 1000  # images


def make_training_set(
    num_images: int, latent_shape: Sequence[int], embedding: np.ndarray, path: Path, seed: int = 0
) -> TrainingSet:
    """A training set of standard normals, its latents in the file `path` (.npy, memory-mapped), all
    of one text. embedding: [tokens, features]."""
    generator = np.random.default_rng(seed)
    latents = np.lib.format.open_memmap(path, "w+", np.float32, (2, num_images, *latent_shape))
    for start in range(0, num_images, WRITTEN_AT_ONCE):
        block = latents[:, start : start + WRITTEN_AT_ONCE]
        block[:] = generator.standard_normal(block.shape, np.float32)
    latents.flush()
    embeddings = np.broadcast_to(embedding, (num_images, 1, *embedding.shape))
    return TrainingSet(
        "scaling",
        [f"made up/{index:06d}" for index in range(num_images)],
        [""] * num_images,
        [None] * num_images,
        read_array(path),
        embeddings,
        f"seeded {seed}",
    )


def measure_sweep(
    bench: Bench,
    training_set: TrainingSet,
    grid: list[int],
    measure: Callable[..., torch.Tensor],
    batch_size: int,
) -> dict:
    """Seconds, microseconds a sample and peak memory of one sweep."""
    folder = bench.folder / "scaling"
    folder.mkdir(exist_ok=True)
    with metered(bench.world.model.device) as costs:
        Sweep(training_set, grid, batch_size).run(
            bench.world.model, folder, f"{len(training_set)} images x {len(grid)}", measure
        )
    for chunk in folder.iterdir():
        chunk.unlink()
    num_samples = 2 * len(training_set) * len(grid)
    return {
        "seconds": costs["seconds"],
        "microseconds_a_sample": costs["seconds"] / num_samples * 1e6,
        "peak_host_bytes": costs["host_bytes"],
        "peak_device_bytes": costs["device_bytes"],
    }


def measure_scaling(bench: Bench, sizes: Sequence[int], grids: Sequence[int] = GRIDS) -> list[dict]:
    """One row for each number of images at one timestep, and for each other number of timesteps of
    the fewest images: exact scoring, a query a sweep, and gradient scoring, all queries in one."""
    num_timesteps = bench.world.model.num_train_timesteps
    latents, embedding = bench.world.query_latents, np.asarray(bench.world.query_embeddings[0])
    gradients, rows = second_order_dots(bench.changes), []
    for num_images, count in [
        *((size, 1) for size in sizes),
        *((min(sizes), count) for count in grids if count > 1),
    ]:
        path = bench.folder / "scaling.npy"
        training_set = make_training_set(num_images, latents.shape[1:], embedding, path)
        grid = timestep_grid(count, num_timesteps)
        exact = measure_sweep(bench, training_set, grid, loss_sums, bench.settings.batch_size)
        gradient = measure_sweep(
            bench, training_set, grid, gradients, bench.settings.gradient_batch_size
        )
        rows.append(
            {"num_images": num_images, "timesteps": count, "exact": exact, "gradient": gradient}
        )
        log.info(
            f"{num_images} images x {count}: exact {exact['seconds']:.1f} s, gradient "
            f"{gradient['seconds']:.1f} s"
        )
        path.unlink()
    return rows
