"""What a benchmark measures on and with: unlearned queries, timed sweeps, and a row of speed, cost
and fidelity."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from ..attribution.draws import BatchNoise, ImageNoise, QueryDraws
from ..attribution.influence import best_view, loss_changes, rank_images
from ..attribution.newton import QueryGradient, relative_change, unlearn
from ..attribution.sweeps import Sweep
from ..evaluation.datamodels import spearman
from ..models.pipelines import changed_weights
from ..runtime.programs import log, progress, set_precision
from .architectures import World
from .meters import count_flops, measure_ceiling, metered
from .settings import BenchmarkSettings

TOP = 100  # of the overlap; a fifth of the images where there are fewer than 500
NATURAL = "natural"  # the step that users take, next to those scaled to a relative change


@dataclass(frozen=True, eq=False)
class Bench:
    """What every procedure is measured on."""

    world: World
    settings: BenchmarkSettings
    changes: list[dict]  # each query's weight change of one Newton step, on the model's device
    factors: dict[str, list[float]]  # by how much each query's is scaled, for each size of a change
    unlearn_seconds: float  # a query's
    folder: Path  # for what is not kept

    def change(self, query: int, size: str, part: float = 1.0) -> dict[str, torch.Tensor]:
        """A query's weight change of a size, or a part of it."""
        return {
            name: delta * (self.factors[size][query] * part)
            for name, delta in self.changes[query].items()
        }

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The UNet that is measured."""
        return self.world.model.denoiser


def unlearn_query(
    world: World, settings: BenchmarkSettings, number: int
) -> dict[str, torch.Tensor]:
    """One Newton step on a query: the weight change, on the model's device."""
    model, name = world.model, f"query {number}"
    latent, conditioning = world.query(number)
    draws = QueryDraws(settings.seed, world.training_set.name, name, model.num_train_timesteps)
    gradient = QueryGradient(
        model, world.parameters, latent, conditioning, draws, settings.gradient_batch_size
    )
    change = unlearn(gradient, world.fisher, world.rate, 1, settings.draws)
    return {key: delta.to(model.device) for key, delta in change.items()}


def prepare(world: World, settings: BenchmarkSettings, folder: Path) -> Bench:
    """Unlearns every query, timed: the Bench that the procedures are measured on."""
    unlearn_query(world, replace(settings, unlearn_grad_accum_steps=1), 0)  # warms up
    changes = []
    with (
        metered(world.model.device) as costs,
        progress(settings.num_queries, "unlearning", "queries") as bar,
    ):
        for number in range(settings.num_queries):
            changes.append(unlearn_query(world, settings, number))
            bar.update()
    moved = [relative_change(change, world.parameters) for change in changes]
    factors = {f"{size:.0%}": [size / norm for norm in moved] for size in settings.relative_change}
    if world.rate is not None:
        log.info(f"one natural Newton step moves K and V by {min(moved):.1%} to {max(moved):.1%}")
        factors[NATURAL] = [1.0] * len(changes)
    return Bench(world, settings, changes, factors, costs["seconds"] / settings.num_queries, folder)


def run_sweep(
    bench: Bench,
    measure: Callable[..., torch.Tensor],
    batch_size: int,
    description: str,
    compat: str | None = None,
    images: int | np.ndarray | None = None,
) -> tuple[np.ndarray, dict]:
    """Values [views * N, ...] of a measure over the training set, its first `images` or those of
    these rows, and what that cost."""
    training_set, model = bench.world.training_set, bench.world.model
    some = (
        training_set.take(images.tolist())
        if isinstance(images, np.ndarray)
        else training_set.first(images or len(training_set))
    )
    noise = BatchNoise(batch_size) if compat else ImageNoise(bench.settings.seed)
    sweep = Sweep(some, bench.world.grid, batch_size, noise)
    with TemporaryDirectory(dir=bench.folder) as folder, metered(model.device) as costs:
        values = sweep.run(model, Path(folder), description, measure)
    return values, costs


def score_each(
    bench: Bench, score: Callable[[int, str], tuple[np.ndarray, dict]]
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Scores [exact queries, N] of each size of a change, and the costs of each sweep. score(query,
    size): one query's."""
    scores, all_costs = {}, []
    for size in bench.factors:
        rows, costs = zip(*(score(query, size) for query in range(bench.settings.num_exact)))
        scores[size] = np.array(rows)
        all_costs.extend(costs)
    return scores, all_costs


def score_differences(
    bench: Bench, find_losses: Callable[[], tuple[np.ndarray, dict]]
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """Scores and costs by differences of losses. find_losses(): losses [2N] and their cost, under
    the present weights."""
    before, first_costs = find_losses()

    def score(query, size):
        with changed_weights(bench.denoiser, bench.change(query, size)):
            after, costs = find_losses()
        return best_view(loss_changes(before, after)), costs

    scores, costs = score_each(bench, score)
    return scores, [first_costs, *costs]


def count_sample_flops(bench: Bench, measure: Callable[..., object]) -> float:
    """Floating-point operations a sample of a measure."""
    training_set = bench.world.training_set
    grid = bench.world.grid
    device = bench.world.model.device
    latents = (
        torch.from_numpy(np.array(training_set.latents[:1, 0], np.float32))
        .to(device)
        .expand(len(grid), -1, -1, -1)
    )
    conditioning = training_set.image_tensors(0, 0, device)[1]
    timesteps = torch.tensor(grid, device=device)
    return count_flops(
        lambda: measure(
            bench.world.model, latents, torch.zeros_like(latents), timesteps, conditioning
        )
    ) / len(grid)


def describe_fidelity(scores: np.ndarray, reference: np.ndarray) -> dict:
    """How far scores [queries, N] rank as a reference does: Spearman, and how many of its top
    images are in their top; the means over queries. The size of a change of a loss is there too:
    rounding is small or large next to it."""
    top = min(TOP, max(1, scores.shape[1] // 5))
    shared = [
        len(set(rank_images(one)[:top]) & set(rank_images(other)[:top]))
        for one, other in zip(scores, reference)
    ]
    return {
        "spearman": float(np.mean(spearman(scores, reference))),
        "top": top,
        "in_top": float(np.mean(shared)),
        "median_loss_change": float(np.median(np.abs(scores))),
    }


@contextmanager
def precision_set(precision: str) -> Iterator[None]:
    """Torch's flags as for a precision; `fp32` comes back at the end."""
    set_precision(precision)
    try:
        yield
    finally:
        set_precision("fp32")


@cache
def find_ceiling(device: torch.device, precision: str) -> float:
    """`measure_ceiling`, once a run, with the flags that a precision stands for."""
    with precision_set(precision):
        return measure_ceiling(device, precision)


def score_seconds(found: dict, seconds: float, num_images: int, num_measured: int) -> float:
    """Seconds that scoring one query takes with `num_images`. seconds: a sweep's of
    `found["images_a_sweep"]` images; an index's sweep stays the same, and its scan of
    `num_measured` images grows."""
    if found["build_seconds"] is not None:
        return seconds + found["scan_seconds"] * num_images / num_measured
    return seconds * num_images / found["images_a_sweep"] / found["queries_a_sweep"]


def make_row(bench: Bench, name: str, found: dict, exact: dict) -> dict:
    """A procedure's row from its result (`procedures.result`) and that of exact differences. Its
    fidelity is measured against theirs, unless it brings its own reference."""
    training_set, settings = bench.world.training_set, bench.settings
    samples_an_image = training_set.latents.shape[0] * len(bench.world.grid)
    seconds = float(np.median([costs["seconds"] for costs in found["costs"]]))
    reference = found["reference"] or exact["scores"]
    rate = found["images_a_sweep"] * samples_an_image / seconds
    ceiling = find_ceiling(bench.world.model.device, found["precision"])
    row = {
        "procedure": name,
        "samples_per_second": rate,
        "sweep_seconds": [costs["seconds"] for costs in found["costs"]],
        **{
            key: found[key]
            for key in (
                "queries_a_sweep",
                "images_a_sweep",
                "load_seconds",
                "unlearn_seconds",
                "warm_up_seconds",
                "scan_seconds",
                "build_seconds",
            )
        },
        "score_seconds": score_seconds(found, seconds, len(training_set), len(training_set)),
        "flops_per_sample": found["flops"],
        "ceiling_flops_per_second": ceiling,
        "share_of_ceiling": rate * found["flops"] / ceiling,
        "fidelity": {
            size: describe_fidelity(scores, reference[size])
            for size, scores in found["scores"].items()
        },
        "at_target_images": {
            "unlearn_seconds": found["unlearn_seconds"] / settings.draws * settings.target_draws,
            "score_seconds": score_seconds(
                found, seconds, settings.target_images, len(training_set)
            ),
        },
        "note": "",
    }
    if found["build_seconds"] is not None:
        row["note"] = (
            f"index built in {found['build_seconds']:.0f} s; {found['images_a_sweep']} images "
            f"scored exactly"
        )
    elif found["images_a_sweep"] < len(training_set):
        row["note"] = f"from its rate with {found['images_a_sweep']:,} images"
    if found["is_variant"]:
        ratio = float(np.median([costs["seconds"] for costs in exact["costs"]])) / seconds
        row["note"] = f"{'pays' if ratio > 1 else 'does not pay'}: {ratio:.2f} times the speed"
        row["note"] += f", warm-up {found['warm_up_seconds']:.0f} s"
    for kind in ("host_bytes", "device_bytes"):
        peaks = [costs[kind] for costs in found["costs"] if costs[kind] is not None]
        row[f"peak_{kind}"] = max(peaks, default=None)
    return row
