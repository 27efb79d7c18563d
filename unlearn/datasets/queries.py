"""Queries and exemplars as training sets: encoded from their pictures and prompts, or a query's exact
latent and embedding, stored by what made it (`latents`, `embeddings` and `row` of its task)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..storage.hashes import digest
from ..storage.reading import read_array
from .conditioning import TEXT
from .encoders import Encoder, encode_images, encode_texts
from .pictures import hash_picture
from .settings import read_settings
from .tasks import Task, find_file
from .training_sets import TrainingSet

AXES = {"latents": "[n, C, h, w]", "embeddings": "[n, tokens, features]"}


def open_stored(task: Task, dataroot: str | Path, field: str) -> np.ndarray:
    """The array (memory-mapped) that holds a query's latent or embedding. Raises UserError where it
    is none or ends before the task's row: all that can be told without a model."""
    item = f"{task.synth_image_path}: {field}"
    path = find_file(dataroot, getattr(task, field), item)
    array = read_array(path, item)
    if (
        array.ndim != AXES[field].count(",") + 1
        or not len(array)
        or not np.issubdtype(array.dtype, np.floating)
    ):
        raise UserError(
            f"{item} {path}: expected {AXES[field]} of floats, found {list(array.shape)} "
            f"{array.dtype}"
        )
    if task.row is None or not 0 <= task.row < len(array):
        raise UserError(
            f"{item} {path}: expected a row from 0 to {len(array) - 1}, found {task.row}"
        )
    return array


def check_stored(tasks: Iterable[Task], dataroot: str | Path) -> None:
    """Raises UserError, before a model is loaded, where a task's stored arrays cannot hold its
    query."""
    for task in tasks:
        for field in AXES:
            if getattr(task, field) is not None:
                open_stored(task, dataroot, field)


def read_stored(
    task: Task, dataroot: str | Path, latent_shape: Sequence[int], embedding_shape: Sequence[int]
) -> dict[str, np.ndarray]:
    """The query's stored latent [C, h, w] and embedding [tokens, features], float32, by field; {}
    where it has none. Raises UserError where one has another shape than the model's or is not
    finite."""
    rows = {}
    for field, shape in ("latents", latent_shape), ("embeddings", embedding_shape):
        if getattr(task, field) is not None:
            row = np.array(open_stored(task, dataroot, field)[task.row], np.float32)
            item = f"{task.synth_image_path}: {field} {getattr(task, field)}, row {task.row}"
            if row.shape != tuple(shape):
                raise UserError(
                    f"{item}: expected shape {list(shape)} for this model, found {list(row.shape)}"
                )
            if not np.isfinite(row).all():
                raise UserError(
                    f"{item}: has NaN or infinite entries, so that the picture that belongs to "
                    f"it is broken too; make the query "
                    "again: python -m unlearn generate does not save such a one"
                )
            rows[field] = row
    return rows


def encode_exemplars(
    model: Encoder, task: Task, dataroot: str | Path, vae_batch_size: int
) -> TrainingSet:
    """The exemplars of a customized model (whose tokens the model has) as a TrainingSet."""
    settings = read_settings(dataroot)
    resolution = model.resolution(settings)
    prompts = [task.train_prompt or ""] * len(task.exemplar_paths)
    ids, paths = task.exemplar_ids(dataroot), task.exemplar_paths
    with model.encoding():
        latents = [
            encode_images(model, paths, resolution, mirrored, vae_batch_size).numpy()
            for mirrored in (False, True)
        ]
        embeddings, extras = split_texts(encode_texts(model, prompts, paths, resolution))
    return TrainingSet(
        settings["name"],
        ids,
        prompts,
        [Path(dataroot) / id for id in ids],
        np.stack(latents),
        embeddings,
        digest(prompts, [hash_picture(path) for path in task.exemplar_paths]),
        extras=extras,
    )


def split_texts(
    texts: Mapping[str, torch.Tensor],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Conditioning {name: [n, ...]} as embeddings [n, 1, ...] and the rest of it, of images with a
    caption each."""
    arrays = {name: tensor.numpy()[:, None] for name, tensor in texts.items()}
    return arrays.pop(TEXT), arrays


def encode_query(
    model: Encoder, task: Task, dataroot: str | Path, unscaled: bool = False
) -> TrainingSet:
    """A task's query as a training set of one image and one view: its stored latent and embedding
    where its task names them, else encoded from picture and prompt. unscaled: leaves the encoded
    latent of a customized model's query as the VAE gives it, as the published program does; its
    other queries, [AbU] on MSCOCO, are stored scaled."""
    settings = read_settings(dataroot)
    resolution = model.resolution(settings)
    shape = model.conditioning_shapes[TEXT]
    stored = read_stored(task, dataroot, model.latent_shape(resolution), shape)
    with model.encoding():
        return encode_picture(
            model,
            Path(dataroot) / task.synth_image_path,
            task.prompt,
            resolution,
            name=settings["name"],
            id=task.synth_image_path,
            stored=stored,
            unscaled=unscaled and task.model_path is not None and not stored,
        )


def encode_picture(
    model: Encoder,
    path: str | Path,
    prompt: str,
    resolution: int,
    name: str = "query",
    id: str | None = None,
    stored: dict[str, np.ndarray] | None = None,
    unscaled: bool = False,
) -> TrainingSet:
    """A picture and its prompt as a TrainingSet of one image and one view. name, id: they key its
    noise; stored: its latent and embedding where they are known; unscaled: see `encode_query`."""
    stored = stored or {}
    if "latents" in stored:
        latents = stored["latents"][None]
    else:
        latents = encode_images(model, [path], resolution).numpy()
    if unscaled:
        latents = np.asarray(model.denormalise(latents))
    if TEXT in stored and list(model.conditioning_shapes) == [TEXT]:
        embeddings, extras = stored[TEXT][None, None], {}
    else:
        embeddings, extras = split_texts(encode_texts(model, [prompt], [path], resolution))
        if TEXT in stored:  # what else there is follows from prompt and picture
            embeddings = stored[TEXT][None, None]
    rows = (row.tobytes().hex() for row in stored.values())
    return TrainingSet(
        name,
        [str(path) if id is None else id],
        [prompt],
        [Path(path)],
        latents[None],
        embeddings,
        digest(prompt, hash_picture(path), *rows),
        extras=extras,
    )
