"""Rankings of the training images that say which of them models are trained without."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..attribution.influence import rank_images
from ..datasets.tasks import Task, find_result
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..evaluation.rankings import read_influence, warnings_of
from ..evaluation.score_files import read_score_files, score_path
from ..evaluation.scores import name_scoring
from ..evaluation.stored_sets import read_places
from ..storage.reading import read_json
from ..storage.records import names_of_file, record_path


@dataclass(frozen=True, eq=False)
class MethodRanking:
    """A method's ranking of the training set for one query."""

    path: Path  # of the influence file
    method: str
    query: str
    scores: np.ndarray  # [N]
    order: np.ndarray  # [N] int, the most influential image first
    warnings: list[str]  # see `influence.find_warnings`


def method_of(folder: Path) -> str:
    """The method whose influence files a folder holds, by its name and, of this program's own, by
    what they say."""
    is_ours = folder.name == "influence" and folder.parent.name != "baselines"
    return name_scoring(folder) if is_ours else folder.name


def read_rankings(
    folders: Sequence[Path],
    tasks: Sequence[Task],
    training_set: TrainingSet,
    dataroot: str,
    rank_command: Callable[[Path, str], str],
) -> Iterator[MethodRanking]:
    """The rankings of the tasks' queries in each folder, one after the other. rank_command: the
    command line that ranks them into a folder by a method. Raises UserError where one is missing or
    of other training images."""
    for folder in folders:
        method = method_of(folder)
        for task in tasks:
            yield read_ranking(
                find_result(folder, task) / "influence.npz",
                method,
                task.query_name,
                training_set,
                dataroot,
                f"make it: {rank_command(folder, method)}",
            )


def put_set_first(ranking: MethodRanking, largest: int, remedy: str) -> MethodRanking:
    """A ranking by removal that begins with the images that its query would miss most together, in the
    order in which they were chosen. Raises UserError where fewer than `largest` were chosen, none by
    this way of scoring, or other images."""
    chosen, _ = read_places(ranking.path, len(ranking.order), remedy)
    if len(chosen) < largest:
        raise UserError(
            f"{ranking.path}: holds {len(chosen)} images that are chosen together, {largest} are to "
            f"be left out; give compute_influence.py --scoring removal --top_k {largest}"
        )
    rest = ranking.order[~np.isin(ranking.order, chosen)]
    order = np.concatenate([np.array(chosen, np.int64), rest])
    places = np.empty(len(order))
    places[order] = np.arange(len(order), 0, -1)  # no two alike: the order is decided
    return replace(ranking, method=f"{ranking.method}-set", scores=places, order=order)


def read_ranking(
    path: Path, method: str, query: str, training_set: TrainingSet, dataroot: str, remedy: str
) -> MethodRanking:
    """The ranking that an influence file holds. Raises UserError where it is missing or of other
    training images."""
    arrays = read_influence(path, remedy)
    ranked = read_json(record_path(path), "record")["identity"].get("candidates")
    if arrays["ids"].tolist() != training_set.ids or ranked != [training_set.identity]:
        where = (
            names_of_file(path).get("data root")
            or "another data root, or of files that have changed since"
        )
        raise UserError(
            f"{path}: ranks other training images, {len(arrays['ids'])} of {where}, than the "
            f"{len(training_set)} of {dataroot}; give the --dataroot, --sd_version and "
            f"--laion_subset_size it was made with"
        )
    return MethodRanking(
        path, method, query, arrays["influence"], arrays["rank"], warnings_of(arrays)
    )


def read_scored(
    folder: str,
    methods: Sequence[str],
    tasks: Sequence[Task],
    training_set: TrainingSet,
    dataroot: str,
) -> Iterator[MethodRanking]:
    """The rankings of the tasks' queries by the score files of a folder, one method after the other;
    methods: which, all where it is empty. Raises UserError where one lacks a query or is of other
    training images."""
    queries = [task.query_name for task in tasks]
    for method, scores in read_score_files(folder, queries, methods).items():
        path = score_path(folder, method)
        if scores.ids != training_set.ids or scores.training_set != training_set.identity:
            raise UserError(
                f"{path}: scores other training images, {len(scores.ids)}, than the "
                f"{len(training_set)} of {dataroot}, or these as they were before; give the "
                f"--dataroot, --sd_version and --laion_subset_size it was made with"
            )
        for query, values in zip(queries, scores.values):
            yield MethodRanking(
                path, method, query, values, rank_images(values), scores.warnings[query]
            )
