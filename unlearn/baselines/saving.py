"""What a baseline leaves of each query: influence.npz with its record, the ranking as a table, the
picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.influence import is_indifferent, rank_images
from ..datasets.pictures import hash_picture
from ..datasets.tasks import Task, find_result
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..report.ranking import Ranking
from ..runtime.printing import show
from ..runtime.programs import log
from ..storage.artifacts import whole_file
from ..storage.hashes import digest
from ..storage.reading import read_npz
from ..storage.records import keep_complete, record_path, write_record
from ..storage.sharing import do_once, forget_claim
from .interface import Method, Run

REMEDY = "give --overwrite to replace it, or another --result_dir"
MOST_TABLES = 20  # where there are more queries, each is a line
INDIFFERENT = "all images have the same score: it says nothing of them"


def method_identity(run: Run, name: str, method: Method) -> dict:
    """Identity of a method's scores, but for the query."""
    identity = {**run.model.identity, "method": name, "settings": method.settings}
    if method.needs_fisher:
        identity["fisher"] = run.needed_fisher.identity
    identity.update(method.own_identity(run))
    if method.needs_pictures and run.readings:
        identity["readings"] = digest(run.readings)
    return {**identity, "candidates": [run.training_set.identity]}


@dataclass(frozen=True)
class Result:
    """Where a method's scores of one query stand, and what they are made of."""

    name: str  # of the method
    task: Task
    path: Path  # influence.npz
    identity: dict


def list_results(run: Run, name: str, method: Method) -> Iterator[Result]:
    """The Result of each query."""
    of_method = method_identity(run, name, method)
    for task, query in zip(run.tasks, run.queries):
        identity = {**of_method, "query": query.identity, **method.query_identity(run, task)}
        if method.needs_captions:  # the training set's identity may say nothing of them
            identity["captions"] = digest(
                [*run.exemplars(task).captions, *run.training_set.captions]
            )
        if task.exemplar_paths:
            identity["exemplars"] = digest([hash_picture(path) for path in task.exemplar_paths])
        path = find_result(run.folder / name, task) / "influence.npz"
        yield Result(name, task, path, identity)


def check_scores(path: str | Path, scores: np.ndarray) -> None:
    """Raises UserError where a score is not finite."""
    if not np.isfinite(scores).all():
        raise UserError(
            f"{path}: {int((~np.isfinite(scores)).sum())} scores are NaN or infinite; the model "
            f"or a feature is broken"
        )


def write_scores(run: Run, result: Result, scores: np.ndarray, warnings: Sequence[str]) -> None:
    """Writes one query's scores as compute_influence.py does, exemplars first, and what there is to
    warn of. The record comes last: what is not whole has none."""
    exemplars = run.exemplars(result.task).ids
    more: dict[str, Any] = {"warnings": np.array(warnings, str)} if warnings else {}
    with whole_file(result.path) as file:
        np.savez(
            file,
            ids=np.array([*exemplars, *run.training_set.ids]),
            influence=scores,
            rank=rank_images(scores),
            is_exemplar=np.arange(len(scores)) < len(exemplars),
            **more,
        )
    write_record(result.path, result.identity, run.model.device)


def show_first(result: Result, ranking: Ranking) -> None:
    """Prints a query's first image, and what there is to warn of, in one line."""
    best = ranking.order[0]
    show(
        f"{result.name}, {result.task.synth_image_path}: {ranking.scores[best]:+.3e} "
        f'{ranking.names[best]} "{ranking.captions[best]}"'
        + "".join(f" Warning: {warning}." for warning in ranking.warnings)
    )


def save_query(
    run: Run,
    method: Method,
    result: Result,
    query: TrainingSet,
    scores: np.ndarray,
    is_pending: bool,
    top_k: int,
    is_shown: bool = True,
) -> None:
    """Writes what a query's scores end in, and shows it, where that is asked for. Of scores that were
    kept table and picture are made again, perhaps with another `top_k`; those that another process
    has written since stay, for it may be reading them."""
    check_scores(result.path, scores)
    task, of_fisher = result.task, run.needed_fisher.warnings if method.needs_fisher else []
    image_sets = {"exemplar": run.exemplars(task), "laion": run.training_set}
    warnings = [*of_fisher, *[INDIFFERENT] * is_indifferent(scores)]
    ranking = Ranking.of_scores(image_sets, scores, warnings)
    folder, claim = result.path.parent, result.path.stem
    picture = folder / "visualization.jpg"

    def is_done() -> bool:
        return keep_complete(result.path, result.identity, True, "")

    def write() -> None:
        if is_pending:
            record_path(result.path).unlink(missing_ok=True)
        ranking.to_csv(result.path.with_suffix(".csv"))
        ranking.picture(query, top_k, picture)
        if is_pending:
            write_scores(run, result, scores, of_fisher)

    if is_pending:
        do_once(folder, claim, is_done, write)
    else:
        forget_claim(folder, claim)
        write()
    if not is_shown:
        return
    if len(run.tasks) > MOST_TABLES:
        show_first(result, ranking)
    else:
        ranking.show(top_k, f'{result.name}, {task.synth_image_path}: "{task.prompt}"')
        show("", f"Picture: {picture}")


def score_tasks(run: Run, name: str, method: Method, top_k: int, is_shown: bool = True) -> None:
    """Scores all queries by a method where some are pending: so that a run that was killed gives
    the bits of one that was not. Writes and shows each."""
    results = list(list_results(run, name, method))
    pending = [
        not keep_complete(result.path, result.identity, run.overwrite, REMEDY) for result in results
    ]
    found = method.scores(run) if any(pending) else [None] * len(results)
    indifferent = []
    for result, query, scored, is_pending in zip(results, run.queries, found, pending, strict=True):
        scores = (
            read_npz(result.path, {"influence": ("f", 1)}, REMEDY)["influence"]
            if scored is None or not is_pending
            else scored
        )
        save_query(run, method, result, query, scores, is_pending, top_k, is_shown)
        if is_indifferent(scores):
            indifferent.append(result.task.synth_image_path)
    if indifferent:
        log.warning(
            f"{name}: all images have the same score for {len(indifferent)} of {len(results)} "
            f"queries, first {indifferent[0]}: of "
            "these it says nothing. Are all captions or pictures alike?"
        )
    log.info(f"{name}: {len(results)} queries in {run.folder / name}")
