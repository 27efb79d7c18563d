"""How well a ranking finds the exemplars: Recall@k, average precision, what chance gives, and their
tables. NumPy only.

Ranks count from 1 (the most influential image). Source: [AbC] section 5, Recall@{5, 10, 100} and
mAP.
"""

from collections.abc import Mapping, Sequence

import numpy as np

RECALL_AT = (5, 10, 100)
ROUNDING = 1e-12  # a standard error below this is that of equal differences
QUADRATURE = np.polynomial.legendre.leggauss(100)  # nodes and weights on [-1, 1]
METRICS = (*(f"Recall@{k}" for k in RECALL_AT), "mAP")  # of one query, mAP is its average precision


def exemplar_ranks(order: np.ndarray, is_exemplar: np.ndarray) -> np.ndarray:
    """Ranks of the exemplars, rising, int64 [exemplars], from indices by falling score [n] and a
    mask [n]."""
    return np.flatnonzero(is_exemplar[order]) + 1


def is_tied(scores: np.ndarray, is_exemplar: np.ndarray) -> bool:
    """Whether an exemplar has exactly the score of an image that is none, so that the sort's order
    decides."""
    return bool(np.isin(scores[is_exemplar], scores[~is_exemplar]).any())


def recall(ranks: np.ndarray, k: int) -> float:
    """Fraction of the exemplars within the top k."""
    return float(np.mean(ranks <= k))


def average_precision(ranks: np.ndarray) -> float:
    """Mean over the exemplars of the precision at their ranks (rising)."""
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def highest_recall(num_exemplars: int, k: int) -> float:
    """The highest Recall@k that a ranking can have: below 1 where there are more than k
    exemplars."""
    return min(k, num_exemplars) / num_exemplars


def expected_recall(num_candidates: int, k: int) -> float:
    """Mean of Recall@k over all orders of the candidates."""
    return min(k, num_candidates) / num_candidates


def expected_average_precision(num_exemplars: int, num_candidates: int) -> float:
    """Mean of the average precision over all orders of n candidates with R exemplars.

    Rank k holds an exemplar with probability R / n, and then (k - 1) (R - 1) / (n - 1) others are
    expected before it: E[AP] = 1/n sum_k 1/k (1 + (k - 1) (R - 1) / (n - 1)) = (H + (n - H) (R - 1)
    / (n - 1)) / n with H = sum_k 1/k.
    """
    harmonic = float(np.sum(1 / np.arange(1, num_candidates + 1)))
    others = (num_exemplars - 1) / (num_candidates - 1) if num_candidates > 1 else 0
    return (harmonic + (num_candidates - harmonic) * others) / num_candidates


def query_metrics(ranks: np.ndarray) -> np.ndarray:
    """The metrics of one query in the order of METRICS, float64, from its exemplars' ranks."""
    return np.array([*(recall(ranks, k) for k in RECALL_AT), average_precision(ranks)])


def chance_metrics(num_exemplars: int, num_candidates: int) -> np.ndarray:
    """What a random order gives on average, exactly, in the order of METRICS."""
    return np.array(
        [
            *(expected_recall(num_candidates, k) for k in RECALL_AT),
            expected_average_precision(num_exemplars, num_candidates),
        ]
    )


def highest_metrics(num_exemplars: int) -> np.ndarray:
    """The highest values a ranking can have, in the order of METRICS."""
    return np.array([*(highest_recall(num_exemplars, k) for k in RECALL_AT), 1.0])


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of values [queries] and its standard error, NaN for a single query."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(
        values
    ) > 1 else float("nan")


def student_p(ratio: float, freedom: int) -> float:
    """Chance that Student's t with so many degrees of freedom is at least as far from 0 as a ratio:
    the p value of a two-sided test. With t = sqrt(freedom) tan(angle) its density is
    cos(angle)^(freedom - 1), but for a constant factor."""
    nodes, weights = QUADRATURE
    starts = np.array([np.arctan(abs(ratio) / np.sqrt(freedom)), 0])
    halves = (np.pi / 2 - starts) / 2
    tail, whole = halves * (
        np.cos(starts[:, None] + halves[:, None] * (nodes + 1)) ** (freedom - 1) @ weights
    )
    return float(tail / whole)


def student_quantile(freedom: int, p: float = 0.05) -> float:
    """How many standard errors an interval reaches to each side, where p is the chance to miss:
    2.78 for 5 values, 2.00 for 60."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, freedom) > p else (low, middle)
    return high


def compare_paired(ours: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Mean of ours - others, its paired standard error, and the p value of Student's t test that it
    is 0, NaN where that is undefined: a single pair, or the same difference in all."""
    mean, error = mean_and_error(np.asarray(ours) - np.asarray(others))
    return mean, error, student_p(mean / error, len(ours) - 1) if error > ROUNDING else float("nan")


def compare_by_model(ours: np.ndarray, others: np.ndarray, models: np.ndarray) -> float:
    """The p value of `compare_paired` with a model as the unit, by the mean over its queries:
    queries of one model share its exemplars. NaN where every query has a model of its own, and for
    a single model."""
    names, differences = np.unique(models), np.asarray(ours) - np.asarray(others)
    if len(names) in (1, len(differences)):
        return float("nan")
    means = np.array([differences[models == name].mean() for name in names])
    return compare_paired(means, np.zeros(len(means)))[2]


def summarise(
    values: Mapping[str, np.ndarray], highest: np.ndarray, groups: Mapping[str, np.ndarray]
) -> list[tuple]:
    """Rows (method, group, metric, mean, standard error, highest possible, queries), group by
    group.

    values: {method: [queries, metrics]}; highest: [queries, metrics]; groups: {name: row numbers}.
    """
    return [
        (
            method,
            group,
            metric,
            *mean_and_error(array[rows, column]),
            float(highest[rows, column].mean()),
            len(rows),
        )
        for group, rows in groups.items()
        for method, array in values.items()
        for column, metric in enumerate(METRICS)
    ]


def compare_methods(
    values: Mapping[str, np.ndarray],
    ours: str,
    groups: Mapping[str, np.ndarray],
    metrics: Sequence[str],
    models: np.ndarray,
) -> list[tuple]:
    """Rows (baseline, group, metric, mean difference, standard error, p, p by model, queries) of
    `ours` minus each other method, paired by query; values and groups as for `summarise`, models:
    names of the queries' models [queries]."""
    pairs = [
        (
            method,
            group,
            metric,
            array[rows, METRICS.index(metric)],
            values[ours][rows, METRICS.index(metric)],
            models[rows],
        )
        for group, rows in groups.items()
        for method, array in values.items()
        if method != ours
        for metric in metrics
    ]
    return [
        (
            method,
            group,
            metric,
            *compare_paired(mine, others),
            compare_by_model(mine, others, names),
            len(mine),
        )
        for method, group, metric, others, mine, names in pairs
    ]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned: the first to the left, the others to the
    right."""
    widths = [
        max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))
    ]  # a rule of one colon is none
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        for row in [header, rule, *rows]
    ]
    return [f"| {' | '.join(row)} |" for row in cells]


def format_mean(mean: float, error: float, sign: str = "") -> str:
    """`0.400 ± 0.100`; without an error where there is none (a single query)."""
    return f"{mean:{sign}.3f}" + (f" ± {error:.3f}" if np.isfinite(error) else "")


def format_p(p: float) -> str:
    """A p value, `< 0.001` where it is smaller; empty where it is undefined."""
    return "" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def summary_table(summary: Sequence[tuple], group: str) -> list[str]:
    """Lines of the Markdown table of one group of `summarise`: methods x metrics, and last what no
    ranking can exceed, where that is below 1."""
    cells = {(row[0], row[2]): row[3:] for row in summary if row[1] == group}
    methods = list(dict.fromkeys(method for method, _ in cells))
    rows = [
        [method, *(format_mean(*cells[method, metric][:2]) for metric in METRICS)]
        for method in methods
    ]
    highest = [cells[methods[0], metric][2] for metric in METRICS]
    if min(highest) < 1:
        rows.append(
            ["highest possible", *(f"{value:.3f}" if value < 1 else "" for value in highest)]
        )
    return markdown_table(["method", *METRICS], rows)


def paired_table(paired: Sequence[tuple], group: str) -> list[str]:
    """Lines of the Markdown table of one group of `compare_methods`: differences and their p
    values."""
    cells = {(row[0], row[2]): row[3:7] for row in paired if row[1] == group}
    methods, metrics = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    rows = [
        [
            method,
            *(
                text
                for metric in metrics
                for mean, error, p, by_model in [cells[method, metric]]
                for text in (format_mean(mean, error, "+"), format_p(p), format_p(by_model))
            ),
        ]
        for method in methods
    ]
    return markdown_table(
        ["ours minus", *(text for metric in metrics for text in (metric, "p", "p by model"))], rows
    )
