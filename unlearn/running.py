"""The queries of a study, from weight changes, or features, to finished results: what
compute_influence.py and `unlearn attribute` do once all is checked and loaded."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .attribution.deltas import Delta
from .attribution.intervals import find_intervals
from .attribution.names import OUTPUT
from .attribution.newton import relative_change
from .attribution.removal_groups import Groups
from .attribution.removal_studies import RemovalStudy
from .attribution.scoring import (
    MANY,
    TOGETHER,
    explain_query,
    own_losses,
    score_queries,
    score_shortlists,
)
from .attribution.studies import Study
from .attribution.unlearning import REMEDY, find_cells, name_query, read_step, unlearn_queries
from .datasets.queries import encode_query
from .datasets.tasks import Task, find_result
from .datasets.training_sets import TrainingSet
from .models.lora import acting
from .report import results
from .report.attributable import describe_attributable
from .report.grouping import find_groups
from .report.ranking import Ranking
from .runtime.programs import process_share
from .storage.records import keep_complete
from .storage.sharing import Share, do_once, turn


@dataclass(frozen=True)
class Output:
    """Where results go, and what they say of themselves."""

    folder: Path  # RESULT_DIR/influence
    dataroot: str
    top_k: int  # images in the table and the picture
    command: str  # that ranks the queries again
    remedy: str  # the same, with the step chosen
    unscaled: bool = False  # see `queries.encode_query`
    is_shown: bool = True  # whether tables are printed
    cautions: dict[str, list[str]] = field(default_factory=dict)  # by the picture's path
    remarks: list[str] = field(default_factory=list)  # what the pages say besides
    # told of each query whose result was written, before another process may write it anew
    on_saved: Callable[[Task], object] = lambda task: None


def attribute_queries(study: Study, tasks: list[Task], output: Output) -> None:
    """Unlearns, scores, ranks and saves some queries of one model."""
    folder = output.folder
    names = [find_result(folder, task).relative_to(folder).as_posix() for task in tasks]
    queries = [encode_query(study.model, task, output.dataroot, output.unscaled) for task in tasks]
    for query in queries:
        find_cells(study.model, query, study.unlearning)
    deltas = unlearn_queries(study, queries, names, folder)
    # Scoring only ever loads the changes: a second process or a restart never scores under slightly
    # different ones.
    size = len(tasks) if shares_sweep(study) else 1
    for start in range(0, len(tasks), size):
        some = slice(start, start + size)
        if study.index:
            # The names without suffix, as ever: an audit's images are drawn by them.
            audited = [task.query_name for task in tasks[some]]
            scored = score_shortlists(study, audited, deltas[some])
        else:
            later = deltas[start + size : start + TOGETHER]
            scored = [(changes, {}) for changes in score_queries(study, deltas[some], later)]
        for task, query, delta, (changes, found) in zip(
            tasks[some], queries[some], deltas[some], scored
        ):
            save_query(study, task, query, delta, changes, found, output)


def shares_sweep(study: Study) -> bool:
    """Whether one sweep, or one pass over an index, serves many queries at once."""
    return bool(study.index) or study.scoring.scoring == "gradient"


def group_size(study: Study) -> int:
    """How many queries of a model go together: each process unlearns some, all score each."""
    if shares_sweep(study):
        return MANY
    return max(process_share()[1], TOGETHER if study.scoring.scoring in ("exact", OUTPUT) else 1)


def describe_origin(task: Task, output: Output) -> dict:
    """What a page shows of a query, for its record: where the picture is, what it was made with, and
    the command that ranks its images again."""
    return {
        "dataroot": output.dataroot,
        "picture": task.synth_image_path,
        "prompt": task.prompt,
        "seed": task.seed,
        "model": task.model_name,
        "command": output.command,
        "remarks": output.remarks,
    }


def measure_query(study: Study, query: TrainingSet, delta: Delta, changes: dict) -> dict:
    """What stands beside a query's scores: its own losses, the step, how far the weights moved."""
    before, after = own_losses(study, query, delta)
    alpha, rate = read_step(delta.file, study.unlearning)
    weights, change = acting(study.model.denoiser, study.parameters, delta.tensors)
    is_of_losses = study.scoring.scoring != OUTPUT
    return {
        "query_loss_before": before,
        "query_loss_after": after,
        "relative_weight_change": relative_change(change, weights),
        "alpha": alpha,
        "alpha_over_N": rate,
        **({"median_change": results.median_change(changes["laion"])} if is_of_losses else {}),
    }


def save_query(
    study: Study,
    task: Task,
    query: TrainingSet,
    delta: Delta,
    changes: dict,
    found: dict,
    output: Output,
) -> None:
    """Writes and prints one query's ranking; of several processes that a launcher started, one
    does. found: what an index tells of it."""
    folder, top_k = delta.file.parent, output.top_k
    path = folder / "influence.npz"
    identity = {
        "weight_change": delta.content,
        "settings": {**study.unlearning.identity, **study.scoring.identity},
        "losses_before": study.before_hashes,
        "candidates": [images.identity for images in study.image_sets.values()],
    }

    def save():
        shown = {**measure_query(study, query, delta, changes), **found}
        cautions = output.cautions.get(task.synth_image_path, [])
        whole = study.unlearning.box is None or not study.before
        own = shown["query_loss_before"] if whole else explain_query(study, query)
        ranking = results.rank_query(study, changes, shown, own, folder, cautions)
        origin = describe_origin(task, output)
        results.save(folder, query, ranking, shown, identity, origin, top_k, study.unlearning.box)
        output.on_saved(task)
        if output.is_shown:
            results.print_result(folder, study, query, ranking, shown, top_k, output.remedy)

    # One process alone writes it anew, and prints it: with another --top_k there is another table.
    if process_share()[1] == 1:
        with turn(path):
            return save()
    return do_once(folder, path.stem, lambda: keep_complete(path, identity, True, ""), save)


def attribute_by_removal(study: RemovalStudy, tasks: list[Task], output: Output) -> None:
    """Scores by removal, ranks and saves the queries of one model; its features are made at first
    use. Raises UserError, before that, where a result of something else may not be replaced."""
    queries = [encode_query(study.model, task, output.dataroot, output.unscaled) for task in tasks]
    pairs = list(zip(tasks, queries))
    for task, query in pairs:
        study.find_cells(query)
        is_scored(study, task, query, output.folder, study.overwrite)
    study.build()
    groups = find_groups(
        Ranking.of_scores(study.image_sets, np.zeros(study.num_images)), output.dataroot
    )
    for some in share_queries(study, pairs, output):
        scored = study.score_all([query for _, query in some], groups, output.top_k)
        for number, (task, query) in enumerate(some):
            unit = float(scored.units[:, number].sum())
            known = describe_groups(groups, scored.groups[:, number], study.num_images)
            if scored.sets:
                chosen = scored.sets[number]
                known |= {"set_rows": chosen.rows, "set_rises": chosen.rises}
            save_removal(study, task, query, scored.draws[:, number], unit, known, output)


def describe_groups(groups: Groups, draws: np.ndarray, num_images: int) -> dict:
    """What an influence file holds of groups that were removed as a whole, {} without any. draws:
    their scores [draws, groups]."""
    if not groups:
        return {}
    owners, intervals = np.full(num_images, -1, np.int32), find_intervals(draws)
    for number, rows in enumerate(groups.values()):
        owners[list(rows)] = number
    unknown = np.full(len(groups), np.nan)
    return {
        "group_names": np.array(list(groups), str),
        "group_of": owners,
        "group_scores": draws.sum(axis=0),
        "group_low": intervals.low if intervals else unknown,
        "group_high": intervals.high if intervals else unknown,
    }


def is_scored(
    study: RemovalStudy, task: Task, query: TrainingSet, folder: Path, overwrite: bool = True
) -> bool:
    """Whether a query's result stands below a folder. Raises UserError where that of something else
    does, and may not be replaced."""
    name_query(query)
    path = find_result(folder, task) / "influence.npz"
    # Before one is refused it is seen whole: another process may be writing the same anew.
    may_refuse = not overwrite and path.parent.is_dir()
    with turn(path) if may_refuse else nullcontext():
        return keep_complete(path, study.identity(query), overwrite, REMEDY)


def share_queries(
    study: RemovalStudy, pairs: list[tuple[Task, TrainingSet]], output: Output
) -> Iterator[list[tuple[Task, TrainingSet]]]:
    """Yields the queries in groups, each of which one pass over the features serves: all of them
    where this process is alone, also what is done, which is shown again; else what no other process
    has done or is at."""
    num_processes = process_share()[1]
    size = min(MANY, -(-len(pairs) // num_processes))
    groups = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    if num_processes == 1:
        yield from groups
        return

    def is_done(number: int) -> bool:
        return all(is_scored(study, *pair, output.folder) for pair in groups[number])

    claims = {}
    for number, group in enumerate(groups):
        first = find_result(output.folder, group[0][0])
        first.mkdir(parents=True, exist_ok=True)
        claims[number] = (first.relative_to(output.folder) / "removal").as_posix()
    with Share(output.folder, claims, is_done) as share:
        for number in share:
            yield groups[number]
            share.release(number)


def save_removal(
    study: RemovalStudy,
    task: Task,
    query: TrainingSet,
    draws: np.ndarray,
    unit: float,
    more: dict,
    output: Output,
) -> None:
    """Writes and prints one query's ranking by removal. draws: scores [draws, N]; unit: of their
    sums, see `removal_scores.score_draws`; more: what the file holds of groups and of the images
    that are chosen together."""
    folder = find_result(output.folder, task)
    folder.mkdir(parents=True, exist_ok=True)
    name_query(query)
    own = float(study.maker.explain(query, [0])[0])
    cautions = output.cautions.get(task.synth_image_path, [])
    warnings = [*cautions, *results.find_strange(own, study.losses)]
    scores, losses = draws.sum(axis=0), np.concatenate(list(study.losses.values()))
    known = {**describe_attributable(scores, unit, losses, own), **more}
    ranking = Ranking.of_scores(study.image_sets, scores, warnings, find_intervals(draws))
    origin = describe_origin(task, output)
    with turn(folder / "influence.npz"):
        results.save(
            folder, query, ranking, known, study.identity(query), origin, output.top_k, study.box
        )
        output.on_saved(task)
    if output.is_shown:
        chosen = more["set_rows"].tolist() if "set_rows" in more else []
        results.print_removal(folder, query, ranking, chosen, output.top_k, study.box)
