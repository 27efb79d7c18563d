"""Linear datamodeling scores of methods: which retrained models they are of, each method's score
with its interval, as it is and after the power of its scores that is best on tuning queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .datamodels import (
    choose_power,
    leave_models_out,
    mean_interval,
    predict,
    raise_scores,
    spearman,
)
from .removal import SAME_PICTURE
from .retrained_models import RetrainedModel
from .scores import OURS

FEWEST_SUBSETS = 3
NUMBERS = ("lds", "low", "high", "ours_minus", "ours_minus_low", "ours_minus_high")
COLUMNS = (
    "method",
    *NUMBERS,
    "power",
    *(f"powered_{name}" for name in NUMBERS),
    "tuning_lds",
    "tuning_queries",
    "queries",
    "models",
)
QUERY_COLUMNS = ("query", "method", "lds", "powered_lds")


def maker_seed(models: Sequence[RetrainedModel]) -> int | None:
    """The seed of the full model that makes the queries again; None where none does, or pictures
    were not made."""
    return next(
        (
            model.seed
            for model in models
            if model.kind == "full" and (model.mse <= SAME_PICTURE).all()
        ),
        None,
    )


def largest_group(models: Sequence[RetrainedModel]) -> list[RetrainedModel]:
    """Models on random subsets of one size and of one seed: the sum of the scores of larger subsets
    says little else than how large they are, and a seed shifts a query's loss by more than most
    images do. Those of the seed of the queries' own model where there are enough, and of these the
    most (the larger subset, the lower seed of equally many)."""
    groups = {}
    for model in models:
        if model.kind == "subset":
            groups.setdefault((model.num_removed, model.seed), []).append(model)
    own = maker_seed(models)
    is_own = lambda group: group[0].seed == own and len(group) >= FEWEST_SUBSETS
    return max(
        (groups[key] for key in sorted(groups)),
        key=lambda group: (is_own(group), len(group)),
        default=[],
    )


def other_seed_line(models: Sequence[RetrainedModel]) -> str | None:
    """That the LDS is of models of another seed than the queries' model, or None."""
    used, own = largest_group(models), maker_seed(models)
    if not used or own in (None, used[0].seed):
        return None
    return (
        f"The LDS is of models with seed {used[0].seed}, which is not the seed of the queries' "
        f"model ({own}): a query's loss is "
        "lower under its own model's seed."
    )


def left_out_line(models: Sequence[RetrainedModel]) -> str | None:
    """Which models on random subsets the LDS leaves out, or None."""
    used, subsets = largest_group(models), [model for model in models if model.kind == "subset"]
    if len(used) in (0, len(subsets)):
        return None
    return (
        f"The LDS is of the {len(used)} models on {int(used[0].kept.sum())} random images with "
        f"seed {used[0].seed}; the "
        f"{len(subsets) - len(used)} on subsets of another size or with another seed are left "
        f"out: ranks count among alike models only."
    )


@dataclass(frozen=True)
class Measured:
    """Some queries: what methods say of the training images, and how the models of random subsets
    explain the queries."""

    values: Mapping[str, np.ndarray]  # {method: scores [queries, N]}
    kept: np.ndarray  # [models, N] bool
    losses: np.ndarray  # [queries, models]


def find_subsets(
    values: Mapping[str, np.ndarray], models: Sequence[RetrainedModel], command: str
) -> Measured | None:
    """Measured of the largest group of subset models; None where there are none. Raises UserError
    where there are too few (command: that makes more)."""
    subsets = largest_group(models)
    if not subsets:
        return None
    if len(subsets) < FEWEST_SUBSETS:
        raise UserError(
            f"{subsets[0].path.parent}: the LDS needs at least {FEWEST_SUBSETS} models on random "
            f"subsets of one size and seed, found {len(subsets)}; make more: {command}"
        )
    return Measured(
        values,
        np.array([model.kept for model in subsets]),
        np.array([model.losses for model in subsets]).T,
    )


def measure_lds(
    measured: Measured, powers: Mapping[str, float]
) -> tuple[dict[str, tuple], dict[str, np.ndarray]]:
    """LDS after each method's power: ({method: (mean, low, high, ours minus it, low, high)},
    {method: [queries]}); the last three are empty for ours itself."""
    predictions = {
        method: predict(raise_scores(array, powers[method]), measured.kept)
        for method, array in measured.values.items()
    }
    by_query = {method: spearman(array, -measured.losses) for method, array in predictions.items()}
    left_out, found = leave_models_out(predictions, measured.losses), {}
    for method, array in by_query.items():
        difference = [""] * 3
        if OURS in by_query and method != OURS:
            difference = mean_interval(
                by_query[OURS] - array, left_out[OURS] - left_out[method], largest=2
            )
        found[method] = (*mean_interval(array, left_out[method]), *difference)
    return found, by_query


def lds_rows(
    measured: Measured | None, tuning: Measured | None, queries: Sequence[str]
) -> tuple[list[tuple], list[tuple]]:
    """LDS of every method, of its scores as they are and after the power that is best on the tuning
    queries (empty where there are none): rows of COLUMNS, and of QUERY_COLUMNS."""
    if measured is None:
        return [], []
    plain, plain_queries = measure_lds(measured, dict.fromkeys(measured.values, 1))
    chosen = choose_powers(tuning) if tuning else {}
    powers = {method: power for method, (power, _) in chosen.items()}
    powered, powered_queries = measure_lds(measured, powers) if powers else ({}, {})
    rows = []
    for method, numbers in plain.items():
        power, tuning_lds = chosen.get(method, ("", ""))
        rows.append(
            (
                method,
                *numbers,
                power,
                *powered.get(method, [""] * len(NUMBERS)),
                tuning_lds,
                len(tuning.losses) if tuning else 0,
                *measured.losses.shape,
            )
        )
    return rows, [
        (query, method, float(lds[row]), float(powered_queries[method][row]) if chosen else "")
        for row, query in enumerate(queries)
        for method, lds in plain_queries.items()
    ]


def choose_powers(tuning: Measured) -> dict[str, tuple[float, float]]:
    """The power of its scores that is best on the tuning queries, and the LDS after it there, by
    method."""
    return {
        method: choose_power(scores, tuning.kept, tuning.losses)
        for method, scores in tuning.values.items()
    }


def deviation_line(models: Sequence[RetrainedModel]) -> str:
    """What the subsets do to the losses, and what the seed does, which the subsets share with the
    model that made the queries: a query's loss is low under its own model's seed, so that the two
    deviations cannot be subtracted."""
    full, subsets = [model for model in models if model.kind == "full"], largest_group(models)
    deviation = lambda group: np.std([model.losses for model in group], axis=0, ddof=1).mean()
    seeds = ", ".join(str(seed) for seed in sorted({model.seed for model in subsets}))
    line = f"A query's loss deviates by {deviation(subsets):.2e} over the subsets (seed {seeds})"
    return line + (
        f" and by {deviation(full):.2e} over the seeds of {len(full)} full models."
        if len(full) > 1
        else "."
    )
