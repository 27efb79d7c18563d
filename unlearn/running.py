"""The queries of a study, from weight changes to finished results: what compute_influence.py and
`unlearn attribute` do once all is checked and loaded."""

from dataclasses import dataclass, field
from pathlib import Path

from .attribution.deltas import Delta
from .attribution.newton import relative_change
from .attribution.scoring import (
    MANY,
    TOGETHER,
    own_losses,
    score_queries,
    score_shortlists,
)
from .attribution.studies import Study
from .attribution.unlearning import read_step, unlearn_queries
from .datasets.queries import encode_query
from .datasets.tasks import Task, find_result
from .datasets.training_sets import TrainingSet
from .models.lora import acting
from .report import results
from .runtime.programs import process_share
from .storage.records import keep_complete
from .storage.sharing import do_once, forget_claim


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


def attribute_queries(study: Study, tasks: list[Task], output: Output) -> None:
    """Unlearns, scores, ranks and saves some queries of one model."""
    folder = output.folder
    names = [find_result(folder, task).relative_to(folder).as_posix() for task in tasks]
    queries = [encode_query(study.model, task, output.dataroot, output.unscaled) for task in tasks]
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
    return max(process_share()[1], TOGETHER if study.scoring.scoring == "exact" else 1)


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
    return {
        "query_loss_before": before,
        "query_loss_after": after,
        "relative_weight_change": relative_change(change, weights),
        "alpha": alpha,
        "alpha_over_N": rate,
        "median_change": results.median_change(changes["laion"]),
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
    identity = {
        "weight_change": delta.content,
        "settings": {**study.unlearning.identity, **study.scoring.identity},
        "losses_before": study.before_hashes,
        "candidates": [images.identity for images in study.image_sets.values()],
    }

    def save():
        shown = {**measure_query(study, query, delta, changes), **found}
        cautions = output.cautions.get(task.synth_image_path, [])
        ranking = results.rank_query(study, changes, shown, folder, cautions)
        origin = describe_origin(task, output)
        results.save(folder, query, ranking, shown, identity, origin, top_k)
        if output.is_shown:
            results.print_result(folder, study, query, ranking, shown, top_k, output.remedy)

    # One process alone writes it anew, and prints it: with another --top_k there is another table.
    if process_share()[1] == 1:
        forget_claim(folder, "influence")  # of several processes, one of which was killed
        return save()
    path = folder / "influence.npz"
    return do_once(folder, "influence", lambda: keep_complete(path, identity, True, ""), save)
