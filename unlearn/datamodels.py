"""How well scores predict models that were retrained: rank correlation, its intervals, and curves that never fall. NumPy only.

A linear datamodel predicts a query's loss under a model trained on a subset by the sum of the subset's scores; the linear
datamodeling score (LDS) is the rank correlation of the two over many subsets. Source: Park et al., TRAK, ICML 2023, section 2.
"""

import numpy as np

DRAWS = 2000  # of the bootstrap
CHUNK = 50  # draws at once; memory only
INTERVAL = (2.5, 97.5)  # percentiles: 95 %


def count_below(values):
    """Of each entry of values [rows, n]: how many of its row are smaller, and how many are not larger, int64 [2, rows, n]; and
    the order that sorts each row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered, places = np.take_along_axis(values, order, axis=1), np.arange(values.shape[1])
    is_first = np.ones(values.shape, bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    is_last = np.concatenate([is_first[:, 1:], np.ones((len(values), 1), bool)], axis=1)
    low = np.maximum.accumulate(np.where(is_first, places, 0), axis=1)
    high = np.minimum.accumulate(np.where(is_last, places + 1, len(places))[:, ::-1], axis=1)[:, ::-1]
    bounds = np.empty((2, *values.shape), np.int64)
    for bound, sorted_bound in zip(bounds, (low, high)):
        np.put_along_axis(bound, order, sorted_bound, axis=1)
    return bounds, order


def average_ranks(values):
    """Ranks from 1 within each row of values [rows, n], equal values sharing the mean of theirs, float64."""
    (low, high), _ = count_below(values)
    return (low + high + 1) / 2


def resampled_ranks(bounds, order, weights):
    """`average_ranks` of rows in which entry m stands weights[draw, m] times, less a constant: [draws, rows, n].
    bounds, order: of `count_below`; no row is sorted again."""
    totals = np.zeros((len(weights), len(order), order.shape[1] + 1))
    np.cumsum(weights[:, order], axis=2, out=totals[:, :, 1:])
    low, high = (np.take_along_axis(totals, bound[None], axis=2) for bound in bounds)
    return (low + high) / 2


def correlate(first, second, weights):
    """Correlation of two arrays over their last axis, entries counted by weights; 0 where one of them is constant there:
    what says nothing predicts nothing."""
    total = weights.sum(axis=-1, keepdims=True)
    first, second = (values - (weights * values).sum(axis=-1, keepdims=True) / total for values in (first, second))
    squares = (weights * first ** 2).sum(axis=-1) * (weights * second ** 2).sum(axis=-1)
    return (weights * first * second).sum(axis=-1) / np.sqrt(np.where(squares > 0, squares, np.inf))


def spearman(first, second):
    """Rank correlation of each row of first and second [rows, n], float64 [rows]; ties share their mean rank."""
    return correlate(average_ranks(first), average_ranks(second), np.ones(first.shape[1]))


def predict(scores, kept):
    """Sum of the scores of the kept images, [queries, models], from scores [queries, N] and kept [models, N], bool. Scores
    are first shifted to a mean of 0, which changes no rank among subsets of one size but keeps digits."""
    scores = np.asarray(scores, np.float64)
    return (scores - scores.mean(axis=1, keepdims=True)) @ np.asarray(kept, np.float64).T


def datamodeling_scores(scores, kept, losses):
    """LDS of each query, [queries]: the rank correlation, over models, of what the scores predict and minus the loss.
    losses: [queries, models]. Source: Park et al., TRAK, ICML 2023, definition 2.3."""
    return spearman(predict(scores, kept), -losses)


def bootstrap_scores(predictions, losses, seed=0, draws=DRAWS, over_models=True):
    """Mean LDS of each method in each bootstrap draw: {method: [draws]}. Queries and models are both drawn with replacement,
    the same ones for every method, so that differences of methods can be taken draw by draw.

    predictions: {method: [queries, models]}; losses: [queries, models]. Source: Owen, The pigeonhole bootstrap, 2007: drawing
    both is never too narrow on average.
    """
    query_draws, model_draws = np.random.Generator(np.random.Philox(seed)).spawn(2)
    num_queries, num_models = losses.shape
    measured, sorted_losses = {method: np.empty(draws) for method in predictions}, count_below(-losses)
    sorted_predictions = {method: count_below(values) for method, values in predictions.items()}
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        queries = query_draws.multinomial(num_queries, np.full(num_queries, 1 / num_queries), size)
        models = np.ones((size, num_models))
        if over_models:
            models = model_draws.multinomial(num_models, np.full(num_models, 1 / num_models), size)
        ranks = resampled_ranks(*sorted_losses, models)
        for method, sorted_values in sorted_predictions.items():
            values = correlate(resampled_ranks(*sorted_values, models), ranks, models[:, None])
            measured[method][start:start + size] = (values * queries).sum(axis=1) / num_queries
    return measured


def interval(draws):
    """The 95 % percentile interval of bootstrap draws: (low, high). Draws at infinity stay there."""
    return tuple(float(bound) for bound in np.percentile(draws, INTERVAL, method="nearest"))


def fit_rising(values, weights):
    """The closest values that never fall, by weighted squares: neighbours that fall are pooled until none does."""
    blocks = []
    for value, weight in zip(values, weights):
        blocks.append((float(value), float(weight), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (left, left_weight, left_count), (right, right_weight, right_count) = blocks[-2:]
            weight = left_weight + right_weight
            blocks[-2:] = [((left * left_weight + right * right_weight) / weight, weight, left_count + right_count)]
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def equivalent_number(counts, changes, weights, target):
    """How many random images must be removed for a change of `target`: where the line through (0, 0) and the rising fit of
    (counts, changes) first reaches it; 0 for a target of 0 or less, infinity where the line ends below it.

    counts: rising numbers of removed images; changes: the mean loss change of each; weights: models of each.
    Source: [AbU] Fig. 12.
    """
    if target <= 0:
        return 0.0
    heights = np.concatenate([[0.0], np.maximum(fit_rising(changes, weights), 0)])
    places, reached = np.concatenate([[0.0], counts]), int(np.searchsorted(heights, target))
    if reached == len(heights):
        return float("inf")
    step = (target - heights[reached - 1]) / (heights[reached] - heights[reached - 1])
    return float(places[reached - 1] + step * (places[reached] - places[reached - 1]))
