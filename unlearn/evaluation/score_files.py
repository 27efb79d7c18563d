"""Scores of every query over the training set in one small file a method, written and read back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..storage.artifacts import whole_file
from ..storage.hashes import digest
from ..storage.reading import list_visible, read_json, read_npz
from ..storage.records import check_record, keep_complete, record_path, write_record
from .scores import MethodScores, find_methods


def score_path(folder: str | Path, method: str) -> Path:
    """Where the scores of a method stand."""
    return Path(folder) / f"{method}.npz"


def write_scores(folder: str | Path, scores: MethodScores, queries: Sequence[str]) -> None:
    """Writes one method's scores of all queries to one small file and its record; what is there and
    the same stays."""
    path = score_path(folder, scores.method)
    identity = {
        "method": scores.method,
        "training_set": scores.training_set,
        "settings": scores.settings,
        "scores": digest(queries, scores.ids, scores.values.tobytes().hex()),
    }
    if keep_complete(path, identity, True, ""):
        return
    record_path(path).unlink(missing_ok=True)
    with whole_file(path) as file:
        np.savez_compressed(
            file, ids=np.array(scores.ids), queries=np.array(queries), scores=scores.values
        )
    write_record(
        path,
        identity,
        found={"warnings": scores.warnings} if any(scores.warnings.values()) else None,
    )


def read_warnings(record: dict, queries: Sequence[str]) -> dict[str, list[str]]:
    """The warnings of each query that the record of `write_scores` holds; what is no list of them
    is none."""
    found = record.get("circumstances")
    found = found.get("warnings") if isinstance(found, dict) else None
    found = found if isinstance(found, dict) else {}
    return {
        query: list(map(str, found[query])) if isinstance(found.get(query), list) else []
        for query in queries
    }


def read_scores(folder: str | Path, method: str, queries: Sequence[str]) -> MethodScores:
    """MethodScores of `write_scores`, the rows of these queries. Raises UserError where the file is
    damaged or lacks one."""
    path = score_path(folder, method)
    remedy = "make it again: python -m unlearn evaluate --retrained without --scores"
    check_record(path, {"method": method}, remedy)
    record = read_json(record_path(path), "record")
    identity = record["identity"]
    arrays = read_npz(path, {"ids": ("U", 1), "queries": ("U", 1), "scores": ("f", 2)}, remedy)
    if len(arrays) < 3:
        raise UserError(
            f"{path}: not a file of scores (expected ids, queries and scores, found "
            f"{', '.join(arrays) or 'none'}); {remedy}"
        )
    ids, names, values = arrays["ids"].tolist(), arrays["queries"].tolist(), arrays["scores"]
    if values.shape != (len(names), len(ids)) or not np.isfinite(values).all():
        raise UserError(
            f"{path}: expected finite scores [{len(names)}, {len(ids)}], found "
            f"{list(values.shape)}; {remedy}"
        )
    for query in queries:
        if query not in names:
            raise UserError(
                f"{path}: has no scores of query {query} (it has {len(names)}); {remedy}"
            )
    return MethodScores(
        method,
        identity.get("training_set"),
        ids,
        values[[names.index(query) for query in queries]],
        identity.get("settings", {}),
        read_warnings(record, queries),
    )


def read_score_files(
    folder: str, queries: Sequence[str], methods: Sequence[str]
) -> dict[str, MethodScores]:
    """Methods' scores from the files of `write_scores`; see `evidence.read_methods`."""
    files = {path.stem: path for path in list_visible(folder, "*.npz")}
    found = find_methods(
        files, methods, f"--scores {folder}", "python -m unlearn evaluate without --scores"
    )
    return {method: read_scores(folder, method, queries) for method in found if method in files}
