"""Scores of every query over the training set, by method: from influence files, or from one small
file a method."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..advice import influence_command, write_command
from ..attribution.influence import rank_images
from ..errors import UserError
from ..storage.artifacts import whole_file
from ..storage.hashes import digest
from ..storage.reading import check_text, list_visible, read_json, read_npz
from ..storage.records import (
    check_record,
    explain_difference,
    keep_complete,
    names_of_file,
    record_path,
    write_record,
)
from .rankings import read_influence, warnings_of

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


def keep_order(influence):
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


def random_scores(queries, count):
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


def find_methods(folders, asked, item, command):
    """Methods in the order asked for, else all that are there, ours first. Raises UserError where
    one is missing or none is there."""
    for method in folders:
        check_text(f"{item}: the name of a method", method)
    found = sorted(folders, key=lambda method: (method != OURS, method))
    for method in asked or []:
        if method not in folders and method != RANDOM:
            raise UserError(
                f"--methods {method}: {item} has no scores of it; it has: "
                f"{', '.join(found) or 'none'}"
            )
    if not asked and not found:
        raise UserError(f"{item}: has no scores of any method; make them: {command}")
    return list(dict.fromkeys(asked or found))


def read_query(path, remedy):
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


def read_influences(method, folder, queries, remedies):
    """MethodScores from the influence files of all queries; remedies: what to do by query. Raises
    UserError where one is missing, or they are not alike."""
    paths = [Path(folder) / query / "influence.npz" for query in queries]
    rows = [read_query(path, remedies[query]) for path, query in zip(paths, queries)]
    for path, query, (_, ids, identity, _) in zip(paths, queries, rows):
        for name in ALIKE:
            if identity[name] != rows[0][2][name]:
                reason = explain_difference(
                    name,
                    identity[name],
                    rows[0][2][name],
                    names_of_file(path),
                    names_of_file(paths[0]),
                )
                raise UserError(
                    f"{path}: made otherwise than {paths[0]}: {reason}; only queries scored "
                    f"alike can be averaged; {remedies[query]}"
                )
        if ids != rows[0][1]:
            raise UserError(
                f"{path}: ranks other training images (by id) than {paths[0]}; {remedies[query]}"
            )
    settings = {
        name: rows[0][2][name]
        for name in ALIKE
        if name not in ("candidates", "method") and rows[0][2][name] is not None
    }
    return MethodScores(
        method,
        rows[0][2]["candidates"][-1],
        rows[0][1],
        np.array([row[0] for row in rows]),
        settings,
        dict(zip(queries, (row[3] for row in rows))),
    )


def remedy_of(method, args, task_json):
    """What makes a method's influence files of the queries of a task file."""
    if method == OURS:
        return f"make it: {influence_command(args, task_json=task_json)}"
    command = write_command("baselines", args, methods=[method], task_json=task_json)
    return f"make it: {command}, or name the finished ones with --methods"


def read_result_dir(args, queries):
    """All methods' scores from the influence files below RESULT_DIR. queries: {query: its task
    file}."""
    baselines = Path(args.result_dir) / "baselines"
    folders = {path.name: path for path in list_visible(baselines) if path.is_dir()}
    if OURS in folders:
        raise UserError(f"{folders[OURS]}: a baseline cannot be called {OURS}")
    if (Path(args.result_dir) / "influence").is_dir():
        folders[OURS] = Path(args.result_dir) / "influence"
    methods = find_methods(
        folders,
        args.methods,
        f"--result_dir {args.result_dir}",
        f"{influence_command(args)} and {write_command('baselines', args)}",
    )
    return {
        method: read_influences(
            method,
            folders[method],
            list(queries),
            {query: remedy_of(method, args, path) for query, path in queries.items()},
        )
        for method in methods
        if method in folders
    }


def score_path(folder, method):
    """Where the scores of a method stand."""
    return Path(folder) / f"{method}.npz"


def write_scores(folder, scores, queries):
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


def read_warnings(record, queries):
    """The warnings of each query that the record of `write_scores` holds; what is no list of them
    is none."""
    found = record.get("circumstances")
    found = found.get("warnings") if isinstance(found, dict) else None
    found = found if isinstance(found, dict) else {}
    return {
        query: list(map(str, found[query])) if isinstance(found.get(query), list) else []
        for query in queries
    }


def read_scores(folder, method, queries):
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


def read_methods(args, queries):
    """Scores by method of queries {name: task file}, from --scores or from the influence files,
    RANDOM always among them unless --methods leaves it out. Raises UserError where methods scored
    different training images."""
    if args.scores:
        folders = {path.stem: path for path in list_visible(args.scores, "*.npz")}
        scores = {
            method: read_scores(args.scores, method, list(queries))
            for method in find_methods(
                folders,
                args.methods,
                f"--scores {args.scores}",
                "python -m unlearn evaluate without --scores",
            )
            if method in folders
        }
    else:
        scores = read_result_dir(args, queries)
    first = next(iter(scores.values()), None)
    for each in scores.values():
        if (each.training_set, each.ids) != (first.training_set, first.ids):
            raise UserError(
                f"{each.method}: scores {len(each.ids)} training images, {first.method} "
                f"{len(first.ids)}, "
                f"{'the same by name, but' if each.ids == first.ids else 'and'} of another data "
                f"root, or encoded by another model; only "
                "scores of one training set can be compared"
            )
    return scores
