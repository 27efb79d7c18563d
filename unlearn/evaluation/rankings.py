"""Influence files read back, checked, and what of them the metrics need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.influence import find_warnings
from ..datasets.tasks import Task, find_result
from ..errors import UserError
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_json, read_npz
from ..storage.records import check_record, record_path
from .metrics import exemplar_ranks, is_tied

KINDS = {
    "ids": ("U", 1),
    "influence": ("f", 1),
    "is_exemplar": ("b", 1),
    "rank": ("iu", 1),
}  # of dtype, and axes
SHOWN = ("query_loss_before", "query_loss_after", "relative_weight_change", "median_change")
EFFECTS = (
    "weights moved by",
    "query's own loss",
    "its change",
    "exemplars' change, mean",
    "training images' change, median",
)


@dataclass(frozen=True)
class Ranking:
    """What the metrics need of one query's influence file."""

    path: Path
    ranks: np.ndarray  # of the exemplars, rising, from 1
    tied: bool
    num_training: int
    training_ids: str  # digest
    effect: np.ndarray  # see EFFECTS
    settings: dict  # how the query was unlearned
    warnings: list[str]  # see `influence.find_warnings`

    @property
    def num_candidates(self) -> int:
        """Exemplars and training images."""
        return len(self.ranks) + self.num_training


def read_influence(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """Arrays of an influence file by name. Raises UserError where it is missing, damaged or not a
    ranking."""
    check_record(path, {}, remedy)
    arrays = read_npz(
        path, {**KINDS, **dict.fromkeys(SHOWN, ("f", 0)), "warnings": ("U", 1)}, remedy
    )
    if missing := KINDS.keys() - arrays.keys():
        raise UserError(f"{path}: not an influence file (no {min(missing)}); {remedy}")
    count, influence, rank = len(arrays["ids"]), arrays["influence"], arrays["rank"]
    if any(arrays[name].shape != (count,) for name in KINDS) or not np.isfinite(influence).all():
        raise UserError(
            f"{path}: expected ids, influence, is_exemplar and rank of one length, influence "
            f"finite; {remedy}"
        )
    if not np.array_equal(np.sort(rank), np.arange(count)) or (np.diff(influence[rank]) > 0).any():
        raise UserError(f"{path}: rank is not the order of falling influence; {remedy}")
    return arrays


def measure_effect(arrays: dict[str, np.ndarray], is_exemplar: np.ndarray) -> np.ndarray:
    """What unlearning did, float64 in the order of EFFECTS; NaN where an influence file does not
    say or has no exemplars."""
    own, influence = [float(arrays.get(name, np.nan)) for name in SHOWN], arrays["influence"]
    exemplars = influence[is_exemplar].mean() if is_exemplar.any() else np.nan
    return np.array([own[2], own[0], own[1] - own[0], exemplars, own[3]])


def warnings_of(arrays: dict[str, np.ndarray]) -> list[str]:
    """What there is to warn of in an influence file, by its numbers, also where it was written
    before they were looked at, and what it says itself, of its Fisher."""
    moved, before, after = (
        float(arrays.get(name, np.nan))
        for name in ("relative_weight_change", "query_loss_before", "query_loss_after")
    )
    return list(
        dict.fromkeys(
            [
                *find_warnings(moved, before, after),
                *arrays.get("warnings", np.array([], str)).tolist(),
            ]
        )
    )


def count_warnings(warnings: Mapping[Any, list[str]], what: str = "queries") -> list[str]:
    """A line on how many results there is to warn of, in a list, or []. warnings: {name of the
    result: sentences}."""
    warned = {name: sentences for name, sentences in warnings.items() if sentences}
    return [
        f"Warning: {len(warned)} of {len(warnings)} {what} may mean little, first {name}: "
        f"{'; '.join(sentences)}."
        for name, sentences in list(warned.items())[:1]
    ]


def check_exemplars(tasks: Sequence[Task], task_json: str) -> None:
    """Raises UserError where a query has no exemplars, whose ranks the AbC metrics measure."""
    without = [task for task in tasks if task.model_path is None]
    if without:
        raise UserError(
            f"{task_json}: {without[0].synth_image_path}: expected a customized model with "
            f"exemplars, whose ranks "
            "Recall and mAP measure, found a query of the base model; such queries are evaluated "
            "by retraining: "
            "give --retrained DIR"
        )


def read_ranking(
    task: Task, dataroot: str, result_dir: str, command: str, overwriting: str
) -> Ranking:
    """The Ranking of one task. command: what ranks the queries; overwriting: the same, also those
    that are ranked. Raises UserError where the file is not of this task's exemplars."""
    path = find_result(Path(result_dir) / "influence", task) / "influence.npz"
    remedy = f"make it: {command}"
    arrays = read_influence(path, remedy)
    ids = arrays["ids"].tolist()
    is_exemplar = arrays["is_exemplar"].astype(bool)
    count = len(task.exemplar_paths)
    expected = task.exemplar_ids(dataroot)
    if ids[:count] != expected or not np.array_equal(is_exemplar, np.arange(len(ids)) < count):
        found = [name for name, mask in zip(ids, is_exemplar) if mask]
        raise UserError(
            f"{path}: expected the {count} exemplars {', '.join(expected):.80} first, found "
            f"{len(found)}: "
            f"{', '.join(found):.80}; {remedy}"
        )
    return Ranking(
        path,
        exemplar_ranks(arrays["rank"], is_exemplar),
        is_tied(arrays["influence"], is_exemplar),
        len(ids) - count,
        digest(ids[count:]),
        measure_effect(arrays, is_exemplar),
        check_provenance(path, task, result_dir, remedy, overwriting),
        warnings_of(arrays),
    )


def check_provenance(
    path: Path, task: Task, result_dir: str, remedy: str, overwriting: str
) -> dict:
    """How a query was unlearned, by its record. overwriting: the command that ranks it again.
    Raises UserError where the cached losses are no longer those it was ranked against."""
    identity = read_json(record_path(path), "record")["identity"]
    losses_before, settings = identity.get("losses_before", {}), identity.get("settings", {})
    if (
        not isinstance(losses_before, dict)
        or not isinstance(settings, dict)
        or not losses_before.keys() <= set(task.image_sets)
    ):
        raise UserError(
            f"{record_path(path)}: losses_before or settings: not as compute_influence.py writes "
            f"them; {remedy}"
        )
    for name, content in losses_before.items():
        losses = Path(result_dir) / "orig_loss" / task.model_name / f"{name}_loss.npy"
        if losses.exists() and hash_file(losses) != content:
            raise UserError(
                f"{path}: was ranked against other losses than {losses} now holds; make it "
                f"again: {overwriting}"
            )
    return settings


def check_candidates(
    rankings: Sequence[Ranking], num_training: int, training_ids: str, item: str | Path
) -> None:
    """Raises UserError where a ranking is not of these training images."""
    for ranking in rankings:
        if ranking.num_training != num_training:
            raise UserError(
                f"{ranking.path}: ranks {ranking.num_training} training images, {item} has "
                f"{num_training}; give the "
                "--laion_subset_size that all of them were made with"
            )
        if ranking.training_ids != training_ids:
            raise UserError(f"{ranking.path}: ranks other training images (by id) than {item}")
        for name, value in ranking.settings.items():
            if value != rankings[0].settings.get(name):
                raise UserError(
                    f"{ranking.path}: unlearned with {name} {value!r}, {rankings[0].path} with "
                    f"{rankings[0].settings.get(name)!r}; only queries unlearned alike can be "
                    f"averaged"
                )
