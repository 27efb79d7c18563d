"""Leave-K-out of all seeds: rows of every table, and what there is to say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .bundles import bundle_rows
from .equivalents import equivalent_rows, random_changes, random_deviations
from .removal import (
    asked_queries,
    floor_rows,
    measure_removals,
    other_full_rows,
    paired_rows,
    removal_rows,
    retention_rows,
)
from .retrained_models import RetrainedModel
from .scores import RANDOM

Rows = dict[str, list[tuple]]  # by the name of their CSV file


@dataclass(frozen=True, eq=False)
class Removals:
    """What removing images did."""

    rows: Rows
    curve: tuple | None = None  # of random removal, see `plots.draw_plots`
    notices: tuple[str, ...] = ()  # a line each


@dataclass(frozen=True, eq=False)
class OneSeed:
    """What removing images did to the models of one seed."""

    rows: Rows
    values: dict[tuple, np.ndarray]  # see `removal.measure_removals`
    curve: tuple  # see `equivalents.random_changes`
    has_deviations: bool  # whether some number of random images was removed by two models


def other_seed(row: tuple, seed: int) -> tuple:
    """A row of a method whose models are of another seed than the queries' model, by a name that
    says so."""
    return f"{row[0]}, seed {seed}", *row[1:]


def without_pictures(model: RetrainedModel) -> RetrainedModel:
    """A model whose pictures are no measure."""
    unknown = np.full(len(model.losses), np.nan)
    return replace(model, mse=unknown, similarity=unknown)


def evaluate_seed(
    models: Sequence[RetrainedModel],
    reference: RetrainedModel,
    is_maker: bool,
    queries: Sequence[str],
    scores: Mapping[str, np.ndarray],
) -> OneSeed:
    """What removing images did to the models of one seed. Pictures of another seed's models than
    the queries' are no measure: without any removal they are others than the queries."""
    if not is_maker:
        models = [without_pictures(model) for model in models]
    values, counts = measure_removals(models, reference, queries)
    curve, deviations = random_changes(models, reference), random_deviations(models)
    rows = {
        "leave_k_out": removal_rows(values, counts),
        "leave_k_out_paired": paired_rows(values),
        "retention": retention_rows(models, reference, queries),
        "equivalent": equivalent_rows(values, curve, deviations),
        "leave_k_out_together": bundle_rows(models, reference, queries, scores),
    }
    if not is_maker:
        rows = {
            name: [other_seed(row, reference.seed) for row in of_kind]
            for name, of_kind in rows.items()
        }
    own = {key: value for key, value in values.items() if key[0] != RANDOM}
    return OneSeed(rows, own, curve, deviations is not None)


def evaluate_removals(
    models: Sequence[RetrainedModel],
    references: Mapping[int, RetrainedModel],
    maker: RetrainedModel | None,
    queries: Sequence[str],
    scores: Mapping[str, np.ndarray],
) -> Removals:
    """What is there is measured, each seed's models against their own full model. references:
    {seed: model}, maker: the one of them that made the queries, or None; scores: {method: [queries,
    N]}."""
    if maker is None:
        notice = (
            "No full model yet: leave-K-out, retention and equivalent numbers need the one that "
            "made the queries."
        )
        return Removals({}, notices=(notice,))
    seeds = sorted(references, key=lambda seed: (seed != maker.seed, seed))
    parts = [
        evaluate_seed(
            [model for model in models if model.seed == seed],
            references[seed],
            references[seed] is maker,
            queries,
            scores,
        )
        for seed in seeds
    ]
    rows = {name: [row for part in parts for row in part.rows[name]] for name in parts[0].rows}
    asked = asked_queries(parts[0].values, len(queries))
    rows["leave_k_out"] = floor_rows(models, maker, asked) + rows["leave_k_out"]
    rows["retention"] += other_full_rows(models, maker, queries)
    unasked = sum(model.query is not None and model.query not in queries for model in models)
    notices = removal_notices(parts, rows["leave_k_out"], unasked)
    return Removals(rows, (asked, parts[0].curve), tuple(notices))


def removal_notices(parts: Sequence[OneSeed], rows: Sequence[tuple], num_unasked: int) -> list[str]:
    """What there is to say of rows of leave-K-out, a line each. num_unasked: models without images
    of queries that are not evaluated."""
    notices = []
    if not any(part.values for part in parts):
        notices.append(
            "No models without the top K of a method yet: leave-K-out shows the noise only."
        )
    if any(part.rows["equivalent"] and not part.has_deviations for part in parts):
        notices.append(
            "No number of random images was removed by two models: the intervals of equivalent "
            "numbers leave out how such models deviate. Train more of each K (retrain random, with "
            "--count 8)"
        )
    if num_unasked:
        notices.append(
            f"{num_unasked} models were trained without images of queries that are not in this "
            f"task file; left out."
        )
    if len({row[2] for row in rows if row[1]}) > 1:
        notices.append(
            "Not every method and K has the same queries yet (column queries): compare them in the "
            "paired table."
        )
    return notices
