"""The equivalent number of random images: how many must be removed at random for the loss change
that a method's K images bring. Arrays of measures are those of `removal`."""

from collections.abc import Mapping, Sequence

import numpy as np

from .datamodels import equivalent_number, interval
from .removal import NOTHING, group_models
from .retrained_models import RetrainedModel
from .scores import RANDOM

EQUIVALENT_DRAWS = 1000  # of queries and models, for the interval of an equivalent number


def random_groups(models: Sequence[RetrainedModel]) -> dict[int, list[RetrainedModel]]:
    """Models without random images, the random subsets among them, by the number of these images,
    rising."""
    groups = {
        k: group
        for (method, k), group in group_models(models, "without").items()
        if method == RANDOM
    }
    for (_, k), group in group_models(models, "subset").items():
        groups[k] = groups.get(k, []) + group
    return dict(sorted(groups.items()))


def random_changes(
    models: Sequence[RetrainedModel], reference: RetrainedModel
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss changes by number of randomly removed images: (numbers [n], changes [n, queries], models
    [n])."""
    groups = random_groups(models)
    changes = [
        np.mean([model.losses - reference.losses for model in group], axis=0)
        for group in groups.values()
    ]
    return (
        np.array(list(groups)),
        np.array(changes),
        np.array([len(group) for group in groups.values()]),
    )


def shared_variance(losses: np.ndarray) -> float:
    """By how much models shift all queries alike, as a variance: the mean covariance of two queries
    over the models. losses: [models, queries]."""
    covariance, count = np.atleast_2d(np.cov(losses.T)), losses.shape[1]
    return (covariance.sum() - np.trace(covariance)) / max(count * (count - 1), 1)


def random_deviations(models: Sequence[RetrainedModel]) -> np.ndarray | None:
    """Standard deviation of each of `random_changes` that other random images of the same numbers
    would bring to all queries alike, [numbers]; what they bring to single queries is seen where
    queries are drawn. Samples of K of N images vary by K (N - K): so numbers with several models
    tell of the others too. None where no number has two."""
    groups = random_groups(models)
    sizes = {k: k * (len(group[0].kept) - k) for k, group in groups.items()}
    found = [
        (len(group) - 1, shared_variance(np.array([model.losses for model in group])) / sizes[k])
        for k, group in groups.items()
        if len(group) > 1
    ]
    if not found:
        return None
    weights, variances = np.array(found).T
    variance = max(float(np.average(variances, weights=weights)), 0.0)
    return np.sqrt([variance * sizes[k] / len(group) for k, group in groups.items()])


def equivalent_rows(
    values: Mapping[tuple, np.ndarray],
    curve: tuple[np.ndarray, np.ndarray, np.ndarray],
    deviations: np.ndarray | None,
    seed: int = 0,
) -> list[tuple]:
    """Rows (method, K, queries, mean dL, equivalent number, low, high, most tried) of each method
    and K: how many random images must be removed for the same loss change of the same queries.
    Infinity: more than were tried. The interval is from drawing queries, and with each the model
    without its images, and the shifts of the models without random images; NaN for a single query.
    deviations: of `random_deviations`, or None: those models' are not in it then. Source: [AbU]
    Fig. 12."""
    (counts, changes, weights), rows = curve, []
    for (method, k), each in values.items():
        if method == RANDOM or not len(counts):
            continue
        asked = np.flatnonzero(np.isfinite(each[0]))
        means = np.append(changes[:, asked].mean(axis=1), each[0, asked].mean())
        number = equivalent_number(counts, means[:-1], weights, means[-1])
        bounds = (
            interval(
                draw_equivalents(
                    np.vstack([changes, each[0]])[:, asked], counts, weights, deviations, seed
                )
            )
            if len(asked) > 1
            else NOTHING
        )
        rows.append((method, k, len(asked), float(means[-1]), number, *bounds, int(counts.max())))
    return rows


def draw_equivalents(
    changes: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    deviations: np.ndarray | None,
    seed: int,
) -> list[float]:
    """Equivalent numbers of EQUIVALENT_DRAWS draws. changes: [numbers + 1, queries], the last of
    the method; deviations: of `random_deviations`. A bootstrap of a few queries is too narrow: its
    draws are widened as Student's distribution is."""
    generator, count = np.random.Generator(np.random.Philox(seed)), changes.shape[1]
    drawn = changes[:, generator.integers(count, size=(EQUIVALENT_DRAWS, count))].mean(axis=2).T
    widening = np.sqrt(count / generator.chisquare(count - 1, (EQUIVALENT_DRAWS, 1)))
    drawn = changes.mean(axis=1) + widening * (drawn - changes.mean(axis=1))
    if deviations is not None:
        drawn[:, :-1] += deviations * generator.normal(size=(EQUIVALENT_DRAWS, len(counts)))
    return [equivalent_number(counts, row[:-1], weights, row[-1]) for row in drawn]
