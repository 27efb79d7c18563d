"""Methods that compare gradients of training images with the query's: influence functions and the
TRAK family. [TRAK], [Journey] and [D-TRAK] stand in `gradients`."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from .. import noise
from ..attribution.draws import QueryDraws, chunk_noise
from ..attribution.fishers import own_selection
from ..attribution.newton import query_gradient
from ..attribution.sketch import Sketch
from ..datasets.conditioning import repeat_texts
from ..datasets.tasks import Task
from ..models.generation import initial_noise
from ..models.pipelines import select_parameters, tracked
from ..storage.hashes import digest
from .gradients import (
    Reduce,
    cache_reduced,
    expected_latents,
    kernel_scores,
    mean_gradient,
    normalised_gradient,
    reduce_images,
    view_samples,
)
from .interface import Method, Run

VIEWS = {"max": np.max, "mean": np.mean}  # how an image's score follows from those of its views
BLOCKS = 4  # of a projection: one would keep heavy weights that collide from being told apart


def sweep_identity(run: Run, method: "Influence | Trak", function: str, selection: str) -> dict:
    """Identity of gradients of the training set."""
    return {
        **run.model.identity,
        "training_set": run.training_set.identity,
        "function": function,
        "weight_selection": selection,
        "timesteps": run.grid,
        "noise_seed": method.noise_seed,
        "precision": method.precision,
        **noise.identity(),
    }


def sweep(
    run: Run,
    noise_seed: int,
    function: str,
    parameters: dict[str, torch.nn.Parameter],
    reduce: Reduce,
    is_normalised: bool = False,
) -> Callable[[Sequence[int], Executor], np.ndarray]:
    """`compute` of gradients.cache_reduced over the training set."""
    return lambda images, pool: reduce_images(
        run.model,
        parameters,
        function,
        run.training_set,
        images,
        run.grid,
        noise_seed,
        run.batch_size,
        reduce,
        pool,
        is_normalised,
    )


def flatten(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Gradients {name: tensor} as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@dataclass(frozen=True)
class Influence(Method):
    """grad L(z)^T F^-1 grad L(z_hat): unlearning and its loss changes, both to first order. Source:
    [AbU] appendix A.3.

    The query's gradient is over unlearning's own draws, not over the grid of the losses: it is then
    the first Newton step that compute_influence.py takes, and what sets the two apart is the first
    order alone, not the noise of few draws.
    """

    damping: float
    unlearn_batch_size: int
    unlearn_grad_accum_steps: int
    seed: int
    time_samples: int
    noise_seed: int
    precision: str
    views: str

    needs_base_model = True
    needs_fisher = True  # of the weights that unlearning looks at

    def own_identity(self, run: Run) -> dict:
        return noise.identity()

    def product_identity(self, run: Run) -> dict:
        """Identity of the products with all queries."""
        return {
            **sweep_identity(run, self, "loss", own_selection(run.model)),
            "fisher": run.needed_fisher.identity,
            "seed": self.seed,
            "draws": QueryDraws.scheme,
            "unlearn_batch_size": self.unlearn_batch_size,
            "unlearn_grad_accum_steps": self.unlearn_grad_accum_steps,
            "queries": [query.identity for query in run.queries],
        }

    def direction(
        self, run: Run, parameters: dict[str, torch.nn.Parameter], number: int
    ) -> torch.Tensor:
        """F^-1 grad L of a query, [weights]."""
        query = run.queries[number]
        gradient = query_gradient(
            run.model,
            parameters,
            *query.query_tensors(run.model.device),
            QueryDraws(self.seed, query.name, query.ids[0], run.model.num_train_timesteps),
            0,
            self.unlearn_batch_size * self.unlearn_grad_accum_steps,
            run.batch_size,
        )
        return flatten(run.needed_fisher.precondition(gradient))

    def scores(self, run: Run) -> list[np.ndarray]:
        parameters = select_parameters(run.model.denoiser, own_selection(run.model))
        identity = self.product_identity(run)

        @cache
        def directions():
            return torch.stack(
                [self.direction(run, parameters, number) for number in range(len(run.queries))]
            )

        with tracked(parameters):
            products = cache_reduced(
                run.folder / f"influence/products-{digest(identity)[:16]}.npy",
                identity,
                run.training_set,
                sweep(
                    run,
                    self.noise_seed,
                    "loss",
                    parameters,
                    lambda gradients: directions() @ flatten(gradients),
                ),
                run.overwrite,
            )
        return list(VIEWS[self.views](products, axis=1).T)


@dataclass(frozen=True)
class Trak(Method):
    """Projected gradients of the loss, of the training set and of the queries, and the kernel
    between them. Source: [TRAK], for diffusion models as [D-TRAK] describes it.

    The features of the training set are cached, whatever lambda, views and queries: choosing those
    is cheap. Views are rows of their own, and an image's score by default is the larger: [AbU] B.3
    treats all baselines so.
    """

    weight_selection: str
    projection_size: int
    trak_lambda: float
    seed: int
    time_samples: int
    noise_seed: int
    precision: str
    views: str

    needs_base_model = True
    function = "loss"  # whose gradients are taken, a key of `gradients.FUNCTIONS`
    is_normalised = False  # whether each sample's gradient is brought to length 1
    cache_folder = "trak"  # of the training set's features, which JourneyTrak shares

    def own_identity(self, run: Run) -> dict:
        return noise.identity()

    def gradient_of(
        self, run: Run, parameters: dict[str, torch.nn.Parameter], number: int
    ) -> dict[str, torch.Tensor]:
        """A query's gradient as a training image's, over captions and grid under its own noise."""
        query = run.queries[number]
        with ThreadPoolExecutor(1) as pool:
            normals = chunk_noise(query, np.arange(1), run.grid, self.noise_seed, pool)
        samples = view_samples(query, 0, 0, run.grid, normals[0], run.model.device)
        if self.is_normalised:
            return normalised_gradient(run.model, parameters, self.function, samples)
        return mean_gradient(run.model, parameters, self.function, samples, run.batch_size)

    def feature_identity(self, run: Run) -> dict:
        """Identity of the training set's features."""
        averaged = {"gradients": "each of length 1"} if self.is_normalised else {}
        return {
            **sweep_identity(run, self, self.function, self.weight_selection),
            **averaged,
            "projection_size": self.projection_size,
            "seed": self.seed,
        }

    def products(self, run: Run) -> np.ndarray:
        """The kernel of every query with every view of every image, [queries, N, views] float64."""
        parameters = select_parameters(run.model.denoiser, self.weight_selection, with_unread=True)
        with tracked(parameters):
            sketch = Sketch(parameters, self.projection_size, self.seed, run.model.device, BLOCKS)
            features = cache_reduced(
                run.folder / self.cache_folder / "features.npy",
                self.feature_identity(run),
                run.training_set,
                sweep(
                    run,
                    self.noise_seed,
                    self.function,
                    parameters,
                    sketch.project,
                    self.is_normalised,
                ),
                run.overwrite,
            )
            queries = [
                sketch.project(self.gradient_of(run, parameters, number)).cpu().numpy()
                for number in range(len(run.queries))
            ]
        return kernel_scores(features, np.stack(queries), self.trak_lambda)

    def scores(self, run: Run) -> list[np.ndarray]:
        return list(VIEWS[self.views](self.products(run), axis=2))


@dataclass(frozen=True)
class DTrak(Trak):
    """TRAK with gradients of the squared norm of the output. Source: [D-TRAK]."""

    function = "norm"
    cache_folder = "dtrak"


@dataclass(frozen=True)
class JourneyTrak(Trak):
    """TRAK's gradients of the training images, the query's along its trajectory. Source:
    [Journey]."""

    num_inference_steps: int

    def gradient_of(
        self, run: Run, parameters: dict[str, torch.nn.Parameter], number: int
    ) -> dict[str, torch.Tensor]:
        """A query's gradient along its own sampling trajectory: the mean over the steps of that at
        the final latents which the model expects there, noised to the step's timestep. The
        trajectory starts where the query's seed has it, elsewhere at noise that belongs to the
        query. Source: [Journey], averaged over the steps as in [D-TRAK]."""
        task, query = run.tasks[number], run.queries[number]
        shape, conditioning = query.latents.shape[2:], query.query_tensors(run.model.device)[1]
        start = (
            initial_noise(query.name, [task.seed], shape)[0]
            if task.seed is not None
            else noise.image_noise(
                self.noise_seed, query.name, f"journey of {query.ids[0]}", [(0, 0, 0, 0)], shape
            )[0]
        )
        latents, timesteps = expected_latents(
            run.model,
            conditioning,
            torch.from_numpy(start).to(run.model.device),
            self.num_inference_steps,
        )
        slots = [(0, 0, timestep, 0) for timestep in timesteps.tolist()]
        normals = torch.from_numpy(
            noise.image_noise(self.noise_seed, query.name, query.ids[0], slots, shape)
        ).to(run.model.device)
        samples = latents, normals, timesteps, repeat_texts(conditioning, len(latents))
        return mean_gradient(run.model, parameters, self.function, samples, run.batch_size)

    def query_identity(self, run: Run, task: Task) -> dict:
        return {"query_seed": task.seed}  # its trajectory starts where the query's own did
