"""How well rankings find the exemplars of customized models: tables by group of queries, and CSV
files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..datasets.tasks import Task, group_by_model
from ..report.ranking import write_csv
from ..runtime.printing import show
from .metrics import (
    METRICS,
    compare_methods,
    highest_metrics,
    paired_table,
    summarise,
    summary_table,
)
from .rankings import EFFECTS, Ranking, count_warnings
from .scores import OURS

Groups = dict[str, np.ndarray]  # row numbers of queries by name

PAIRED_METRICS = ("Recall@10", "mAP")
COLUMNS = {  # of the CSV files; a standard error of a single query is empty
    "evaluate": (
        "method",
        "group",
        "metric",
        "mean",
        "standard_error",
        "highest_possible",
        "queries",
    ),
    "paired": (
        "baseline",
        "group",
        "metric",
        "mean_difference",
        "standard_error",
        "p",
        "p_by_model",
        "queries",
    ),
    "queries": (
        "synth_image_path",
        "test_case",
        "kind",
        "exemplars",
        "candidates",
        "method",
        *METRICS[:-1],
        "AP",
    ),
}


def kind_of(task: Task) -> str:
    """style where the customized model learned a style, by its train prompt, else object."""
    return "style" if " style of " in (task.train_prompt or "").lower() else "object"


def group_queries(tasks: Sequence[Task]) -> Groups:
    """Row numbers of the queries of each group: all, the kinds, the test cases."""
    labels = [("all", kind_of(task), str(task.test_case)) for task in tasks]
    names = dict.fromkeys(label[part] for part in range(3) for label in labels)
    return {
        name: np.array([row for row, label in enumerate(labels) if name in label]) for name in names
    }


def without_cases(groups: Groups) -> Groups:
    """The groups but for the test cases."""
    return {name: rows for name, rows in groups.items() if name in ("all", "object", "style")}


def name_groups(groups: Groups) -> dict[str, str]:
    """Titles by group, one for all groups of the same queries: {"all": "all = object"}."""
    titles = {}
    for name, rows in groups.items():
        titles.setdefault(tuple(rows), []).append(name)
    return {names[0]: " = ".join(names) for names in titles.values()}


def format_change(value: float) -> str:
    """A change of losses; empty where an influence file of an earlier version does not say it."""
    return "" if value != value else f"{value:+.1e}"


def effect_table(rankings: Sequence[Ranking], groups: Groups) -> list[str]:
    """Markdown lines: how far unlearning moved the weights and the losses, the mean of each
    group."""
    effects = np.array([ranking.effect for ranking in rankings])
    rows = [
        [
            name,
            f"{effects[rows, 0].mean():.1%}",
            f"{effects[rows, 1].mean():.4f}",
            *(format_change(value) for value in effects[rows, 2:].mean(axis=0)),
        ]
        for name, rows in groups.items()
    ]
    return [
        f"| {' | '.join(cells)} |"
        for cells in (["", *EFFECTS], ["---"] + ["---:"] * len(EFFECTS), *rows)
    ]


def spread(numbers: Sequence[int]) -> str:
    """`5`, or `3 to 7` where they differ."""
    return (
        f"{min(numbers):,}"
        if min(numbers) == max(numbers)
        else f"{min(numbers):,} to {max(numbers):,}"
    )


def print_tables(
    tasks: Sequence[Task],
    rankings: Sequence[Ranking],
    summary: Sequence[tuple],
    paired: Sequence[tuple],
    groups: Groups,
) -> None:
    """All tables, in Markdown. summary, paired: of `summarise` and `compare_methods`."""
    counts = [len(task.exemplar_paths) for task in tasks]
    candidates = [ranking.num_candidates for ranking in rankings]
    print(
        f"{len(tasks)} queries of {len(group_by_model(tasks))} models; {spread(candidates)} "
        f"candidates each, {spread(counts)} of them exemplars.\nMean ± standard error over "
        f"queries, taken as independent.\n"
    )
    for group, title in name_groups(groups).items():
        show(f"{title} ({len(groups[group])} queries)", "", *summary_table(summary, group), "")
    for group, title in name_groups(without_cases(groups)).items():
        show(
            f"{title}: {OURS} minus each baseline, paired by query (p: Student's t test over "
            f"queries, and over models)",
            "",
            *paired_table(paired, group),
            "",
        )
    if any(np.isfinite(ranking.effect[0]) for ranking in rankings):  # removal unlearns nothing
        show("What unlearning did, mean over queries", "", *effect_table(rankings, groups), "")


def query_rows(
    tasks: Sequence[Task], rankings: Sequence[Ranking], values: Mapping[str, np.ndarray]
) -> list[tuple]:
    """Rows of COLUMNS["queries"]."""
    return [
        (
            task.synth_image_path,
            task.test_case,
            kind_of(task),
            len(task.exemplar_paths),
            ranking.num_candidates,
            method,
            *array[row].tolist(),
        )
        for row, (task, ranking) in enumerate(zip(tasks, rankings))
        for method, array in values.items()
    ]


def report(
    tasks: Sequence[Task],
    rankings: Sequence[Ranking],
    values: Mapping[str, np.ndarray],
    notices: Sequence[str],
    output: str,
) -> None:
    """Prints the tables and writes evaluate.csv, paired.csv and queries.csv. values: {method:
    [queries, metrics]}; notices: a line each."""
    groups = group_queries(tasks)
    highest = np.array([highest_metrics(len(task.exemplar_paths)) for task in tasks])
    models = np.array([task.model_name for task in tasks])
    summary = summarise(values, highest, groups)
    paired = compare_methods(values, OURS, without_cases(groups), PAIRED_METRICS, models)
    print_tables(tasks, rankings, summary, paired, groups)
    warnings = {task.synth_image_path: ranking.warnings for task, ranking in zip(tasks, rankings)}
    show(*count_warnings(warnings))
    for notice in notices:
        show(notice)
    queries = query_rows(tasks, rankings, values)
    for name, rows in ("evaluate", summary), ("paired", paired), ("queries", queries):
        cells = [["" if cell != cell else cell for cell in row] for row in rows]
        write_csv(Path(output) / f"{name}.csv", COLUMNS[name], cells)
    print(f"Written: {', '.join(f'{name}.csv' for name in COLUMNS)} in {output}")
