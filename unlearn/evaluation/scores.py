"""Scores of every query over the training set, by method, from influence files."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..attribution.influence import rank_images
from ..attribution.names import NAMED
from ..datasets.tasks import find_named_result
from ..errors import UserError
from ..storage.reading import check_text, list_visible, read_json
from ..storage.records import (
    explain_difference,
    is_complete,
    names_of_file,
    read_record,
    record_path,
)
from .rankings import read_influence, warnings_of
from .stored_records import scoring_of

OURS, RANDOM = "ours", "random"
# Of a record: what is the same for all queries of a method.
ALIKE = ("method", "settings", "fisher", "features", "losses_before", "candidates")


@dataclass(frozen=True)
class MethodScores:
    """Scores of one method; a higher one is more influential."""

    method: str
    training_set: str  # identity of the training set that was scored
    ids: list[str]
    values: np.ndarray  # [queries, N], float32
    settings: dict  # how they were made
    warnings: dict = field(default_factory=dict)  # of each query: see `influence.find_warnings`


def keep_order(influence: np.ndarray) -> np.ndarray:
    """Scores in float32, nudged by the last digits where rounding would tie what is not tied: every
    ranking stays what it is.

    influence: [N] float64. Along the ranking, float32 numbers are taken as the integers that count
    them, and each is lowered until it lies below its predecessor wherever the exact score does.
    """
    order = rank_images(influence)
    falls = np.cumsum(np.concatenate([[0], np.diff(influence[order]) < 0]))
    bits = influence[order].astype(np.float32).view(np.int32).astype(np.int64)
    numbers = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    numbers = np.minimum.accumulate(numbers + falls) - falls
    bits = np.where(numbers < 0, -numbers | 0x80000000, numbers).astype(np.uint32)
    values = np.empty(len(influence), np.float32)
    values[order] = bits.view(np.float32)
    return values


def random_scores(queries: Sequence[str], count: int) -> np.ndarray:
    """Random scores [queries, count], float32, each query's from its name."""
    keys = [
        np.frombuffer(
            hashlib.blake2b(f"random {query}".encode(), digest_size=16).digest(), np.uint64
        )
        for query in queries
    ]
    return np.array(
        [np.random.Generator(np.random.Philox(key=key)).permutation(count) for key in keys],
        np.float32,
    ).reshape(-1, count)


def find_methods(
    folders: Iterable[str], asked: Sequence[str], item: str, command: str
) -> list[str]:
    """Methods in the order asked for, else all that are there, ours first. command: what makes
    them. Raises UserError where one is missing or none is there."""
    for method in folders:
        check_text(f"{item}: the name of a method", method)
    found = sorted(folders, key=lambda method: (method != OURS, method))
    for method in asked:
        if method not in folders and method != RANDOM:
            raise UserError(
                f"--methods {method}: {item} has no scores of it; it has: "
                f"{', '.join(found) or 'none'}"
            )
    if not asked and not found:
        raise UserError(f"{item}: has no scores of any method; make them: {command}")
    return list(dict.fromkeys(asked or found))


def name_scoring(folder: Path) -> str:
    """What evaluations call the method of RESULT_DIR/influence: by its way of scoring, where the
    first result's is one of NAMED, else ours."""
    path = next((path for path in sorted(folder.rglob("influence.npz")) if is_complete(path)), None)
    found = scoring_of(read_record(path, "make it again")) if path else None
    return found if found in NAMED else OURS


def read_query(path: Path, remedy: str) -> tuple[np.ndarray, list[str], dict, list[str]]:
    """Scores [N] of one influence file, its ids, of its record what must be the same for all
    queries of a method, and warnings."""
    arrays = read_influence(path, remedy)
    if arrays["is_exemplar"].any():
        raise UserError(
            f"{path}: ranks exemplars of a customized model; --retrained evaluates queries of "
            f"models trained from scratch"
        )
    identity = read_json(record_path(path), "record")["identity"]
    if not isinstance(identity.get("candidates"), list) or not identity["candidates"]:
        raise UserError(
            f"{record_path(path)}: does not say which training set was ranked (candidates); "
            f"{remedy}"
        )
    return (
        keep_order(arrays["influence"].astype(np.float64)),
        arrays["ids"].tolist(),
        {name: identity.get(name) for name in ALIKE},
        warnings_of(arrays),
    )


def check_alike(paths: Sequence[Path], rows: Sequence[tuple], remedies: Sequence[str]) -> None:
    """Raises UserError where influence files of a method are not alike. rows: of `read_query`."""
    _, first_ids, first, _ = rows[0]
    for path, (_, ids, identity, _), remedy in zip(paths, rows, remedies):
        for name in ALIKE:
            if identity[name] != first[name]:
                reason = explain_difference(
                    name, identity[name], first[name], names_of_file(path), names_of_file(paths[0])
                )
                raise UserError(
                    f"{path}: made otherwise than {paths[0]}: {reason}; only queries scored "
                    f"alike can be averaged; {remedy}"
                )
        if ids != first_ids:
            raise UserError(
                f"{path}: ranks other training images (by id) than {paths[0]}; {remedy}"
            )


def read_influences(method: str, folder: Path, remedies: Mapping[str, str]) -> MethodScores:
    """MethodScores from the influence files of all queries. remedies: {query: what to do}. Raises
    UserError where one is missing, or they are not alike."""
    paths = [find_named_result(folder, query) / "influence.npz" for query in remedies]
    rows = [read_query(path, remedy) for path, remedy in zip(paths, remedies.values())]
    check_alike(paths, rows, list(remedies.values()))
    _, ids, identity, _ = rows[0]
    settings = {
        name: value
        for name, value in identity.items()
        if name not in ("candidates", "method") and value is not None
    }
    return MethodScores(
        method,
        identity["candidates"][-1],
        ids,
        np.array([row[0] for row in rows]),
        settings,
        dict(zip(remedies, (row[3] for row in rows))),
    )


def remedy_of(method: str, command: str) -> str:
    """What to do for a method's influence files, which a command makes."""
    if method in (OURS, *NAMED):
        return f"make it: {command}"
    return f"make it: {command}, or name the finished ones with --methods"


def read_result_dir(
    result_dir: str,
    queries: Mapping[str, str],
    methods: Sequence[str],
    score_command: Callable[[str | None, str], str],
) -> dict[str, MethodScores]:
    """Methods' scores from the influence files below RESULT_DIR; see `evidence.read_methods`."""
    baselines = Path(result_dir) / "baselines"
    folders = {path.name: path for path in list_visible(baselines) if path.is_dir()}
    for name in (OURS, *NAMED):
        if name in folders:
            raise UserError(f"{folders[name]}: a baseline cannot be called {name}")
    own = Path(result_dir) / "influence"
    if own.is_dir():
        folders[name_scoring(own)] = own
    task_json = next(iter(queries.values()))
    commands = f"{score_command(OURS, task_json)} and {score_command(None, task_json)}"
    return {
        method: read_influences(
            method,
            folders[method],
            {query: remedy_of(method, score_command(method, queries[query])) for query in queries},
        )
        for method in find_methods(folders, methods, f"--result_dir {result_dir}", commands)
        if method in folders
    }
