"""What the benchmark runs on: the emoji world, and the UNets of Stable Diffusion v1.4 and of the
MSCOCO model built from their configurations with seeded weights, which cost what trained ones do.
Nothing is downloaded.

Untrained cross-attention averages over all tokens, so that a loss changes by less than a trained
model's would and rounding weighs more: beside each fidelity stands the size of the change."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from ..attribution.curvature import DiagonalFisher, squared_gradient_sums
from ..datasets.conditioning import TEXT
from ..datasets.training_sets import TrainingSet
from ..models.families import STABLE_DIFFUSION
from ..models.generation import generate_latents, initial_noise
from ..models.pipelines import Model, select_parameters
from ..models.unets import load_unet
from ..noise import timestep_grid
from ..storage.artifacts import write_tensors
from ..storage.reading import read_tensors
from .settings import BenchmarkSettings

SELECTION = "cross-attn-kv"
DAMPING = 0.1
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # of Stable Diffusion
CONFIGURATIONS = {  # of seeded UNets, their schedules, and the tokens of a text
    "sd14": {
        "unet": {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "cross_attention_dim": 768,
            **BLOCKS,
        },
        "scheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "tokens": 77,
    },
    "mscoco": {
        "unet": {
            "sample_size": 16,
            "block_out_channels": (128, 256, 256, 256),
            "cross_attention_dim": 1024,
            **BLOCKS,
        },
        "scheduler": {},
        "tokens": 77,
    },
}


@dataclass(frozen=True, eq=False)
class World:
    """A model with its training set, Fisher and queries."""

    model: Model
    training_set: TrainingSet  # of one caption an image
    grid: list[int]  # of timesteps
    query_latents: np.ndarray  # [queries, C, h, w]
    query_embeddings: np.ndarray  # [queries, tokens, features]
    fisher: DiagonalFisher
    rate: (
        float | None
        # alpha / N of a Newton step; None where it is chosen: of seeded weights and, for auto, of a
        # data root
    )
    # reads UNet and Fisher from their files, as the published program does for every query: the
    # Fisher
    load: Callable

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The weights that unlearning changes, by name."""
        return select_parameters(self.model.denoiser, SELECTION)

    def query(self, number: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latent [C, h, w] and conditioning {name: [1, ...]} of a query, on the model's device."""
        arrays = self.query_latents[number], self.query_embeddings[number]
        latent, embedding = (
            torch.from_numpy(np.array(array)).to(self.model.device) for array in arrays
        )
        return latent, {TEXT: embedding[None]}


def load_published(
    pipeline: str, unet: str | None, fisher_path: str | Path, device: torch.device
) -> dict[str, torch.Tensor]:
    """Loads a pipeline onto the device, and {name: entry} of a Fisher, as the published program
    does for every query."""
    parts = load_unet(unet) if unet else {}
    DiffusionPipeline.from_pretrained(
        pipeline, use_safetensors=True, safety_checker=None, **parts
    ).to(device)
    return {name: entries.to(device) for name, entries in read_tensors(fisher_path).items()}


def generate_queries(
    model: Model, training_set: TrainingSet, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [count, C, h, w] and embeddings [count, tokens, features] of pictures that the model
    makes of training captions, which are spread over the training set."""
    images = np.linspace(0, len(training_set) - 1, count).astype(int)
    embeddings = np.asarray(training_set.embeddings[images, 0], np.float32)
    start = initial_noise(
        training_set.name, range(seed, seed + count), training_set.latents.shape[2:]
    )
    texts, noises = (torch.from_numpy(array).to(model.device) for array in (embeddings, start))
    latents = generate_latents(model, {TEXT: texts}, noises)
    return latents.cpu().numpy(), embeddings


def multiply_images(training_set: TrainingSet, num_images: int, seed: int) -> TrainingSet:
    """A larger training set: the images, then made-up ones with ids of their own. A made-up latent
    is one image's, shifted by up to a latent pixel, mixed with 20 % of another's and a tenth of
    noise, under the first one's text."""
    generator, count = np.random.default_rng([seed, 2]), len(training_set)
    num_made_up = num_images - count
    first, second = generator.integers(count, size=(2, num_made_up))
    latents = 0.8 * training_set.latents[:, first] + 0.2 * training_set.latents[:, second]
    for image, shift in enumerate(generator.integers(-1, 2, size=(num_made_up, 2))):
        latents[0, image], latents[1, image] = (
            np.roll(latents[view, image], (shift[0], shift[1] * side), (-2, -1))
            for view, side in ((0, 1), (1, -1))
        )  # the second view is the mirror image
    latents += 0.1 * generator.standard_normal(latents.shape, np.float32)
    return TrainingSet(
        training_set.name,
        [*training_set.ids, *(f"made up/{index:06d}" for index in range(num_made_up))],
        [*training_set.captions, *(training_set.captions[index] for index in first)],
        [*training_set.paths, *[None] * num_made_up],
        np.concatenate([training_set.latents, latents], axis=1).astype(np.float32),
        np.concatenate([training_set.embeddings, training_set.embeddings[first]]),
        f"{training_set.source}, {seed}",
    )


def seeded_model(configuration: dict, device: torch.device, seed: int) -> Model:
    """A Model of seeded weights from `unet` and `scheduler`, keyword arguments of diffusers'
    classes; it can encode and decode nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**configuration["unet"])
    # diffusers wraps `to` so that checkers take its argument for self
    unet.eval().requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]
    STABLE_DIFFUSION.prepare(unet)
    scheduler = DDPMScheduler(**configuration["scheduler"])
    return Model(
        # all of a pipeline that scoring looks at
        cast(DiffusionPipeline, SimpleNamespace(unet=unet, scheduler=scheduler)),
        f"seeded {seed}",
        scheduler.alphas_cumprod.float().to(device),
        STABLE_DIFFUSION,
    )


def seeded_training_set(name: str, configuration: dict, num_images: int, seed: int) -> TrainingSet:
    """Images whose latents and embeddings are standard normals; the second view mirrors the
    first."""
    generator, unet = np.random.default_rng(seed), configuration["unet"]
    latents = generator.standard_normal(
        (num_images, 4, unet["sample_size"], unet["sample_size"]), np.float32
    )
    embeddings = generator.standard_normal(
        (num_images, 1, configuration["tokens"], unet["cross_attention_dim"]), np.float32
    )
    return TrainingSet(
        name,
        [f"seeded/{index:06d}" for index in range(num_images)],
        [""] * num_images,
        [None] * num_images,
        np.stack([latents, latents[..., ::-1]]),
        embeddings,
        f"seeded {seed}",
    )


def estimate_fisher(
    model: Model, training_set: TrainingSet, num_samples: int, batch_size: int, seed: int
) -> dict[str, torch.Tensor]:
    """Mean squared gradient of K and V over a few samples, {name: float32 tensor}: uniform images
    and timesteps."""
    generator = np.random.default_rng([seed, 1])
    parameters = select_parameters(model.denoiser, SELECTION)
    sums = {
        name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for start in range(0, num_samples, batch_size):
        images = generator.integers(len(training_set), size=min(batch_size, num_samples - start))
        latents = training_set.latents[0, images]
        timesteps = generator.integers(model.num_train_timesteps, size=len(images))
        arrays = latents, generator.standard_normal(latents.shape, np.float32), timesteps
        texts = {TEXT: training_set.embeddings[images, 0]}
        samples = [
            *(torch.from_numpy(array).to(model.device) for array in arrays),
            {name: torch.from_numpy(array).to(model.device) for name, array in texts.items()},
        ]
        for name, squares in squared_gradient_sums(model, parameters, samples).items():
            sums[name] += squares
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {name: (value / num_samples).float() for name, value in sums.items()}


def seeded_world(
    name: str, configuration: dict, settings: BenchmarkSettings, folder: Path
) -> World:
    """A World of seeded weights, images, queries and Fisher. Files that the published way loads for
    every query are written to `folder`."""
    model = seeded_model(configuration, settings.device, settings.seed)
    if (num_images := settings.num_images) is None:
        raise ValueError("num_images: a seeded world needs their number")
    images = seeded_training_set(
        name, configuration, num_images + settings.num_queries, settings.seed
    )
    training_set = images.first(num_images)
    queries = images.take(range(num_images, len(images)))
    diagonal = estimate_fisher(
        model, training_set, settings.fisher_samples, settings.gradient_batch_size, settings.seed
    )
    write_tensors(folder / "unet.safetensors", model.denoiser.state_dict())
    write_tensors(folder / "fisher.safetensors", diagonal)

    def load():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**configuration["unet"])
        unet.load_state_dict(read_tensors(folder / "unet.safetensors"), assign=True)
        unet.to(settings.device)  # pyright: ignore[reportArgumentType]  (see `seeded_model`)
        return {
            key: entries.to(settings.device)
            for key, entries in read_tensors(folder / "fisher.safetensors").items()
        }

    grid = timestep_grid(settings.time_samples, model.num_train_timesteps)
    fisher = DiagonalFisher(diagonal, DAMPING)
    return World(
        model, training_set, grid, queries.latents[0], queries.embeddings[:, 0], fisher, None, load
    )
