"""How well scores predict models that were retrained: rank correlation, its intervals, and curves
that never fall. NumPy only.

A linear datamodel predicts a query's loss under a model trained on a subset by the sum of the
subset's scores; the linear datamodeling score (LDS) is the rank correlation of the two over many
subsets. Source: Park et al., TRAK, ICML 2023, section 2.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from .metrics import student_quantile

CHUNK = 50  # left-out models at once; memory only
INTERVAL = (2.5, 97.5)  # percentiles: 95 %
POWERS = (1, 1.5, 2, 3, 4)  # of scores before they are summed
# sums that are nearer, as a share of the sum of all magnitudes, are equal: float64 errs by far less
ROUNDING = 1e-10


def count_below(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each entry of values [rows, n]: how many of its row are smaller, and how many are not
    larger, int64 [2, rows, n]; and the order that sorts each row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered, places = np.take_along_axis(values, order, axis=1), np.arange(values.shape[1])
    is_first = np.ones(values.shape, bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_last = np.concatenate([is_first[:, 1:], np.ones((len(values), 1), bool)], axis=1)
    low = np.maximum.accumulate(np.where(is_first, places, 0), axis=1)
    high = np.minimum.accumulate(np.where(is_last, places + 1, len(places))[:, ::-1], axis=1)[
        :, ::-1
    ]
    bounds = np.empty((2, *values.shape), np.int64)
    for number, sorted_bound in enumerate((low, high)):
        np.put_along_axis(bounds[number], order, sorted_bound, axis=1)
    return bounds, order


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 within each row of values [rows, n], equal values sharing the mean of theirs,
    float64."""
    (low, high), _ = count_below(values)
    return (low + high + 1) / 2


def resampled_ranks(bounds: np.ndarray, order: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`average_ranks` of rows in which entry m stands weights[draw, m] times, less a constant:
    [draws, rows, n]. bounds, order: of `count_below`; no row is sorted again."""
    totals = np.zeros((len(weights), len(order), order.shape[1] + 1))
    np.cumsum(weights[:, order], axis=2, out=totals[:, :, 1:])
    low, high = (np.take_along_axis(totals, bound[None], axis=2) for bound in bounds)
    return (low + high) / 2


def correlate(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of two arrays over their last axis, entries counted by weights; 0 where one of
    them is constant there: what says nothing predicts nothing."""
    total = weights.sum(axis=-1, keepdims=True)
    first, second = (
        values - (weights * values).sum(axis=-1, keepdims=True) / total
        for values in (first, second)
    )
    squares = (weights * first**2).sum(axis=-1) * (weights * second**2).sum(axis=-1)
    return (weights * first * second).sum(axis=-1) / np.sqrt(np.where(squares > 0, squares, np.inf))


def spearman(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Rank correlation of each row of first and second [rows, n], float64 [rows]; ties share their
    mean rank."""
    return correlate(average_ranks(first), average_ranks(second), np.ones(first.shape[1]))


def merge_equal(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Values [rows, n] of which those that sorting puts less than `least` [rows, 1] apart are
    equal, to the smallest of them."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered, merged = np.take_along_axis(values, order, axis=1), np.empty_like(values)
    is_first = np.diff(ordered, axis=1, prepend=-np.inf) > least
    firsts = np.maximum.accumulate(np.where(is_first, np.arange(values.shape[1]), 0), axis=1)
    np.put_along_axis(merged, order, np.take_along_axis(ordered, firsts, axis=1), axis=1)
    return merged


def predict(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Sum of the scores of the kept images, [queries, models], from scores [queries, N] and kept
    [models, N], bool. Scores are first shifted to a mean of 0, which changes no rank among subsets
    of one size but keeps digits. Sums that differ by rounding alone are made equal: ranks would
    take their order for knowledge."""
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.mean(axis=1, keepdims=True)
    return merge_equal(
        shifted @ np.asarray(kept, np.float64).T,
        ROUNDING * np.abs(shifted).sum(axis=1, keepdims=True),
    )


def datamodeling_scores(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """LDS of each query, [queries]: the rank correlation, over models, of what the scores predict
    and minus the loss. losses: [queries, models]. Source: Park et al., TRAK, ICML 2023, definition
    2.3."""
    return spearman(predict(scores, kept), -losses)


def raise_scores(scores: np.ndarray, power: float) -> np.ndarray:
    """Scores [queries, N] to a power, negative ones taken as 0 before it; as they are where it is
    1. No power changes the order of positive scores, but all change what their sum says: a higher
    one lets fewer images count."""
    scores = np.asarray(scores, np.float64)
    return scores if power == 1 else np.maximum(scores, 0) ** power


def choose_power(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """The power of POWERS with the highest mean LDS, and that LDS; the smallest of equal ones."""
    means = [
        float(datamodeling_scores(raise_scores(scores, power), kept, losses).mean())
        for power in POWERS
    ]
    return POWERS[int(np.argmax(means))], max(means)


def leave_models_out(
    predictions: Mapping[str, np.ndarray], losses: np.ndarray
) -> dict[str, np.ndarray]:
    """LDS of each query without each of the models in turn: {method: [models, queries]}.

    predictions: {method: [queries, models]}; losses: [queries, models].
    """
    weights = 1 - np.eye(losses.shape[1])
    measured = {method: np.empty(losses.T.shape) for method in predictions}
    sorted_losses = count_below(-losses)
    sorted_predictions = {method: count_below(values) for method, values in predictions.items()}
    for start in range(0, len(weights), CHUNK):
        kept = weights[start : start + CHUNK]
        ranks = resampled_ranks(*sorted_losses, kept)
        for method, sorted_values in sorted_predictions.items():
            measured[method][start : start + CHUNK] = correlate(
                resampled_ranks(*sorted_values, kept), ranks, kept[:, None]
            )
    return measured


def mean_interval(
    by_query: np.ndarray, left_out: np.ndarray, largest: float = 1
) -> tuple[float, float, float]:
    """The mean over queries of a measure [queries], LDS or a difference of two, and its 95 %
    interval: (mean, low, high), within what the measure can be, -largest to largest.

    Queries and models are both samples. How the queries differ already holds what the models do to
    each of them apart; what they do to all queries alike, the mean covariance of two queries by the
    jackknife over the models, is added. (Drawing both in one bootstrap counts the first part three
    times: Owen, The pigeonhole bootstrap, 2007.) left_out: [models, queries], of
    `leave_models_out`. Source: Cameron, Gelbach and Miller, Robust inference with multiway
    clustering, 2011; Student's t with the degrees of freedom of the fewer of the two.
    """
    (num_models, num_queries), deviations = left_out.shape, left_out - left_out.mean(axis=0)
    jackknife = (num_models - 1) / num_models
    variance = jackknife * np.sum(deviations.mean(axis=1) ** 2)
    if num_queries > 1:
        alike = variance - jackknife * np.sum(deviations**2) / num_queries**2
        variance = by_query.var(ddof=1) / num_queries + max(alike, 0)
    fewest = min(num_queries, num_models) if num_queries > 1 else num_models
    mean, reach = float(by_query.mean()), float(student_quantile(fewest - 1) * np.sqrt(variance))
    return mean, max(mean - reach, -largest), min(mean + reach, largest)


def interval(draws: Sequence[float]) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap draws: (low, high). Draws at infinity stay
    there."""
    low, high = np.percentile(draws, INTERVAL, method="nearest")
    return float(low), float(high)


def fit_rising(
    values: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray
) -> np.ndarray:
    """The closest values that never fall, by weighted squares: neighbours that fall are pooled
    until none does."""
    blocks = []
    for value, weight in zip(values, weights):
        blocks.append((float(value), float(weight), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, left_weight, left_count), (right, right_weight, right_count) = blocks[-2:]
            weight = left_weight + right_weight
            blocks[-2:] = [
                (
                    (left * left_weight + right * right_weight) / weight,
                    weight,
                    left_count + right_count,
                )
            ]
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def equivalent_number(
    counts: np.ndarray, changes: np.ndarray, weights: np.ndarray, target: float
) -> float:
    """How many random images must be removed for a change of `target`: where the line through (0,
    0) and the rising fit of (counts, changes) first reaches it; 0 for a target of 0 or less,
    infinity where the line ends below it.

    counts: rising numbers of removed images; changes: the mean loss change of each; weights: models
    of each. Source: [AbU] Fig. 12.
    """
    if target <= 0:
        return 0.0
    heights = np.concatenate([[0.0], np.maximum(fit_rising(changes, weights), 0)])
    places, reached = np.concatenate([[0.0], counts]), int(np.searchsorted(heights, target))
    if reached == len(heights):
        return float("inf")
    step = (target - heights[reached - 1]) / (heights[reached] - heights[reached - 1])
    return float(places[reached - 1] + step * (places[reached] - places[reached - 1]))
