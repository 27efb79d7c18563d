"""The procedures of the benchmark: functions from a Bench to its scores and what they cost."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from ..attribution.derivatives import gradient_dots, second_order_dots
from ..attribution.draws import CHUNK_IMAGES, ImageNoise, rows_of
from ..attribution.index import Index, build_index
from ..attribution.influence import best_view, loss_changes
from ..attribution.losses import changed_losses, loss_sums
from ..attribution.scoring import TOGETHER
from ..attribution.settings import AUDIT, AUTOCAST
from ..attribution.shortlist import choose_images
from ..attribution.sweeps import Sweep
from ..datasets.conditioning import TEXT
from ..models.pipelines import changed_weights
from ..runtime.programs import progress
from .meters import metered
from .published import batch_losses, default_flags, published_losses, published_step, stock_layers
from .workloads import (
    Bench,
    count_sample_flops,
    precision_set,
    run_sweep,
    score_differences,
    score_each,
)

WARM_UP_IMAGES = 4
MOST_PUBLISHED_IMAGES = 2000  # what the published loop costs for more follows from its rate


def result(
    bench: Bench,
    scores: dict[str, np.ndarray],
    costs: list[dict],
    flops: float,
    precision: str,
    **more: Any,
) -> dict:
    """What a procedure gives: scores {size: [exact queries, N]}, the costs of its sweeps,
    operations a sample, the precision of its products; how many queries a sweep serves and how many
    images are in it, and what else is not as usual."""
    return {
        "scores": scores,
        "costs": costs,
        "flops": flops,
        "precision": precision,
        "queries_a_sweep": 1,
        "load_seconds": 0.0,
        "unlearn_seconds": bench.unlearn_seconds,
        "warm_up_seconds": None,
        "is_variant": False,
        "reference": None,
        "images_a_sweep": len(bench.world.training_set),
        "scan_seconds": 0.0,
        "build_seconds": None,
        **more,
    }


def warm_up_sweep(
    bench: Bench,
    measure: Callable[..., torch.Tensor],
    batch_size: int,
    num_images: int = WARM_UP_IMAGES,
) -> dict:
    """What a sweep over the first images costs; kernels are chosen, compiled and loaded in it."""
    return run_sweep(
        bench, measure, batch_size, "warm-up", images=min(num_images, len(bench.world.training_set))
    )[1]


def score_exactly(
    bench: Bench,
    precision: str = "fp32",
    autocast: torch.dtype | None = None,
    variant: Callable[[Any], AbstractContextManager] | None = None,
) -> dict:
    """Differences of the losses. variant: a context that makes another UNet of the UNet for a
    while."""
    device = bench.world.model.device
    # A variant meets every size of a pass in its warm-up: those of a whole chunk and those of the
    # last.
    warm_up_images = (
        CHUNK_IMAGES + len(bench.world.training_set) % CHUNK_IMAGES if variant else WARM_UP_IMAGES
    )

    def measure(*samples):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return loss_sums(*samples)

    flops = count_sample_flops(bench, measure)
    with precision_set(precision), variant(bench.denoiser) if variant else nullcontext():
        warm_up = warm_up_sweep(bench, measure, bench.settings.batch_size, warm_up_images)
        scores, costs = score_differences(
            bench,
            lambda: run_sweep(bench, measure, bench.settings.batch_size, f"exact {precision}"),
        )
    return result(
        bench,
        scores,
        costs,
        flops,
        precision,
        warm_up_seconds=warm_up["seconds"],
        is_variant=variant is not None,
    )


def score_together(bench: Bench) -> dict:
    """Differences of the losses of several queries that one sweep gives: as many as scoring takes
    together, or all exact ones."""
    batch_size = bench.settings.batch_size
    together = range(min(len(bench.changes), max(TOGETHER, bench.settings.num_exact)))
    before, _ = run_sweep(bench, loss_sums, batch_size, "before")
    scores, all_costs = {}, []
    for size in bench.factors:
        with changed_losses(
            bench.world.model, [bench.change(query, size) for query in together]
        ) as measure_of:
            measure = measure_of(together)
            flops = count_sample_flops(bench, measure)
            warm_up_sweep(bench, measure, batch_size)
            after, costs = run_sweep(bench, measure, batch_size, "exact together")
        scores[size] = np.array(
            [
                best_view(loss_changes(before, after[:, query]))
                for query in range(bench.settings.num_exact)
            ]
        )
        all_costs.append(costs)
    return result(bench, scores, all_costs, flops, "fp32", queries_a_sweep=len(together))


reference = cache(
    score_exactly
)  # float32 with TensorFloat-32 off: what every fidelity is measured against


@contextmanager
def compiled(unet: torch.nn.Module) -> Iterator[None]:
    """The UNet, compiled, once for each size of a pass: with sizes left open, guards alone took a
    quarter of an hour. As it was at the end."""
    unet.forward = torch.compile(unet.forward, dynamic=False)
    try:
        yield
    finally:
        del unet.forward
        torch.compiler.reset()


@contextmanager
def channels_last(unet: torch.nn.Module) -> Iterator[None]:
    """The UNet with its weights' channels last in memory; as it was at the end."""
    # torch's stubs lack this form of `to`
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]


def score_midpoints(bench: Bench, precision: str = "fp32") -> dict:
    """Directional derivatives at the midpoint of each query's change, one sweep each."""
    autocast = AUTOCAST[precision]

    def score(query, size):
        with changed_weights(bench.denoiser, bench.change(query, size, 0.5)):
            dots, costs = run_sweep(
                bench,
                gradient_dots([bench.change(query, size)], autocast),
                bench.settings.gradient_batch_size,
                f"midpoint {precision}",
            )
        return best_view(dots[:, 0]), costs

    measure = gradient_dots(bench.changes[:1], autocast)
    with precision_set(precision):
        warm_up_sweep(bench, measure, bench.settings.gradient_batch_size)
        scores, costs = score_each(bench, score)
    return result(bench, scores, costs, count_sample_flops(bench, measure), precision)


def score_gradients(bench: Bench, precision: str = "fp32") -> dict:
    """First and second order at the original weights along every query's change, in one sweep for
    each size."""
    scores, all_costs = {}, []
    for size in bench.factors:
        measure = second_order_dots(
            [bench.change(query, size) for query in range(len(bench.changes))], AUTOCAST[precision]
        )
        with precision_set(precision):
            warm_up_sweep(bench, measure, bench.settings.gradient_batch_size)
            orders, costs = run_sweep(
                bench, measure, bench.settings.gradient_batch_size, f"gradient {precision}"
            )
        scores[size] = np.array(
            [best_view(orders[:, query]) for query in range(bench.settings.num_exact)]
        )
        all_costs.append(costs)
    return result(
        bench,
        scores,
        all_costs,
        count_sample_flops(bench, measure),
        precision,
        queries_a_sweep=len(bench.changes),
    )


def score_shortlists(bench: Bench, precision: str = "fp32") -> dict:
    """An index, built once and timed, ranks all images; the best of them and an audit's are scored
    exactly."""
    world, images = bench.world, bench.world.training_set
    noise = ImageNoise(bench.settings.seed)
    sweep = Sweep(images, world.grid, bench.settings.gradient_batch_size, noise)
    with metered(world.model.device) as building:
        build_index(world.model, sweep, world.fisher, bench.folder / "index", precision, None)
    num_kept = []

    def score(query, size):
        best = best_view(estimates[size][query])
        kept = np.sort(np.concatenate(choose_images(best, bench.settings.shortlist, AUDIT, query)))
        rows = rows_of(kept, len(images), images.latents.shape[0])
        num_kept.append(len(kept))
        before, _ = run_sweep(bench, loss_sums, bench.settings.batch_size, "cached", images=kept)
        with changed_weights(bench.denoiser, bench.change(query, size)):
            after, costs = run_sweep(
                bench, loss_sums, bench.settings.batch_size, "shortlist", images=kept
            )
        mixed = estimates[size][query].astype(np.float64)
        mixed[rows] = loss_changes(before, after)
        return best_view(mixed), costs

    with metered(world.model.device) as scan:
        index = Index(bench.folder / "index", world.model, sweep, world.fisher, "")
        estimates = {
            size: index.estimate(
                [
                    {name: delta.cpu() for name, delta in bench.change(query, size).items()}
                    for query in range(len(bench.changes))
                ]
            )
            for size in bench.factors
        }
    scores, costs = score_each(bench, score)
    flops = count_sample_flops(bench, loss_sums)
    return result(
        bench,
        scores,
        costs,
        flops,
        precision,
        images_a_sweep=num_kept[0],
        build_seconds=building["seconds"],
        scan_seconds=scan["seconds"] / len(bench.changes) / len(bench.factors),
    )


def score_as_published(bench: Bench) -> dict:
    """The published program's loop, and as its reference float32 differences under its own
    noise."""
    world, settings = bench.world, bench.settings
    device, alpha_bars = world.model.device, world.model.alpha_bars
    num_images = min(len(world.training_set), MOST_PUBLISHED_IMAGES)
    with metered(device) as load:
        fisher = world.load()

    def find_losses(images=None):
        training_set = world.training_set.first(images or num_images)
        num_samples = training_set.latents.shape[0] * len(training_set) * len(world.grid)
        with metered(device) as costs, progress(num_samples, "published", "samples") as bar:
            losses = published_losses(
                bench.denoiser,
                alpha_bars,
                training_set,
                world.grid,
                settings.batch_size,
                bar.update,
            )
        return losses, costs

    def measure(model, latents, noise, timesteps, conditioning):
        with torch.no_grad():
            batch_losses(
                model.denoiser,
                alpha_bars,
                latents,
                noise,
                timesteps,
                conditioning[TEXT].expand(len(latents), -1, -1),
            )

    latent, conditioning = world.query(0)
    step = partial(
        published_step,
        bench.denoiser,
        world.parameters,
        alpha_bars,
        latent,
        conditioning[TEXT][0],
        fisher,
        world.rate or 1.0,
        settings.unlearn_batch_size,
    )
    with default_flags(), stock_layers(bench.denoiser):
        flops = count_sample_flops(bench, measure)
        step(1)
        with metered(device) as unlearning:
            step(settings.unlearn_grad_accum_steps)
        find_losses(min(WARM_UP_IMAGES, num_images))
        scores, costs = score_differences(bench, find_losses)
    reference_scores, _ = score_differences(
        bench,
        lambda: run_sweep(
            bench, loss_sums, settings.batch_size, "its reference", "abu", num_images
        ),
    )
    return result(
        bench,
        scores,
        costs,
        flops,
        "fp32",
        load_seconds=load["seconds"],
        unlearn_seconds=unlearning["seconds"],
        reference=reference_scores,
        images_a_sweep=num_images,
    )


PROCEDURES = {
    "published": score_as_published,
    "exact-fp32": reference,
    "exact-together": score_together,
    "exact-tf32": partial(score_exactly, precision="tf32"),
    "exact-bf16": partial(score_exactly, precision="bf16", autocast=torch.bfloat16),
    "exact-compiled": partial(score_exactly, variant=compiled),
    "exact-channels-last": partial(score_exactly, variant=channels_last),
    "midpoint-fp32": score_midpoints,
    "midpoint-bf16": partial(score_midpoints, precision="bf16"),
    "gradient-fp32": score_gradients,
    "gradient-bf16": partial(score_gradients, precision="bf16"),
    "index": score_shortlists,
}
UNASKED_ON_CUDA_ONLY = ("exact-tf32", "exact-bf16", "exact-compiled", "exact-channels-last")
ON_CUDA_ONLY = ("exact-tf32",)
