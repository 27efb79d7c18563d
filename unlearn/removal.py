"""What removing images did: leave-K-out, the same for random images, retention, and the equivalent number of random images.

Arrays of measures are float64 [3, queries] in the order of MEASURES, NaN for queries that were not measured.
"""

import numpy as np

from .datamodels import equivalent_number, interval
from .metrics import compare_paired, mean_and_error
from .scores import OURS, RANDOM

MEASURES = ("dL", "mse", "similarity")
EQUIVALENT_DRAWS = 1000  # of queries, for the interval of an equivalent number
NOTHING = float("nan"), float("nan")


def find_reference(models):
    """The full model that made the queries: the one of the lowest seed; None where there is no full model."""
    return min((model for model in models if model.kind == "full"), key=lambda model: model.seed, default=None)


def measure(model, reference):
    """Of each query: how much higher its loss is than under the reference, and how far the picture made again is from it."""
    return np.stack([model.losses - reference.losses, model.mse, model.similarity])


def mean_measured(values):
    """Mean over the models of values [models, 3, queries], of those that measured; NaN where none did."""
    counts = np.isfinite(values).sum(axis=0)
    return np.where(counts, np.nansum(values, axis=0) / np.maximum(counts, 1), np.nan)


def group_models(models, kind):
    """Models of one kind by (method, number of removed images): numbers rising, ours first, RANDOM last."""
    groups = {}
    for model in models:
        if model.kind == kind:
            groups.setdefault((model.method, model.num_removed), []).append(model)
    return dict(sorted(groups.items(), key=lambda item: (item[0][1], item[0][0] == RANDOM, item[0][0] != OURS, item[0][0] or "")))


def measure_own(models, reference, queries):
    """Measures of each query under the models whose images were removed for it, [3, queries]; the mean where there are several."""
    values = np.full((len(models), 3, len(queries)), np.nan)
    for row, model in zip(values, models):
        if model.query in queries:
            row[:, queries.index(model.query)] = measure(model, reference)[:, queries.index(model.query)]
    return mean_measured(values)


def measure_removals(models, reference, queries):
    """Measures [3, queries] by (method, K), RANDOM last at every K, and how many models made them: ({...}, {...}).
    Random removal is measured on every query that a method of this K, or of any K where there is none, was measured on."""
    groups = group_models(models, "without")
    own = {key: measure_own(group, reference, queries) for key, group in groups.items() if key[0] != RANDOM}
    own = {key: values for key, values in own.items() if np.isfinite(values[0]).any()}  # not of queries of another task file
    values = {}
    for k in sorted({k for _, k in groups}):
        values.update({key: value for key, value in own.items() if key[1] == k})
        if (RANDOM, k) in groups:
            asked = asked_queries({key: value for key, value in own.items() if key[1] == k} or own, len(queries))
            values[RANDOM, k] = np.where(asked, mean_measured([measure(model, reference) for model in groups[RANDOM, k]]), np.nan)
    return values, {key: len(groups[key]) for key in values}


def asked_queries(values, count):
    """Mask [count] of the queries that any of the values (those of a method and K) is of; all where there are none."""
    return np.any([np.isfinite(each[0]) for each in values.values()], axis=0) if values else np.ones(count, bool)


def summarise_measures(values):
    """Mean and standard error over the measured queries of each of [3, queries], one after the other."""
    return [number for row in values for number in (mean_and_error(row[np.isfinite(row)]) if np.isfinite(row).any() else NOTHING)]


def removal_rows(values, counts):
    """Rows (method, K, queries, models, mean and standard error of each measure)."""
    return [(*key, int(np.isfinite(each[0]).sum()), counts[key], *summarise_measures(each)) for key, each in values.items()]


def floor_rows(models, reference, asked):
    """Rows like `removal_rows` of the full models: how well the one that made the queries makes them again, and how far models
    of other seeds are from it without any image removed."""
    full = [model for model in models if model.kind == "full"]
    groups = {f"full, seed {reference.seed}": [model for model in full if model.seed == reference.seed],
              "full, other seeds": [model for model in full if model.seed != reference.seed]}
    values = {name: mean_measured([measure(model, reference) for model in group])[:, asked] for name, group in groups.items() if group}
    return [(name, 0, int(asked.sum()), len(groups[name]), *summarise_measures(each)) for name, each in values.items()]


def paired_rows(values):
    """Rows (baseline, K, queries, then of each measure: mean difference, standard error, ratio) of ours minus each other method of
    the same K, over the queries that both were measured on."""
    rows = []
    for (method, k), other in values.items():
        if method == OURS or (OURS, k) not in values:
            continue
        both = np.isfinite(values[OURS, k]) & np.isfinite(other)
        if both[0].any():
            pairs = [compare_paired(mine[mask], others[mask]) if mask.any() else (np.nan,) * 3
                     for mine, others, mask in zip(values[OURS, k], other, both)]
            rows.append((method, k, int(both[0].sum()), *(number for pair in pairs for number in pair)))
    return rows


def retention_rows(models, reference, queries):
    """Rows (method, K, models, own |dL|, others' |dL| and its standard error over models, own MSE, others' MSE and its standard
    error): what a removal did to the query it was for, and to all others. Removals without a query have others only; so have
    the full models of other seeds."""
    groups = group_models([model for model in models if model.query is None or model.query in queries], "without")
    others = [model for model in models if model.kind == "full" and model.seed != reference.seed]
    if others:
        groups["full, other seeds", 0] = others
    return [(method, k, len(group), *retention(group, reference, queries)) for (method, k), group in groups.items()]


def retention(models, reference, queries):
    """One row of `retention_rows`, less its names."""
    own, rest = np.full((len(models), 2), np.nan), np.full((len(models), 2), np.nan)
    for index, model in enumerate(models):
        changes, mse, _ = measure(model, reference)
        is_own = np.array([query == model.query for query in queries])
        for column, values in enumerate((np.abs(changes), mse)):
            for target, rows in (own, is_own), (rest, ~is_own):
                measured = values[rows & np.isfinite(values)]
                target[index, column] = measured.mean() if len(measured) else np.nan
    return [number for column in (0, 1)
            for number in (summarise_measures(own[None, :, column])[0], *summarise_measures(rest[None, :, column]))]


def random_changes(models, reference):
    """Loss changes by number of randomly removed images, the random halves among them: (numbers [n], changes [n, queries],
    models [n])."""
    groups = {k: group for (method, k), group in group_models(models, "without").items() if method == RANDOM}
    for (_, k), group in group_models(models, "subset").items():
        groups[k] = groups.get(k, []) + group
    counts = sorted(groups)
    changes = [np.mean([model.losses - reference.losses for model in groups[k]], axis=0) for k in counts]
    return np.array(counts), np.array(changes), np.array([len(groups[k]) for k in counts])


def equivalent_rows(values, curve, seed=0):
    """Rows (method, K, queries, mean dL, equivalent number, low, high) of each method and K: how many random images must be
    removed for the same loss change of the same queries; the interval from drawing queries anew. Infinity: more than were
    tried. Source: [AbU] Fig. 12."""
    (counts, changes, weights), rows = curve, []
    for (method, k), each in values.items():
        if method == RANDOM or not len(counts):
            continue
        asked = np.flatnonzero(np.isfinite(each[0]))
        generator = np.random.Generator(np.random.Philox(seed))
        draws = [asked, *asked[generator.integers(len(asked), size=(EQUIVALENT_DRAWS, len(asked)))]]
        numbers = [equivalent_number(counts, changes[:, drawn].mean(axis=1), weights, each[0, drawn].mean()) for drawn in draws]
        rows.append((method, k, len(asked), float(each[0, asked].mean()), numbers[0], *interval(numbers[1:])))
    return rows
