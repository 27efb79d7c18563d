"""What a call of `attribute` says of the training images beside each picture's ranking, by removal:
which do the same, and of several pictures which none uses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..attribution.likeness import MOST_IMAGES, compare_images, group_alike
from ..attribution.removal_studies import RemovalStudy
from ..attribution.usage import find_unused
from ..datasets.training_sets import TrainingSet
from ..report.attributable import BOUND
from ..report.together import FEWEST, Together
from ..storage.reading import read_npz
from .answers import Attribution

TABLE = "images.csv"
FORMS = {"ids": ("U", 1), "influence": ("f", 1), "bound": ("f", 0)}


def find_groups(study: RemovalStudy) -> list[list[int]]:
    """Groups of images that do the same, as rows; [] where there are too many to compare."""
    if study.num_images > MOST_IMAGES:
        return []
    repeats = np.array(study.repeats) if study.repeats else None
    return group_alike(compare_images(study.blocks, study.ridge, repeats))


def score_groups(
    study: RemovalStudy, queries: Sequence[TrainingSet], groups: Sequence[Sequence[int]]
) -> np.ndarray:
    """Scores of groups of images, each removed as a whole, [queries, groups], 1 where an image
    stands out; NaN of a group of all images."""
    scores = np.full((len(queries), len(groups)), np.nan)
    some = {number: rows for number, rows in enumerate(groups) if len(rows) < study.num_images}
    if some:
        named = {str(number): rows for number, rows in some.items()}
        _, units, draws = study.score_all(queries, named)
        scores[:, list(some)] = draws.sum(axis=0) / (BOUND * units.sum(axis=0))[:, None]
    return scores


def read_scores(answer: Attribution) -> tuple[list[str], np.ndarray]:
    """The images' ids and their scores [n] of a picture, 1 where an image stands out."""
    arrays = read_npz(answer.folder / "influence.npz", FORMS, "ask again")
    return arrays["ids"].tolist(), arrays["influence"] / float(arrays["bound"])


def sum_up(
    answers: Sequence[Attribution],
    study: RemovalStudy,
    queries: Sequence[TrainingSet],
    groups: Sequence[Sequence[int]],
    results: Path,
) -> Together | None:
    """What different pictures say together, with its table; None of a single one, and where there
    are too few images. queries: those of the answers."""
    pairs = {answer.folder: (answer, query) for answer, query in zip(answers, queries)}
    different = [answer for answer, _ in pairs.values()]
    if len(different) < 2 or len(different[0].scores) < FEWEST:
        return None
    ids, _ = read_scores(different[0])
    known = {row.id: row for row in different[0].report.rows}
    rows = [known[id] for id in ids]
    scores = np.stack([read_scores(answer)[1] for answer in different])
    group_scores = score_groups(study, [query for _, query in pairs.values()], groups)
    found = Together(
        [row.name for row in rows],
        [row.caption for row in rows],
        [row.path for row in rows],
        [answer.question.picture.name for answer in different],
        scores,
        find_unused(scores, groups, group_scores),
        [list(group) for group in groups],
        group_scores,
        any(answer.warnings for answer in different),
    )
    found.write_table(results / TABLE)
    return found
