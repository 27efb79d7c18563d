"""Leave-K-out of several queries at once: models without the first K images of each query of a bundle.

More images are gone than a query's own K, and what goes with the others' may be missed by it too. So
a query is also looked at under the models of other bundles that kept all of its first K, and without
as many random images.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..attribution.influence import rank_images
from .equivalents import random_changes
from .metrics import mean_and_error
from .removal import NOTHING
from .retrained_models import RetrainedModel

COLUMNS = (
    "method",
    "k",
    "together",
    "models",
    "left_out",
    "queries",
    "dL",
    "dL_error",
    *(f"{kind}_{what}" for kind in ("control", "random") for what in ("queries", "dL", "dL_error")),
    *(f"minus_{kind}{end}" for kind in ("control", "random") for end in ("", "_error")),
)


def bundle_rows(
    models: Sequence[RetrainedModel],
    reference: RetrainedModel,
    queries: Sequence[str],
    scores: Mapping[str, np.ndarray],
) -> list[tuple]:
    """Rows of COLUMNS, one a method, K and size of bundles: models, mean number of images left out,
    and rise of the queries' loss where their own first K are among those; where they are not; without
    as many random images; and the first minus each of the others, over the queries that have both.
    models: of one seed, whose full model is the reference; scores: {method: [queries, N]}, without
    which there is no control."""
    groups = {}
    for model in models:
        if model.bundle and set(model.bundle.queries) & set(queries):
            key = model.bundle.k, model.method, model.bundle.size
            groups.setdefault(key, []).append(model)
    curve, rows = random_changes(models, reference), []
    for (k, method, size), group in sorted(groups.items()):
        is_own = np.array([[query in model.bundle.queries for query in queries] for model in group])
        rises = np.array([model.losses - reference.losses for model in group])
        own = mean_where(is_own, rises)
        removed = mean_where(is_own, np.array([[model.num_removed] for model in group]))
        others = [
            mean_where(~is_own & keeps_first(group, scores.get(method), k), rises),
            random_rises(*curve[:2], removed),
        ]
        others = [np.where(np.isfinite(own), each, np.nan) for each in others]
        left_out = float(np.mean([model.num_removed for model in group]))
        rows.append(
            (
                method,
                k,
                size,
                len(group),
                left_out,
                *summarise(own),
                *(number for each in others for number in summarise(each)),
                *(number for each in others for number in summarise(own - each)[1:]),
            )
        )
    return rows


def mean_where(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of values [models, queries] over the models of a mask, [queries]; NaN where there is
    none."""
    counts = mask.sum(axis=0)
    return np.where(counts, (mask * values).sum(axis=0) / np.maximum(counts, 1), np.nan)


def keeps_first(models: Sequence[RetrainedModel], scores: np.ndarray | None, k: int) -> np.ndarray:
    """Whether each model was trained on all of the first K images of each query, [models, queries]
    (of scores [queries, N]; where there are none, on none)."""
    if scores is None:
        return np.zeros((len(models), 1), bool)
    first = np.stack([rank_images(row)[:k] for row in scores])
    return np.array([model.kept[first].all(axis=1) for model in models])


def random_rises(counts: np.ndarray, changes: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Rise of each query's loss without so many random images, [queries], on straight lines between
    the numbers that were tried and none; NaN beyond them. counts, changes: of `random_changes`."""
    if not len(counts):
        return np.full(len(removed), np.nan)
    return np.array(
        [
            np.interp(number, [0, *counts], [0, *rises], right=np.nan)
            for number, rises in zip(removed, changes.T)
        ]
    )


def summarise(values: np.ndarray) -> tuple[int, float, float]:
    """How many of [queries] were measured, their mean and its standard error over them."""
    measured = values[np.isfinite(values)]
    return len(measured), *(mean_and_error(measured) if len(measured) else NOTHING)
