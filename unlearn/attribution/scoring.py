"""How much every candidate's loss rises when a query is unlearned: three ways, from exact to fast; and
how far the model's predictions of it move.

exact: the difference of two losses, [AbU] Eq. 6. output: the mean squared change of the prediction,
which is that difference without its first order. midpoint: the derivative along the weight change,
at its midpoint: one forward and backward pass a query, no rounding of a difference. gradient: first
and second order at the original weights: one forward pass and a few backward ones for all queries
of a model together.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..datasets.training_sets import TrainingSet
from ..models.pipelines import changed_weights
from ..storage.hashes import digest
from .caches import cache_columns, cache_losses
from .deltas import Delta
from .derivatives import PROBES, gradient_dots, second_order_dots
from .draws import ImageNoise, rows_of
from .fishers import KV
from .influence import best_view, loss_changes
from .losses import changed_losses, loss_sums, score_rows
from .names import OUTPUT
from .outputs import changed_outputs
from .settings import AUTOCAST
from .shortlist import choose_images, estimate_recall
from .studies import Study
from .sweeps import Sweep
from .unlearning import find_cells

# Queries whose weight changes are in memory at once, where one sweep or one pass over an index
# serves them all.
MANY = 64
# Queries whose losses one pass gives: enough to share what is the same for all, few enough to show
# results soon.
TOGETHER = 5
RECALL_OF = 100


def run_changed(
    study: Study,
    sweep: Sweep,
    deltas: Sequence[Delta],
    files: Sequence[tuple[Path, dict]],
    changed: Callable[..., AbstractContextManager],
) -> np.ndarray:
    """The column [2n] of the first of some weight changes, with its file; those of the others are
    begun in the same passes. changed: as `losses.changed_losses`."""
    path, own = files[0]
    with changed(study.model, [delta.tensors for delta in deltas]) as measure_of:

        def measure_with(numbers):
            return measure_of([0, *(1 + number for number in numbers)])

        [column] = cache_columns(
            sweep,
            study.model,
            [path],
            [own],
            measure_of([0]),
            study.overwrite,
            files[1:],
            measure_with,
        )
    return column


def score_exact(
    study: Study, deltas: Sequence[Delta], images: TrainingSet, name: str, later: Sequence[Delta]
) -> list[np.ndarray]:
    """L(z, unlearned) - L(z, theta0) of one query: [[2n]] float64. Source: [AbU] Eq. 6."""
    model, sweep = study.model, study.sweep(images)
    identity = study.losses.identity(model, images)
    files = [
        (delta.file.parent / f"{name}_loss.npy", {**identity, "weight_change": delta.content})
        for delta in (*deltas, *later)
    ]
    if study.unlearning.weight_selection == KV:
        after = run_changed(study, sweep, [*deltas, *later], files, changed_losses)
    else:
        with changed_weights(model.denoiser, deltas[0].tensors):
            after = cache_losses(sweep, model, *files[0], study.overwrite)
    return [loss_changes(study.before[name], after)]


def score_output(
    study: Study, deltas: Sequence[Delta], images: TrainingSet, name: str, later: Sequence[Delta]
) -> list[np.ndarray]:
    """The mean over pixels, captions and grid of || eps_unlearned - eps_theta0 ||^2 of one query,
    both of the image's own noise: [[2n]] float32. It needs no losses before unlearning."""
    of_text = study.unlearning.weight_selection == KV
    identity = {**study.losses.identity(study.model, images), "scoring": OUTPUT}
    # Of other weights than K and V each change takes a copy of the model.
    several = [*deltas, *later] if of_text else list(deltas)
    files = [
        (delta.file.parent / f"{name}_change.npy", {**identity, "weight_change": delta.content})
        for delta in several
    ]
    changed = partial(changed_outputs, of_text=of_text)
    return [run_changed(study, study.sweep(images), several, files, changed)]


def score_midpoint(
    study: Study, deltas: Sequence[Delta], images: TrainingSet, name: str, later: Sequence[Delta]
) -> list[np.ndarray]:
    """The derivative along the change of one query, where the weights have gone half of it: [[2n]]
    float32."""
    scheme = {"scoring": "midpoint"}
    with changed_weights(study.model.denoiser, deltas[0].scaled(0.5)):
        return score_derivatives(study, deltas, images, name, gradient_dots, scheme)


def score_gradients(
    study: Study, deltas: Sequence[Delta], images: TrainingSet, name: str, later: Sequence[Delta]
) -> list[np.ndarray]:
    """First and second order of the loss change of each query at the original weights:
    [queries][2n] float32."""
    scheme = {"scoring": "gradient", "probes": PROBES}
    return score_derivatives(study, deltas, images, name, second_order_dots, scheme)


def score_derivatives(
    study: Study,
    deltas: Sequence[Delta],
    images: TrainingSet,
    name: str,
    measure_of: Callable[..., Callable[..., torch.Tensor]],
    scheme: dict,
) -> list[np.ndarray]:
    """What a measure of derivatives says of each weight change, cached beside it: [queries][2n]
    float32."""
    identity = study.losses.identity(study.model, images)
    return cache_columns(
        study.sweep(images),
        study.model,
        [delta.file.parent / f"{name}_change.npy" for delta in deltas],
        [{**identity, "weight_change": delta.content, **scheme} for delta in deltas],
        measure_of(
            [delta.on(study.model.device) for delta in deltas], AUTOCAST[study.losses.precision]
        ),
        study.overwrite,
    )


SCORINGS = {
    "exact": score_exact,
    OUTPUT: score_output,
    "midpoint": score_midpoint,
    "gradient": score_gradients,
}


def score_queries(
    study: Study, deltas: list[Delta], later: list[Delta] | tuple = ()
) -> list[dict[str, np.ndarray]]:
    """Loss changes of every candidate for each of some queries: [{name of the image set: [2n]},
    ...].

    deltas: their weight changes on disk, one of them, or with gradient scoring up to MANY. later:
    those of a few queries that come next, of exact and output scoring alone: it prepares them in the same
    passes. Everything is kept beside the weight changes: killed and run again it goes on.
    """
    score = SCORINGS[study.scoring.scoring]
    columns = {
        name: score(study, deltas, images, name, later) for name, images in study.image_sets.items()
    }
    return [
        {name: column[query] for name, column in columns.items()} for query in range(len(deltas))
    ]


def audit_seed(seed: int, query: str) -> int:
    """The seed of a query's audit: each query has its own, or all would audit the same ranks of
    their estimates."""
    return int(digest(seed, "audit", query), 16)


def shortlisted(study: Study, kept: np.ndarray) -> tuple[Study, np.ndarray]:
    """The study of some images of the training set alone, under a name of their own, and the rows
    of their views."""
    images = study.image_sets["laion"]
    rows = rows_of(kept, len(images), images.latents.shape[0])
    names = {name: "laion_shortlist" if name == "laion" else name for name in study.image_sets}
    sets = {
        names[name]: images.take(kept.tolist()) if name == "laion" else images
        for name, images in study.image_sets.items()
    }
    before = {
        names[name]: values[rows] if name == "laion" else values
        for name, values in study.before.items()
    }
    return replace(study, image_sets=sets, before=before), rows


def score_shortlist(
    study: Study, name: str, delta: Delta, estimates: np.ndarray
) -> tuple[dict[str, np.ndarray], dict]:
    """Loss changes of every candidate for one query, and what is known of them: the index's
    estimate for most, scored for its best images, some others and the exemplars."""
    best, settings = best_view(estimates), study.scoring
    if settings.shortlist is None or settings.audit is None:
        raise ValueError("a study with an index needs the sizes of shortlist and audit")
    seed = audit_seed(study.unlearning.seed, name)
    shortlist, audit = choose_images(best, settings.shortlist, settings.audit, seed)
    kept = np.sort(np.concatenate([shortlist, audit]))
    part, rows = shortlisted(study, kept)
    [found] = score_queries(part, [delta])
    mixed = estimates.astype(np.float64)
    mixed[rows] = found["laion_shortlist"]
    k = min(RECALL_OF, len(shortlist))
    recall, low = estimate_recall(best, best_view(mixed), shortlist, audit, k, seed)
    rescored = [
        np.isin(np.arange(len(images)), kept) if kind == "laion" else np.full(len(images), True)
        for kind, images in study.image_sets.items()
    ]
    return {**found, "laion": mixed}, {
        "rescored": np.concatenate(rescored),
        "recall": recall,
        "recall_low": low,
        "expected_missed": k * (1 - recall),
        "recall_k": k,
        "num_audited": len(audit),
    }


def score_shortlists(
    study: Study, names: list[str], deltas: list[Delta]
) -> list[tuple[dict[str, np.ndarray], dict]]:
    """`score_shortlist` of some queries, whose estimates one pass over the index gives. names: of
    the queries."""
    if study.index is None:
        raise ValueError("a study without an index has no shortlists")
    estimates = study.index.estimate([delta.tensors for delta in deltas])
    return [
        score_shortlist(study, name, delta, estimate)
        for name, delta, estimate in zip(names, deltas, estimates)
    ]


def own_losses(study: Study, query: TrainingSet, delta: Delta) -> list[float]:
    """The query's own loss before and after unlearning: how far it was unlearned. Where only a box
    of it was, of the box alone."""
    cells = find_cells(study.model, query, study.unlearning)
    return measure_own(study, query, [{}, delta.tensors], partial(loss_sums, cells=cells))


def explain_query(study: Study, query: TrainingSet) -> float:
    """The loss of the whole query before unlearning: comparable with the training images'."""
    return measure_own(study, query, [{}], loss_sums)[0]


def measure_own(
    study: Study, query: TrainingSet, changes: Sequence[Mapping], measure: Callable
) -> list[float]:
    """A measure of the query's losses under each of some weight changes."""
    model, grid, rows = study.model, study.losses.timesteps, np.arange(1)
    noise, shown = study.losses.noise if study.losses.noise.compat is None else ImageNoise(), []
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        normals = noise.draw(query, rows, grid, model.device, pool)
        for weights in changes:
            with changed_weights(model.denoiser, weights):
                losses = score_rows(model, query, rows, grid, normals, study.batch_size, measure)
                shown.append(float(losses[0]))
    return shown
