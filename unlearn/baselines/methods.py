"""The baselines behind one interface: a method is a function from a Run to the scores of all its
queries.

Scores are a list with one array a query, [exemplars + N] float: its exemplars, where its model was
customized, then the training set. Higher is more influential.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .. import noise
from ..attribution.curvature import DiagonalFisher
from ..attribution.losses import chunk_noise, noise_identity
from ..attribution.newton import QueryDraws, query_gradient
from ..datasets.training_sets import TrainingSet
from ..models.generation import initial_noise
from ..models.pipelines import Model, select_parameters, tracked
from ..runtime.programs import progress
from ..storage.hashes import digest
from .gradients import (
    cache_reduced,
    expected_latents,
    kernel_scores,
    mean_gradient,
    reduce_images,
    view_samples,
)
from .projection import Sketch
from .similarity import (
    cosine_scores,
    encode_blocks,
    latent_blocks,
    latent_encoder,
    mean_features,
    pixel_encoder,
    score_queries,
    text_blocks,
)

VIEWS = {"max": np.max, "mean": np.mean}  # how an image's score follows from those of its views
INFLUENCE_WEIGHTS = "cross-attn-kv"
SWEEP = ("time_samples", "noise_seed", "precision", "views")
TRAK = ("weight_selection", "projection_size", "trak_lambda", "seed", *SWEEP)
SETTINGS = {  # flags that change a method's scores; they stand in its records
    "random": ("seed",),
    "trak": TRAK,
    "dtrak": TRAK,
    "journeytrak": (*TRAK, "num_inference_steps"),
    "influence": ("damping", "unlearn_batch_size", "unlearn_grad_accum_steps", "seed", *SWEEP),
}


@dataclass(frozen=True)
class Run:
    """What a method scores from."""

    model: Model
    training_set: TrainingSet
    tasks: list
    queries: list[TrainingSet]  # of one image and one view, in the order of the tasks
    args: SimpleNamespace  # resolved flags
    resolution: int
    grid: list[int]  # of timesteps
    folder: Path  # RESULT_DIR/baselines
    fisher: DiagonalFisher | None = None
    readings: dict = field(default_factory=dict)  # of pictures that are not read plainly, by id


def random_scores(run):
    """Uniform numbers that belong to the query and the seed."""
    return [
        noise.image_generator(
            run.args.seed, query.name, f"random order, {query.ids[0]}"
        ).random_raw(len(task.exemplar_paths) + len(run.training_set))
        / 2.0**64
        for task, query in zip(run.tasks, run.queries)
    ]


def feature_scores(run, encode, blocks, name):
    """Centred cosine to the query's picture, of the better of an image's two views. blocks: see
    `score_queries`."""
    with progress(2 * len(run.training_set), name, "images") as bar:
        return list(score_queries(encode, blocks, run.tasks, run.args.dataroot, bar.update))


def picture_scores(run, encode, name):
    """Cosine of what an encoder makes of the training images' pictures."""
    return feature_scores(run, encode, lambda: encode_blocks(encode, run.training_set.paths), name)


def pixel_scores(run):
    """Cosine of pixels."""
    return picture_scores(run, pixel_encoder(run.resolution), "pixel")


def vae_scores(run):
    """Cosine of VAE latents."""
    return feature_scores(
        run,
        latent_encoder(run.model.pipeline, run.resolution, run.args.vae_batch_size),
        lambda: latent_blocks(run.training_set),
        "vae",
    )


def compare_queries(run, queries, blocks, name):
    """Centred cosines [queries, N] of the queries' features with the training set's. blocks: see
    `score_queries`."""
    with progress(2 * len(run.training_set), name, "images") as bar:
        mean = mean_features(blocks(), bar.update)
        return cosine_scores(
            np.stack([features.reshape(-1) for features in queries]), blocks(), mean, bar.update
        )


def text_scores(run, name="text"):
    """Cosine of the prompt's embedding and the best caption's, last hidden states with every
    token."""
    return list(
        compare_queries(
            run,
            [query.embeddings[0, 0] for query in run.queries],
            lambda: text_blocks(run.training_set),
            name,
        )
    )


def similarity_scores(run):
    """Cosine of prompt and caption times cosine of VAE latents, negative ones taken as 0, squared:
    what can be said without the model that made the picture."""
    texts = np.array(text_scores(run, "similarity, texts"))
    latents = compare_queries(
        run,
        [query.latents[0, 0] for query in run.queries],
        lambda: latent_blocks(run.training_set),
        "similarity, latents",
    )
    return list((np.maximum(texts, 0) * np.maximum(latents, 0)) ** 2)


def sweep_identity(run, function, selection):
    """Identity of gradients of the training set."""
    return {
        **run.model.identity,
        "training_set": run.training_set.identity,
        "function": function,
        "weight_selection": selection,
        "timesteps": run.grid,
        "noise_seed": run.args.noise_seed,
        "precision": run.args.precision,
        **noise_identity(None, run.model.device),
    }


def sweep(run, function, parameters, reduce):
    """`compute` of gradients.cache_reduced over the training set."""
    return lambda images, pool: reduce_images(
        run.model,
        parameters,
        function,
        run.training_set,
        images,
        run.grid,
        run.args.noise_seed,
        run.args.batch_size,
        reduce,
        pool,
    )


def flatten(gradients):
    """Gradients {name: tensor} as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def query_tensors(run, number):
    """Latent [C, h, w] and embedding [tokens, features] of a query, on the model's device."""
    arrays = run.queries[number].latents[0, 0], run.queries[number].embeddings[0, 0]
    return [torch.from_numpy(np.array(array, np.float32)).to(run.model.device) for array in arrays]


def influence_scores(run):
    """grad L(z)^T F^-1 grad L(z_hat): unlearning and its loss changes, both to first order. Source:
    [AbU] appendix A.3.

    The query's gradient is over unlearning's own draws, not over the grid of the losses: it is then
    the first Newton step that compute_influence.py takes, and what sets the two apart is the first
    order alone, not the noise of few draws.
    """
    args, parameters = run.args, select_parameters(run.model.denoiser, INFLUENCE_WEIGHTS)

    @cache
    def directions():
        steps = []
        for number, query in enumerate(run.queries):
            draws = QueryDraws(args.seed, query.name, query.ids[0], len(run.model.alpha_bars))
            gradient = query_gradient(
                run.model,
                parameters,
                *query_tensors(run, number),
                draws,
                0,
                args.unlearn_batch_size * args.unlearn_grad_accum_steps,
                args.batch_size,
            )
            steps.append(flatten(run.fisher.precondition(gradient)))
        return torch.stack(steps)

    identity = {
        **sweep_identity(run, "loss", INFLUENCE_WEIGHTS),
        "fisher": run.fisher.identity,
        "seed": args.seed,
        "draws": QueryDraws.scheme,
        "unlearn_batch_size": args.unlearn_batch_size,
        "unlearn_grad_accum_steps": args.unlearn_grad_accum_steps,
        "queries": [query.identity for query in run.queries],
    }
    with tracked(parameters):
        products = cache_reduced(
            run.folder / f"influence/products-{digest(identity)[:16]}.npy",
            identity,
            run.training_set,
            sweep(run, "loss", parameters, lambda gradients: directions() @ flatten(gradients)),
            args.overwrite,
        )
    return list(VIEWS[args.views](products, axis=1).T)


def noised_gradient(run, parameters, function, number):
    """A query's gradient as a training image's, over captions and grid under its own noise."""
    query = run.queries[number]
    normals = chunk_noise(
        query, np.arange(1), run.grid, run.args.noise_seed, SimpleNamespace(map=map)
    )
    samples = view_samples(query, 0, 0, run.grid, normals[0], run.model.device)
    return mean_gradient(run.model, parameters, function, samples, run.args.batch_size)


def journey_gradient(run, parameters, function, number):
    """A query's gradient along its own sampling trajectory: the mean over the steps of that at the
    final latents which the model expects there, noised to the step's timestep. The trajectory
    starts where the query's seed has it, elsewhere at noise that belongs to the query. Source:
    [Journey], averaged over the steps as in [D-TRAK]."""
    task, query, args = run.tasks[number], run.queries[number], run.args
    shape, embedding = query.latents.shape[2:], query_tensors(run, number)[1]
    start = (
        initial_noise(query.name, [task.seed], shape)[0]
        if task.seed is not None
        else noise.image_noise(
            args.noise_seed, query.name, f"journey of {query.ids[0]}", [(0, 0, 0, 0)], shape
        )[0]
    )
    latents, timesteps = expected_latents(
        run.model, embedding, torch.from_numpy(start).to(run.model.device), args.num_inference_steps
    )
    slots = [(0, 0, timestep, 0) for timestep in timesteps.tolist()]
    normals = torch.from_numpy(
        noise.image_noise(args.noise_seed, query.name, query.ids[0], slots, shape)
    ).to(run.model.device)
    samples = latents, normals, timesteps, embedding.expand(len(latents), -1, -1)
    return mean_gradient(run.model, parameters, function, samples, args.batch_size)


def projected_scores(run, function, folder, gradient):
    """TRAK: projected gradients of a function, of the training set and of the queries, and the
    kernel between them.

    The features of the training set are cached under `folder`, whatever lambda, views and queries:
    choosing those is cheap. Views are rows of their own, and an image's score by default is the
    larger: [AbU] B.3 treats all baselines so.
    """
    args, parameters = run.args, select_parameters(run.model.denoiser, run.args.weight_selection)
    identity = {
        **sweep_identity(run, function, args.weight_selection),
        "projection_size": args.projection_size,
        "seed": args.seed,
    }
    with tracked(parameters):
        sketch = Sketch(parameters, args.projection_size, args.seed, run.model.device)
        features = cache_reduced(
            run.folder / folder / "features.npy",
            identity,
            run.training_set,
            sweep(run, function, parameters, sketch.project),
            args.overwrite,
        )
        queries = [
            sketch.project(gradient(run, parameters, function, number)).cpu().numpy()
            for number in range(len(run.queries))
        ]
    return list(
        VIEWS[args.views](kernel_scores(features, np.stack(queries), args.trak_lambda), axis=2)
    )


def trak_scores(run):
    """Gradients of the loss. Source: [TRAK], for diffusion models as [D-TRAK] describes it."""
    return projected_scores(run, "loss", "trak", noised_gradient)


def dtrak_scores(run):
    """Gradients of the squared norm of the output. Source: [D-TRAK]."""
    return projected_scores(run, "norm", "dtrak", noised_gradient)


def journeytrak_scores(run):
    """TRAK's gradients of the training images, the query's along its trajectory. Source:
    [Journey]."""
    return projected_scores(run, "loss", "trak", journey_gradient)


METHODS = {
    "random": random_scores,
    "pixel": pixel_scores,
    "vae": vae_scores,
    "text": text_scores,
    "similarity": similarity_scores,
    "influence": influence_scores,
    "trak": trak_scores,
    "journeytrak": journeytrak_scores,
    "dtrak": dtrak_scores,
}
OF_PICTURES = ("pixel",)  # need the training images' pictures
OF_COSINES = ("pixel", "vae", "text", "similarity")
CENTRED = {
    "cosines": "centred on the training set's mean"
}  # in the records of these and of feature models
OF_BASE_MODEL = (
    "text",
    "similarity",
    "influence",
    "trak",
    "journeytrak",
    "dtrak",
)  # score the base model's queries only
