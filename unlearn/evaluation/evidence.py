"""What an evaluation against retrained models is given: models that were asked about queries, and
methods' scores of the same queries, read and checked before anything is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..datasets.tasks import Task, load_tasks
from ..errors import UserError
from .retrained import (
    check_queries,
    check_removed_images,
    query_digests,
    read_retrained,
)
from .retrained_models import RetrainedModel
from .score_files import read_score_files
from .scores import RANDOM, MethodScores, random_scores, read_result_dir

OTHERS = " others: of another data root or encoding"  # of as many training images


@dataclass(frozen=True)
class Sources:
    """Where the evidence stands."""

    task_json: str  # of the reported queries
    dataroot: str
    retrained: str  # folder of retrained models' JSON files
    result_dir: str  # of influence files
    scores: str | None = None  # folder of scores/METHOD.npz, which are read instead of them
    tuning_json: str | None = None  # task file of further queries, on which powers are chosen
    methods: tuple[str, ...] = ()  # only these; without any, all that are there


@dataclass(frozen=True)
class Commands:
    """Command lines that messages tell people to type."""

    score: Callable[[str | None, str], str]  # scores a task file's queries by a method; None: all
    train_full: Callable[[str], str]  # trains full models, asked about a task file's queries
    train_subsets: str  # trains more models on random subsets
    # trains full models of these seeds, asked as a model of this identity was
    train_alike: Callable[[list[int], dict], str]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Models and scores of some queries."""

    queries: list[str]  # names, sorted; empty where there are no such queries
    models: list[RetrainedModel]  # their measures are in the order of the queries
    values: dict[str, np.ndarray]  # {method: scores [queries, N]}


def read_methods(
    queries: Mapping[str, str],
    methods: Sequence[str],
    scores: str | None,
    result_dir: str,
    score_command: Callable[[str | None, str], str],
) -> dict[str, MethodScores]:
    """Scores by method: those of `methods`, which need not be there if RANDOM, or all without any.

    queries: {query: its task file}, those that are reported first; scores: folder of
    `write_scores`, None where the influence files below result_dir are read; score_command: the
    command line that scores the queries of a task file by a method, None for all baselines. Raises
    UserError where methods scored different training images.
    """
    found = (
        read_score_files(scores, list(queries), methods)
        if scores
        else read_result_dir(result_dir, queries, methods, score_command)
    )
    for each in found.values():
        first = next(iter(found.values()))
        if (each.training_set, each.ids) != (first.training_set, first.ids):
            raise UserError(
                f"{each.method}: scores {len(each.ids)} training images, {first.method} "
                f"{len(first.ids)}, "
                f"{'the same by name, but' if each.ids == first.ids else 'and'} of another data "
                f"root, or encoded by another model; only scores of one training set can be "
                f"compared"
            )
    return found


def check_training_set(
    scores: Mapping[str, MethodScores], models: Sequence[RetrainedModel], source: str
) -> None:
    """Raises UserError where the scores are of another training set than the retrained models'."""
    first = models[0].identity
    for each in scores.values():
        if each.training_set != first["training_set"] or len(each.ids) != first["num_images"]:
            others = "" if len(each.ids) != first["num_images"] else OTHERS
            raise UserError(
                f"{source}: {each.method} scores {len(each.ids)} training images, the models of "
                f"--retrained were trained on {first['num_images']}{others}"
            )


def read_models(
    tasks: Sequence[Task], task_json: str, sources: Sources, commands: Commands
) -> tuple[list[str], list[RetrainedModel]]:
    """Names of a task file's queries, sorted, and the models. Raises UserError where these were not
    asked about them as they are now."""
    queries = sorted(task.query_name for task in tasks)
    command = commands.train_full(task_json)
    models = read_retrained(sources.retrained, queries, command)
    check_queries(models, query_digests(tasks, sources.dataroot), command)
    return queries, models


def read_tuning(
    queries: Sequence[str], sources: Sources, commands: Commands
) -> tuple[list[str], list[RetrainedModel]]:
    """Names of the tuning queries and the models, both empty where there are none. Raises UserError
    where one of them is also among the reported queries."""
    if not sources.tuning_json:
        return [], []
    tasks = load_tasks(sources.tuning_json, sources.dataroot)
    check_scratch(tasks, sources.tuning_json)
    if both := sorted({task.query_name for task in tasks} & set(queries)):
        raise UserError(
            f"--tuning_json {sources.tuning_json}: {both[0]} is also in {sources.task_json}; a "
            f"power must be chosen on queries that are not reported"
        )
    return read_models(tasks, sources.tuning_json, sources, commands)


def check_scratch(tasks: Sequence[Task], task_json: str) -> None:
    """Raises UserError where a query was made by a customized model."""
    for task in tasks:
        if task.exemplar_paths:
            raise UserError(
                f"{task_json}: {task.synth_image_path} has a customized model; --retrained "
                f"evaluates queries of models trained from scratch"
            )


def read_evidence(
    tasks: Sequence[Task], sources: Sources, commands: Commands
) -> tuple[Evidence, Evidence, dict[str, MethodScores]]:
    """Evidence of the reported queries and of the tuning queries, and the scores of both as they
    were read, by method, the reported queries first. Random scores are among the evidence unless
    `methods` leaves them out. Raises UserError where something is missing or does not belong
    together."""
    check_scratch(tasks, sources.task_json)
    queries, models = read_models(tasks, sources.task_json, sources, commands)
    tuning, tuning_models = read_tuning(queries, sources, commands)
    files = {
        **dict.fromkeys(queries, sources.task_json),
        **dict.fromkeys(tuning, sources.tuning_json),
    }
    scores = read_methods(
        files, sources.methods, sources.scores, sources.result_dir, commands.score
    )
    check_training_set(
        scores,
        models,
        f"--scores {sources.scores}" if sources.scores else f"--result_dir {sources.result_dir}",
    )
    values = {method: each.values for method, each in scores.items()}
    if RANDOM in (sources.methods or [RANDOM]) and RANDOM not in values:
        values[RANDOM] = random_scores(list(files), models[0].identity["num_images"])
    reported = {method: array[: len(queries)] for method, array in values.items()}
    check_removed_images(
        models, {method: array for method, array in reported.items() if method in scores}, queries
    )
    return (
        Evidence(queries, models, reported),
        Evidence(
            tuning,
            tuning_models,
            {method: array[len(queries) :] for method, array in values.items()},
        ),
        scores,
    )
