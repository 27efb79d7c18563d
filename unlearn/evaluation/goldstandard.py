"""Evaluation against retrained models: what is measured, said, printed and written."""

from collections.abc import Sequence
from pathlib import Path

from ..attribution.influence import is_indifferent, is_undecided
from ..datasets.tasks import Task
from ..runtime.printing import show
from .beyond_lds import beyond_rows, ceiling_line
from .evidence import Commands, Evidence, Sources, read_evidence
from .lds import (
    COLUMNS,
    deviation_line,
    find_subsets,
    lds_rows,
    left_out_line,
    other_seed_line,
)
from .leave_k_out import Rows, evaluate_removals
from .made_again import draw_made_again
from .plots import draw_plots
from .rankings import count_warnings
from .removal import find_maker, find_references
from .retrained_models import KINDS, RetrainedModel
from .score_files import write_scores
from .scores import RANDOM, MethodScores
from .tables import TABLES, lds_table, write_tables

FEWEST_TUNING = 10
LDS_TITLE = (
    "Linear datamodeling score: rank correlation of summed scores with retrained losses (95 % "
    "intervals over {}{})"
)


def equal_score_lines(evidence: Evidence, models: Sequence[RetrainedModel]) -> list[str]:
    """Of each method whose scores leave all images, or those at the K-th place, equal: a line that
    says so."""
    lines, queries = [], evidence.queries
    for method, scores in evidence.values.items():
        if count := sum(map(is_indifferent, scores)):
            lines.append(
                f"{method}: all images have the same score for {count} of {len(queries)} "
                f"queries: of these it says nothing, and their LDS is 0."
            )
        asked = {
            (model.query, model.num_removed)
            for model in models
            if model.method == method and model.query in queries
        }
        if count := sum(is_undecided(scores[queries.index(query)], k) for query, k in asked):
            lines.append(
                f"{method}: for {count} of {len(asked)} removals the K-th image and the next "
                f"have the same score: the order of the files decided which were removed."
            )
    return lines


def power_lines(has_lds: bool, num_tuning: int) -> list[str]:
    """A line where there is no LDS, or where powers were chosen on no or few tuning queries."""
    if not has_lds:
        return ["No models on random subsets yet: no LDS."]
    if not num_tuning:
        return [
            "The LDS depends on how heavy the tails of scores are, not on their order alone: "
            "--tuning_json, a task file of further queries, lets evaluate choose each method's "
            "power. Compare methods by that one."
        ]
    if num_tuning < FEWEST_TUNING:
        return [
            f"Powers were chosen on {num_tuning} tuning queries: another few may choose others; "
            f"give {FEWEST_TUNING} or more."
        ]
    return []


def find_full_models(
    tasks: Sequence[Task], models: Sequence[RetrainedModel], commands: Commands, identity: dict
) -> tuple[dict[int, RetrainedModel], RetrainedModel | None, list[str]]:
    """The full model of each seed, the one of them that made the queries, or None, and a line where
    nothing can tell which one that was. identity: as which further full models are asked."""
    command = lambda seeds: commands.train_alike(seeds, identity)
    can_be_made_again = all(task.seed is not None for task in tasks)
    references = find_references(models, command)
    maker = find_maker(references, command, can_be_made_again) if references else None
    if maker is None or can_be_made_again:
        return references, maker, []
    return (
        references,
        maker,
        [
            f"The task file has queries without a seed, which no model can make again: "
            f"{maker.path.stem}, the full model that explains them best, is taken for the one that "
            f"made them, unchecked."
        ],
    )


def score_lines(
    evidence: Evidence, models: Sequence[RetrainedModel], scores: dict[str, MethodScores]
) -> list[str]:
    """What there is to say of scores and of which models they are compared with, a line each."""
    lines = []
    for method, each in scores.items():
        lines += count_warnings(each.warnings, f"queries scored by {method}")
    lines += filter(None, [left_out_line(evidence.models), other_seed_line(evidence.models)])
    return lines + equal_score_lines(evidence, models)


def print_tables(
    rows: Rows, models: Sequence[RetrainedModel], notices: Sequence[str], queries: Sequence[str]
) -> None:
    """All tables that have rows, in Markdown."""
    full, subset, without, together = (
        sum(model.kind == kind and model.query in (None, *queries) for model in models)
        for kind in KINDS
    )
    print(
        f"{full} full models, {subset} on random subsets, {without} without chosen or random "
        f"images{f', {together} without those of several queries' * bool(together)}\n"
    )
    if lds := rows["lds"]:
        samples = "queries and models" if len(queries) > 1 else "models, of a single query"
        num_tuning = lds[0][COLUMNS.index("tuning_queries")]
        powers = f"; powers chosen on {num_tuning} further queries" if num_tuning else ""
        title = LDS_TITLE.format(samples, powers)
        show(title, "", *lds_table(lds), "", deviation_line(models), "")
    for name, (title, table) in TABLES.items():
        if rows.get(name):
            show(title, "", *table(rows[name]), "")
    for notice in notices:
        show(notice)


def evaluate_retrained(
    tasks: Sequence[Task], sources: Sources, commands: Commands, output: str
) -> None:
    """Reads and checks everything, then measures, prints, and writes tables and plots; nothing is
    written before."""
    reported, tuning, scores = read_evidence(tasks, sources, commands)
    queries, models = reported.queries, reported.models
    subsets, tuning_subsets = (
        find_subsets(evidence.values, evidence.models, commands.train_subsets)
        for evidence in (reported, tuning)
    )
    lds, lds_queries = lds_rows(subsets, tuning_subsets, queries)
    powers = {row[0]: row[COLUMNS.index("power")] or 1 for row in lds}
    shown = [
        model
        for model in models
        if not sources.methods or model.method in (None, *sources.methods, RANDOM)
    ]
    references, maker, unchecked = find_full_models(tasks, shown, commands, models[0].identity)
    removals = evaluate_removals(shown, references, maker, queries, reported.values)
    notices = [
        *filter(None, [ceiling_line(subsets)]),
        *power_lines(bool(lds), len(tuning.queries)),
        *removals.notices,
        *unchecked,
        *score_lines(reported, shown, scores),
    ]
    rows = {
        **removals.rows,
        "lds": lds,
        "lds_queries": lds_queries,
        "lds_beyond": beyond_rows(subsets, powers),
    }
    print_tables(rows, shown, notices, queries)
    if not sources.scores:
        for each in scores.values():
            write_scores(Path(output) / "scores", each, [*queries, *tuning.queries])
    write_tables(rows, output)
    draw_plots(rows, removals.curve, output)
    of_maker = [model for model in shown if maker and model.seed == maker.seed]
    draw_made_again(tasks, of_maker, queries, sources.dataroot, sources.result_dir, output)
