"""One retrained model, as its small JSON file tells of it: what it was trained on and each query's
loss."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..storage.reading import read_json
from ..storage.records import FORMAT_VERSION
from .scores import RANDOM

REQUIRED = {
    "recipe": str,
    "training_set": str,
    "num_images": int,
    "seed": int,
    "members": str,
    "queries": dict,
    "timesteps": int,
    "noise_seed": int,
}
KINDS = ("full", "subset", "without", "together")


@dataclass(frozen=True)
class Bundle:
    """Queries whose first K images one model was trained without."""

    queries: tuple[str, ...]
    k: int  # of each query
    size: int  # queries that were asked for, of which the last bundle may have fewer


@dataclass(frozen=True)
class RetrainedModel:
    """One model. Measures are in the order of the queries that were asked for, NaN where a model
    was not asked."""

    path: Path
    kind: str
    identity: dict = field(repr=False)
    kept: np.ndarray = field(repr=False)  # [N], bool
    losses: np.ndarray = field(repr=False)  # [queries]
    mse: np.ndarray = field(
        repr=False
    )  # between the query and what the model makes of its prompt and seed, pixels in [0, 1]
    similarity: np.ndarray = field(repr=False)  # cosine of features of the two
    method: str | None = None  # by which images were removed, RANDOM among them
    query: str | None = None  # for which they were
    bundle: Bundle | None = None  # of kind together: for which they were

    @property
    def num_removed(self) -> int:
        """Images that the model was trained without."""
        return int((~self.kept).sum())

    @property
    def seed(self) -> int:
        """Seed of weights and draws."""
        return self.identity["seed"]


def check_entry(path: Path, values: object, kinds: Mapping[str, type]) -> None:
    """Raises UserError where one of the keys of a model's file is missing or of another type."""
    for key, kind in kinds.items():
        value = values.get(key) if isinstance(values, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{path}: {key}: expected {kind.__name__}, found {value!r:.80}; no file of "
                f"python -m unlearn retrain"
            )


def read_members(path: Path, identity: dict) -> np.ndarray:
    """The mask of the images that a model was trained on, bool [N]. Raises UserError where it is no
    mask of N images."""
    count = identity["num_images"]
    try:
        packed = np.frombuffer(base64.b64decode(identity["members"], validate=True), np.uint8)
    except (binascii.Error, ValueError):
        packed = np.empty(0, np.uint8)
    if count < 1 or len(packed) != (count + 7) // 8 or np.unpackbits(packed)[count:].any():
        raise UserError(
            f"{path}: members: expected the packed mask of {count} images, found {len(packed)} "
            f"bytes; retrain this model"
        )
    return np.unpackbits(packed)[:count].astype(bool)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def read_losses(path: Path, losses: dict, queries: Sequence[str]) -> np.ndarray:
    """Each query's loss, float64. Raises UserError where one is missing or no finite number."""
    for query in queries:
        if query not in losses:
            raise UserError(
                f"{path}: has no loss of query {query} (it has {len(losses)}); it was measured "
                f"on another task file"
            )
        if not is_number(losses[query]):
            raise UserError(
                f"{path}: losses: {query}: expected a finite number, found "
                f"{losses[query]!r:.80}; retrain this model"
            )
    return np.array([losses[query] for query in queries], float)


def read_measures(record: dict, name: str, queries: Sequence[str]) -> np.ndarray:
    """A measure of each query, float64, NaN where the model was not asked for it. Raises UserError
    where it is no number."""
    values = record.get(name) or {}
    if not isinstance(values, dict) or not all(
        value is None or is_number(value) for value in values.values()
    ):
        raise UserError(
            f"{name}: expected a number of each query, found {values!r:.80}; retrain this model"
        )
    return np.array(
        [values[query] if values.get(query) is not None else np.nan for query in queries], float
    )


def check_removed(
    path: Path, record: dict, kept: np.ndarray
) -> tuple[str | None, str | None, Bundle | None]:
    """Method, query and bundle of a model. Raises UserError where its mask does not fit its kind and
    K."""
    removed, count = record.get("removed") or {}, int((~kept).sum())
    if (
        record["kind"] == "full"
        and count
        or record["kind"] in ("subset", "together")
        and not 0 < count < len(kept)
    ):
        raise UserError(
            f"{path}: a {record['kind']} model trained without {count} of {len(kept)} images; "
            f"retrain this model"
        )
    if record["kind"] not in ("without", "together"):
        return None, None, None
    check_entry(path, removed, {"method": str, "k": int})
    if record["kind"] == "together":
        return removed["method"], None, read_bundle(path, removed, count)
    if removed["k"] != count:
        raise UserError(
            f"{path}: removed: k is {removed['k']}, its mask leaves out {count} images; retrain "
            f"this model"
        )
    if removed["method"] == RANDOM:
        return RANDOM, None, None
    check_entry(path, removed, {"query": str})
    return removed["method"], removed["query"], None


def read_bundle(path: Path, removed: dict, count: int) -> Bundle:
    """The Bundle of a model that was trained without `count` images. Raises UserError where these
    cannot be the first K of its queries."""
    check_entry(path, removed, {"queries": list, "together": int})
    bundle = Bundle(tuple(map(str, removed["queries"])), removed["k"], removed["together"])
    if not bundle.k <= count <= bundle.k * len(bundle.queries):
        raise UserError(
            f"{path}: removed: k is {bundle.k}, of {len(bundle.queries)} queries, its mask leaves "
            f"out {count} images; retrain this model"
        )
    return bundle


def read_model(path: Path, queries: Sequence[str]) -> RetrainedModel:
    """The RetrainedModel of one file."""
    record = read_json(path, "retrained model")
    check_entry(path, record, {"identity": dict, "kind": str, "losses": dict})
    check_entry(path, record["identity"], REQUIRED)
    if record["identity"].get("format_version") != FORMAT_VERSION or record["kind"] not in KINDS:
        raise UserError(
            f"{path}: expected format_version {FORMAT_VERSION} and a kind of {', '.join(KINDS)}, "
            f"found "
            f"{record['identity'].get('format_version')!r} and {record['kind']!r:.40}"
        )
    kept = read_members(path, record["identity"])
    return RetrainedModel(
        path,
        record["kind"],
        record["identity"],
        kept,
        read_losses(path, record["losses"], queries),
        read_measures(record, "mse", queries),
        read_measures(record, "similarity", queries),
        *check_removed(path, record, kept),
    )
