"""Attribution by bounded unlearning: a query is unlearned by ordinary training steps until the model
knows as little of it as one that was never trained, and images are scored by the skew of their
losses. [MUCS]: arXiv 2605.17938."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from .. import noise
from ..attribution.deltas import Delta
from ..attribution.draws import QueryDraws
from ..attribution.estimation import draw_samples
from ..attribution.losses import sample_losses
from ..datasets.conditioning import map_tensors, repeat_texts
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model, changed_weights, replaced_weights, tracked
from ..runtime.programs import progress
from ..storage.artifacts import write_tensors
from ..storage.hashes import digest
from ..storage.records import keep_complete, record_path, write_record
from ..storage.sharing import do_once
from .gradients import cache_reduced
from .interface import Method, Run
from .saving import REMEDY

LAYERS = r"\.ff(_context)?\.|\.proj_mlp\.|caption_projection|context_embedder"  # that are trained
WEIGHT = 0.2  # lambda: of the query's loss beside that of the training images
ENOUGH = 0.95  # of an untrained model's loss: the query is then unlearned
NOISIEST = 0.7  # share of all timesteps, the noisiest, at which images are scored
SMALLEST = 1e-3  # added to the sum of two losses that divides their difference
NULL_DRAWS = 256  # that measure an untrained model's loss


def select_layers(model: Model) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained: feed-forward layers and what reads the text. Raises UserError
    where a denoiser has none."""
    named = dict(model.denoiser.named_parameters())
    if not (found := {name: value for name, value in named.items() if re.search(LAYERS, name)}):
        raise UserError("--methods mucs: this model has no feed-forward layers; leave it out")
    return found


def initial_weights(denoiser: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a denoiser as training begins, {name: tensor}."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(denoiser).from_config(denoiser.config)  # pyright: ignore
    return {name: value.detach() for name, value in fresh.named_parameters()}


def forget_losses(
    model: Model, query: TrainingSet, draws: QueryDraws, first: int, count: int
) -> torch.Tensor:
    """The query's losses at some of its draws, [count] float64."""
    latent, conditioning = query.query_tensors(model.device)
    normals, timesteps = draws.draw(first, count, latent.shape, model.device)
    texts = repeat_texts(conditioning, count)
    return sample_losses(model, latent.expand_as(normals), normals, timesteps, texts)


def untrained_loss(model: Model, query: TrainingSet, draws: QueryDraws, seed: int) -> float:
    """The query's mean loss under a model that was never trained: the bound. Source: [MUCS]."""
    fresh = initial_weights(model.denoiser, seed)
    with replaced_weights(model.denoiser, fresh), torch.no_grad():
        return float(forget_losses(model, query, draws, 0, NULL_DRAWS).mean())


def unlearn_bounded(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    rate: float,
    most_steps: int,
    batch: int,
    seed: int,
    update: Callable[[int], object] = lambda count: None,
) -> dict[str, torch.Tensor]:
    """The weight change {name: float32 tensor on the CPU} after steps of AdamW that lower the loss of
    training images and raise the query's, bounded by an untrained model's: mean L(x) - lambda mean
    min(L(z), L_null). They end where the query's loss reaches ENOUGH of the bound, or after
    `most_steps`. batch: training images, and noisy copies of the query, a step. The model is as it
    was at the end. Source: [MUCS]."""
    parameters = select_layers(model)
    originals = {name: value.detach().clone() for name, value in parameters.items()}
    draws = QueryDraws.of_query(seed, query, model)
    bound = untrained_loss(model, query, draws, seed)
    with replaced_weights(model.denoiser, originals), tracked(parameters):
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate)
        for step in range(most_steps):
            numbers = range(step * batch, (step + 1) * batch)
            drawn = draw_samples(images, numbers, model.num_train_timesteps, seed)
            retained = sample_losses(model, *map_tensors(lambda each: each.to(model.device), drawn))
            forgotten = forget_losses(model, query, draws, step * batch, batch)
            if float(forgotten.detach().mean()) >= ENOUGH * bound:
                break
            loss = retained.mean() - WEIGHT * forgotten.clamp(max=bound).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update(1)
        change = {
            name: (value.detach() - originals[name]).cpu() for name, value in parameters.items()
        }
        for value in parameters.values():
            value.grad = None
    if not all(torch.isfinite(value).all() for value in change.values()):
        raise UserError(f"--methods mucs: unlearning {query.ids[0]} diverged; lower --mucs_rate")
    return change


def noisiest_timesteps(model: Model, count: int) -> list[int]:
    """`count` timesteps, evenly over the noisiest of the model's."""
    times = torch.arange(model.num_train_timesteps, device=model.device)
    ones = torch.ones(len(times), 1, 1, 1, device=model.device)
    signal = model.diffuse(ones, torch.zeros_like(ones), times).flatten()
    spread = model.diffuse(torch.zeros_like(ones), ones, times).flatten()
    order = torch.argsort(spread / signal.clamp(min=1e-12), descending=True, stable=True)
    kept = order[: max(1, int(NOISIEST * len(times)))]
    places = ((torch.arange(count) + 0.5) * len(kept) / count).long().clamp(max=len(kept) - 1)
    return kept[places].tolist()


def skew(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mean over draws of (L_u - L) / (L_u + L + SMALLEST), [N] float64, from losses [N, draws].
    Source: [MUCS], noise-consistent skew."""
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    return ((after - before) / (after + before + SMALLEST)).mean(axis=1)


@dataclass(frozen=True)
class Mucs(Method):
    """Bounded unlearning and the skew of losses: the query is unlearned until the model knows as
    little of it as an untrained one. Source: [MUCS], of images as they are, not mirrored.

    All images are scored under the same draws of noise, at the noisiest 70 % of timesteps.
    """

    mucs_rate: float
    mucs_steps: int
    mucs_batch: int
    mucs_draws: int
    seed: int
    noise_seed: int
    precision: str

    needs_base_model = True

    def own_identity(self, run: Run) -> dict:
        return noise.identity()

    def losses_identity(self, run: Run) -> dict:
        """Identity of the training images' losses under the model."""
        return {
            **run.model.identity,
            **noise.identity(),
            "training_set": run.training_set.identity,
            "method": "mucs",
            "mucs_draws": self.mucs_draws,
            "noise_seed": self.noise_seed,
            "precision": self.precision,
        }

    def delta(self, run: Run, number: int, folder: Path) -> Delta:
        """The weight change of a query, kept in a folder."""
        query, path = run.queries[number], folder / "weight_change.safetensors"
        identity = {
            **run.model.identity,
            **noise.identity(),
            "training_set": run.training_set.identity,
            "query": query.identity,
            "settings": self.settings,
        }
        is_done = lambda: keep_complete(path, identity, run.overwrite, REMEDY)

        def work() -> None:
            given = self.mucs_rate, self.mucs_steps, self.mucs_batch, self.seed
            with progress(self.mucs_steps, f"mucs, unlearning {query.ids[0]}", "steps") as bar:
                change = unlearn_bounded(run.model, run.training_set, query, *given, bar.update)
            record_path(path).unlink(missing_ok=True)
            write_record(path, identity, run.model.device, write_tensors(path, change))

        do_once(folder, "weight_change", is_done, work)
        return Delta(path)

    def losses(self, run: Run, path: Path, more: dict) -> np.ndarray:
        """Losses [N, draws] of the training images under the model as it is, cached at `path`."""
        compute = common_losses(
            run, noisiest_timesteps(run.model, self.mucs_draws), self.noise_seed
        )
        identity = {**self.losses_identity(run), **more}
        found = cache_reduced(path, identity, run.training_set, compute, run.overwrite)
        return np.asarray(found[:, 0])

    def scores(self, run: Run) -> list[np.ndarray]:
        folder, found = run.folder / "mucs", []
        before = self.losses(run, folder / "losses.npy", {})
        for number, query in enumerate(run.queries):
            own = folder / f"unlearned-{digest(query.identity, self.settings)[:16]}"
            delta = self.delta(run, number, own)
            with changed_weights(run.model.denoiser, delta.tensors):
                more = {"weight_change": delta.content}
                after = self.losses(run, own / "losses.npy", more)
            found.append(skew(before, after))
        return found


def common_losses(
    run: Run, timesteps: Sequence[int], noise_seed: int
) -> Callable[[Sequence[int], Executor], np.ndarray]:
    """`compute` of gradients.cache_reduced: losses of images as they are at draws that all have in
    common, mean over captions, [images, 1, draws] float32."""
    images, model = run.training_set, run.model
    slots = [(0, 0, timestep, draw) for draw, timestep in enumerate(timesteps)]
    drawn = noise.image_noise(noise_seed, "mucs", "common draws", slots, images.latents.shape[2:])
    normals, times = torch.from_numpy(drawn).to(model.device), torch.tensor(timesteps)

    @torch.no_grad()
    def measure(row: int) -> np.ndarray:
        latent, conditioning = images.image_tensors(0, row, model.device)
        captions = len(next(iter(conditioning.values())))
        losses = []
        for caption in range(captions):
            text = map_tensors(itemgetter(slice(caption, caption + 1)), conditioning)
            for some in torch.arange(len(times)).split(run.batch_size):
                told = repeat_texts(text, len(some))
                noises = normals[some]
                steps = times[some].to(model.device)
                losses.append(sample_losses(model, latent.expand_as(noises), noises, steps, told))
        return torch.cat(losses).reshape(captions, -1).mean(dim=0).float().cpu().numpy()

    return lambda some, pool: np.stack([measure(row) for row in some])[:, None]
