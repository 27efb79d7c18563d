"""What removing images did: leave-K-out, the same for random images, and retention.

Arrays of measures are float64 [3, queries] in the order of MEASURES, NaN for queries that were not
measured. Models are those of one seed, and their reference is the full model of that seed: a
picture carries the fingerprint of its own model.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..errors import UserError
from .metrics import compare_paired, mean_and_error
from .retrained_models import RetrainedModel
from .scores import OURS, RANDOM

MEASURES = ("dL", "mse", "similarity")
# largest MSE of a query that is made again by its own model: a hundredth of the range. Others' are
# 1e-3 and more
SAME_PICTURE = 1e-4
NOTHING = float("nan"), float("nan")
Models = Sequence[RetrainedModel]


def find_references(
    models: Models, command: Callable[[list[int]], str]
) -> dict[int, RetrainedModel]:
    """The full model of each seed: {seed: model}. Raises UserError, with the command (of the seeds)
    that trains it, where a model without chosen or random images has none of its seed."""
    references = {model.seed: model for model in models if model.kind == "full"}
    orphans = [
        model
        for model in models
        if model.kind in ("without", "together") and model.seed not in references
    ]
    if orphans:
        seeds = sorted({model.seed for model in orphans})
        raise UserError(
            f"{orphans[0].path}: there is no full model of its seed {orphans[0].seed} to compare "
            f"it with ({len(orphans)} such "
            f"models); train it: {command(seeds)}"
        )
    return references


def find_maker(
    references: Mapping[int, RetrainedModel],
    command: Callable[[list[int]], str],
    can_be_made_again: bool,
) -> RetrainedModel:
    """The full model that made the queries, the one that makes them again. Where pictures cannot be
    made again, for want of the queries' seeds, the one that explains them best. Raises UserError
    where none of {seed: model} does."""
    if not can_be_made_again:
        return min(references.values(), key=lambda model: model.losses.mean())
    for model in references.values():
        if (model.mse <= SAME_PICTURE).all():
            return model
    best = min(references.values(), key=lambda model: np.nan_to_num(model.mse, nan=np.inf).max())
    if np.isnan(best.mse).any():
        raise UserError(
            f"{best.path}: does not say what it makes of the queries' prompts and seeds, so that "
            f"nothing tells whether it made "
            f"the queries; measure it with pictures: {command([best.seed])}"
        )
    untried = min(set(range(len(references) + 1)) - references.keys())
    raise UserError(
        f"{best.path}: is not the model that made the queries, as it would make them again: of "
        f"their prompts and seeds it makes "
        f"pictures with an MSE of up to {best.mse.max():.1e} (no other full model comes nearer; "
        f"expected {SAME_PICTURE:g} or less). "
        f"Train the one that did, with its seed, 0 unless you chose another: {command([untried])}"
    )


def measure(model: RetrainedModel, reference: RetrainedModel) -> np.ndarray:
    """Of each query: how much higher its loss is than under the reference, and how far the picture
    made again is from it."""
    return np.stack([model.losses - reference.losses, model.mse, model.similarity])


def mean_measured(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the models of values [models, 3, queries], of those that measured; NaN where none
    did."""
    counts = np.isfinite(values).sum(axis=0)
    return np.where(counts, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def group_models(models: Models, kind: str) -> dict[tuple[str | None, int], list[RetrainedModel]]:
    """Models of one kind by (method, number of removed images): numbers rising, ours first, RANDOM
    last."""
    groups = {}
    for model in models:
        if model.kind == kind:
            groups.setdefault((model.method, model.num_removed), []).append(model)
    return dict(
        sorted(
            groups.items(),
            key=lambda item: (
                item[0][1],
                item[0][0] == RANDOM,
                item[0][0] != OURS,
                item[0][0] or "",
            ),
        )
    )


def measure_own(models: Models, reference: RetrainedModel, queries: Sequence[str]) -> np.ndarray:
    """Measures of each query under the models whose images were removed for it, [3, queries]; the
    mean where there are several."""
    values = np.full((len(models), 3, len(queries)), np.nan)
    for row, model in zip(values, models):
        if model.query in queries:
            row[:, queries.index(model.query)] = measure(model, reference)[
                :, queries.index(model.query)
            ]
    return mean_measured(values)


def measure_removals(
    models: Models, reference: RetrainedModel, queries: Sequence[str]
) -> tuple[dict[tuple, np.ndarray], dict[tuple, int]]:
    """Measures [3, queries] by (method, K), RANDOM last at every K, and how many models made them:
    ({...}, {...}). Random removal is measured on every query that a method of this K, or of any K
    where there is none, was measured on."""
    groups = group_models(
        [model for model in models if model.query is None or model.query in queries], "without"
    )
    own = {
        key: measure_own(group, reference, queries)
        for key, group in groups.items()
        if key[0] != RANDOM
    }
    values = {}
    for k in sorted({k for _, k in groups}):
        values.update({key: value for key, value in own.items() if key[1] == k})
        if (RANDOM, k) in groups:
            asked = asked_queries(
                {key: value for key, value in own.items() if key[1] == k} or own, len(queries)
            )
            values[RANDOM, k] = np.where(
                asked,
                mean_measured([measure(model, reference) for model in groups[RANDOM, k]]),
                np.nan,
            )
    return values, {key: len(groups[key]) for key in values}


def asked_queries(values: Mapping[tuple, np.ndarray], count: int) -> np.ndarray:
    """Mask [count] of the queries that any of the values (those of a method and K) is of; all where
    there are none."""
    return (
        np.any([np.isfinite(each[0]) for each in values.values()], axis=0)
        if values
        else np.ones(count, bool)
    )


def summarise_measures(values: np.ndarray) -> list[float]:
    """Mean and standard error over the measured queries of each of [3, queries], one after the
    other."""
    return [
        number
        for row in values
        for number in (mean_and_error(row[np.isfinite(row)]) if np.isfinite(row).any() else NOTHING)
    ]


def removal_rows(values: Mapping[tuple, np.ndarray], counts: Mapping[tuple, int]) -> list[tuple]:
    """Rows (method, K, queries, models, mean and standard error of each measure)."""
    return [
        (*key, int(np.isfinite(each[0]).sum()), counts[key], *summarise_measures(each))
        for key, each in values.items()
    ]


def floor_rows(models: Models, reference: RetrainedModel, asked: np.ndarray) -> list[tuple]:
    """Rows like `removal_rows` of the full models: how well the one that made the queries makes
    them again, and how far models of other seeds are from it without any image removed."""
    full = [model for model in models if model.kind == "full"]
    groups = {
        f"full, seed {reference.seed}": [model for model in full if model.seed == reference.seed],
        "full, other seeds": [model for model in full if model.seed != reference.seed],
    }
    values = {
        name: mean_measured([measure(model, reference) for model in group])[:, asked]
        for name, group in groups.items()
        if group
    }
    return [
        (name, 0, int(asked.sum()), len(groups[name]), *summarise_measures(each))
        for name, each in values.items()
    ]


def paired_rows(values: Mapping[tuple, np.ndarray]) -> list[tuple]:
    """Rows (baseline, K, queries, then of each measure: mean difference, standard error, ratio) of
    ours minus each other method of the same K, over the queries that both were measured on."""
    rows = []
    for (method, k), other in values.items():
        if method == OURS or (OURS, k) not in values:
            continue
        both = np.isfinite(values[OURS, k]) & np.isfinite(other)
        if both[0].any():
            pairs = [
                compare_paired(mine[mask], others[mask]) if mask.any() else (np.nan,) * 3
                for mine, others, mask in zip(values[OURS, k], other, both)
            ]
            rows.append(
                (method, k, int(both[0].sum()), *(number for pair in pairs for number in pair))
            )
    return rows


def retention_rows(
    models: Models, reference: RetrainedModel, queries: Sequence[str]
) -> list[tuple]:
    """Rows (method, K, models, own |dL|, others' |dL| and its standard error over models, own MSE,
    others' MSE and its standard error): what a removal did to the query it was for, and to all
    others. Removals without a query have others only."""
    groups = group_models(
        [model for model in models if model.query is None or model.query in queries], "without"
    )
    return [
        (method, k, len(group), *retention(group, reference, queries))
        for (method, k), group in groups.items()
    ]


def other_full_rows(models: Models, maker: RetrainedModel, queries: Sequence[str]) -> list[tuple]:
    """The row like `retention_rows` of the full models of other seeds than the one that made the
    queries, where there are any."""
    others = [model for model in models if model.kind == "full" and model.seed != maker.seed]
    return (
        [("full, other seeds", 0, len(others), *retention(others, maker, queries))]
        if others
        else []
    )


def retention(models: Models, reference: RetrainedModel, queries: Sequence[str]) -> list[float]:
    """One row of `retention_rows`, less its names."""
    own, rest = np.full((len(models), 2), np.nan), np.full((len(models), 2), np.nan)
    for index, model in enumerate(models):
        changes, mse, _ = measure(model, reference)
        is_own = np.array([query == model.query for query in queries])
        for column, values in enumerate((np.abs(changes), mse)):
            for target, rows in (own, is_own), (rest, ~is_own):
                measured = values[rows & np.isfinite(values)]
                target[index, column] = measured.mean() if len(measured) else np.nan
    return [
        number
        for column in (0, 1)
        for number in (
            summarise_measures(own[None, :, column])[0],
            *summarise_measures(rest[None, :, column]),
        )
    ]
