"""Retrained models, one small JSON file each, read back and checked: what they were trained on and
each query's loss."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..attribution.influence import rank_images
from ..datasets.pictures import hash_picture
from ..datasets.queries import AXES, open_stored
from ..datasets.tasks import Task
from ..errors import UserError
from ..storage.hashes import digest
from ..storage.reading import list_visible
from ..storage.records import explain_difference
from .retrained_models import KINDS, RetrainedModel, read_model

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
        key = (
            model.kind,
            model.method,
            model.query,
            model.bundle,
            model.seed,
            model.kept.tobytes(),
        )
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
        for method, query, k in removed_for(model):
            if query in queries and method in scores:
                first = rank_images(scores[method][queries.index(query)])[:k]
                if model.kept[first].any():
                    raise UserError(
                        f"{model.path}: was trained without other images than the first {k} of "
                        f"{method} for {query}: the scores were made anew since; retrain it, or give "
                        f"the scores it was made with"
                    )


def removed_for(model: RetrainedModel) -> list[tuple[str, str, int]]:
    """Method, query and number of the first images that a model was trained without, of each query
    they were removed for."""
    if model.method is None:
        return []
    if model.bundle:
        return [(model.method, query, model.bundle.k) for query in model.bundle.queries]
    return [] if model.query is None else [(model.method, model.query, model.num_removed)]
