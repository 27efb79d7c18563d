"""What a call of `attribute` says of the training images beside each picture's ranking, by removal:
which do the same, and of several pictures which none uses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..attribution.likeness import MOST_IMAGES, compare_images, group_alike
from ..attribution.removal_studies import RemovalStudy
from ..attribution.usage import find_unused
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..report.attributable import BOUND
from ..report.together import FEWEST, Together
from ..storage.artifacts import whole_file
from ..storage.hashes import hash_file
from ..storage.reading import read_npz
from .answers import Attribution

TABLE, KEPT = "images.csv", "together.npz"
KEPT_FORMS = {
    **{name: ("U", 1) for name in ("names", "captions", "paths", "pictures", "results", "hashes")},
    **{"scores": ("f", 2), "unused": ("b", 1), "group_of": ("i", 1), "group_scores": ("f", 2)},
    "is_doubtful": ("b", 0),
}


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
        found = study.score_all(queries, named)
        bounds = BOUND * found.units.sum(axis=0)
        scores[:, list(some)] = found.groups.sum(axis=0) / bounds[:, None]
    return scores


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
    known = {row.id: row for row in different[0].report.rows}
    rows = [known[id] for id in different[0].ranking.ids]
    scores = np.stack([answer.scores / answer.unit for answer in different])
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
    keep(found, different, results)
    return found


def keep(found: Together, answers: Sequence[Attribution], results: Path) -> None:
    """Writes what some answers say together, with the hash of the result of each."""
    group_of = np.full(len(found.names), -1)
    for number, rows in enumerate(found.groups):
        group_of[rows] = number
    folders = [answer.folder for answer in answers]
    with whole_file(results / KEPT) as file:
        np.savez(
            file,
            names=np.array(found.names, str),
            captions=np.array(found.captions, str),
            paths=np.array([str(path or "") for path in found.paths], str),
            pictures=np.array(found.pictures, str),
            results=np.array([name_result(folder, results) for folder in folders], str),
            hashes=np.array([answer.content for answer in answers], str),
            scores=found.scores,
            unused=found.unused,
            group_of=group_of,
            group_scores=found.group_scores,
            is_doubtful=np.array(found.is_doubtful),
        )


def name_result(folder: Path, results: Path) -> str:
    """A result by its folder's place below RESULT_DIR/influence."""
    return folder.relative_to(results / "influence").as_posix()


def read_kept(results: Path, queries: Sequence[str]) -> Together | None:
    """What `keep` wrote of these results, all that there are; None where it is of others, or one was
    made anew. Raises UserError where it is damaged."""
    path = results / KEPT
    if not path.exists():
        return None
    remedy = "remove it; the next call of attribute writes it again"
    arrays = read_npz(path, KEPT_FORMS, remedy)
    if missing := KEPT_FORMS.keys() - arrays.keys():
        raise UserError(f"{path}: has no {min(missing)}; {remedy}")
    known = dict(zip(arrays["results"].tolist(), arrays["hashes"].tolist()))
    if known.keys() != set(queries) or any(
        hash_file(results / "influence" / query / "influence.npz") != known[query]
        for query in queries
    ):
        return None
    group_of, num_groups = arrays["group_of"], arrays["group_scores"].shape[1]
    return Together(
        arrays["names"].tolist(),
        arrays["captions"].tolist(),
        [Path(path) if path else None for path in arrays["paths"].tolist()],
        arrays["pictures"].tolist(),
        arrays["scores"],
        arrays["unused"],
        [np.flatnonzero(group_of == number).tolist() for number in range(num_groups)],
        arrays["group_scores"],
        bool(arrays["is_doubtful"]),
    )
