"""Retrained models, one small JSON file each, read back and checked: what they were trained on and
each query's loss."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..attribution.influence import rank_images
from ..datasets.pictures import hash_picture
from ..datasets.queries import AXES, open_stored
from ..datasets.tasks import Task
from ..errors import UserError
from ..storage.hashes import digest
from ..storage.reading import list_visible, read_json
from ..storage.records import FORMAT_VERSION, explain_difference
from .scores import RANDOM

NAMES = re.compile(r"(full|half|subset[^-]*|without|random)-.+\.json")
SHARED = (
    "format_version",
    "recipe",
    "training_set",
    "num_images",
    "timesteps",
    "noise_seed",
    "num_inference_steps",
    "guidance_scale",
    "features",
)
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
KINDS = ("full", "subset", "without")


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


def check_removed(path: Path, record: dict, kept: np.ndarray) -> tuple[str | None, str | None]:
    """Method and query of a model of kind `without`. Raises UserError where its mask does not fit
    its kind and K."""
    removed, count = record.get("removed") or {}, int((~kept).sum())
    if (
        record["kind"] == "full"
        and count
        or record["kind"] == "subset"
        and not 0 < count < len(kept)
    ):
        raise UserError(
            f"{path}: a {record['kind']} model trained without {count} of {len(kept)} images; "
            f"retrain this model"
        )
    if record["kind"] != "without":
        return None, None
    check_entry(path, removed, {"method": str, "k": int})
    if removed["k"] != count:
        raise UserError(
            f"{path}: removed: k is {removed['k']}, its mask leaves out {count} images; retrain "
            f"this model"
        )
    if removed["method"] == RANDOM:
        return RANDOM, None
    check_entry(path, removed, {"query": str})
    return removed["method"], removed["query"]


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


def query_digests(tasks: Sequence[Task], dataroot: str) -> dict[str, str]:
    """What a query is, by its name: a digest of prompt, picture, seed and stored rows, so that a
    model's measures tell of which they are."""
    stored = lambda task: [
        open_stored(task, dataroot, field)[task.row].tobytes().hex()
        for field in AXES
        if getattr(task, field) is not None
    ]
    return {
        task.query_name: digest(
            task.prompt,
            hash_picture(Path(dataroot) / task.synth_image_path),
            task.seed,
            stored(task),
        )
        for task in tasks
    }


def shared_fields(identity: dict, queries: Sequence[str]) -> dict[str, object]:
    """What models must share to be compared: recipe, training set, how they were measured, and each
    query."""
    return {
        **{name: identity.get(name) for name in SHARED},
        **{f"query {query}": identity["queries"].get(query) for query in queries},
    }


def check_alike(models: Sequence[RetrainedModel], queries: Sequence[str]) -> None:
    """Raises UserError where models are not of one recipe, training set and measurement, or one of
    them stands there twice."""
    first, seen = models[0], {}
    for model in models:
        fields = shared_fields(model.identity, queries)
        expected_fields = shared_fields(first.identity, queries)
        for name in {**expected_fields, **fields}:
            found, expected = fields.get(name), expected_fields.get(name)
            if found != expected:
                reason = (
                    f"{name} has another picture, prompt, seed or stored latent"
                    if name.startswith("query ")
                    else explain_difference(name, found, expected, {}, {})
                )
                raise UserError(
                    f"{model.path}: made otherwise than {first.path.name}: {reason}; models of "
                    f"one folder must share it: move the "
                    "others out"
                )
        key = model.kind, model.method, model.query, model.seed, model.kept.tobytes()
        other = seen.setdefault(key, model.path.name)
        if other != model.path.name:
            raise UserError(
                f"{model.path}: the same model as {other} (kind, seed and images); it would "
                f"count twice: remove one"
            )


def read_retrained(folder: str, queries: Sequence[str], command: str) -> list[RetrainedModel]:
    """All models of a folder in an order that does not depend on the files' names: by kind, method,
    query, number of images, seed and members. Raises UserError for an empty folder (command: that
    fills it), unknown files and models that cannot be compared."""
    if not Path(folder).is_dir():
        raise UserError(f"--retrained {folder}: no such folder; make it: {command}")
    paths = [
        path for path in list_visible(folder) if path.suffix != ".part"
    ]  # of a run that goes on
    for path in paths:
        if not NAMES.fullmatch(path.name) or not path.is_file():
            raise UserError(
                f"{path}: no file of a retrained model (full-*, half-*, without-*, "
                f"random-*.json); move it out of there"
            )
    if not paths:
        raise UserError(f"--retrained {folder}: has no retrained models; make them: {command}")
    models = [read_model(path, queries) for path in paths]
    check_alike(models, queries)
    return sorted(
        models,
        key=lambda model: (
            KINDS.index(model.kind),
            model.method or "",
            model.query or "",
            model.num_removed,
            model.seed,
            model.identity["members"],
        ),
    )


def check_queries(
    models: Sequence[RetrainedModel], digests: Mapping[str, str], command: str
) -> None:
    """Raises UserError where models were measured on another picture or prompt than a query has
    now."""
    for query, expected in digests.items():
        if models[0].identity["queries"].get(query) != expected:
            raise UserError(
                f"{models[0].path}: was measured on another prompt, picture, seed or stored "
                f"latent of query {query} than the task file "
                f"now gives; measure the models on this task file, each kind as it was made: "
                f"{command}"
            )


def check_removed_images(
    models: Sequence[RetrainedModel], scores: Mapping[str, np.ndarray], queries: Sequence[str]
) -> None:
    """Raises UserError where a model was trained without other images than the first K of the
    scores that are now evaluated. scores: {method: [queries, N]}."""
    for model in models:
        if model.method is None or model.query is None:
            continue
        if model.query in queries and model.method in scores:
            first = rank_images(scores[model.method][queries.index(model.query)])[
                : model.num_removed
            ]
            if model.kept[first].any():
                raise UserError(
                    f"{model.path}: was trained without other images than the first "
                    f"{model.num_removed} of {model.method} "
                    f"for {model.query}: the scores were made anew since; retrain it, or give "
                    f"the scores it was made with"
                )
