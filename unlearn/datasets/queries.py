"""A query's exact latent and embedding, stored by what made it (`latents`, `embeddings` and `row`
of its task)."""

import numpy as np

from ..errors import UserError
from ..storage.reading import read_array
from .tasks import find_file

AXES = {"latents": "[n, C, h, w]", "embeddings": "[n, tokens, features]"}


def open_stored(task, dataroot, field):
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
    if not 0 <= task.row < len(array):
        raise UserError(
            f"{item} {path}: expected a row from 0 to {len(array) - 1}, found {task.row}"
        )
    return array


def check_stored(tasks, dataroot):
    """Raises UserError, before a model is loaded, where a task's stored arrays cannot hold its
    query."""
    for task in tasks:
        for field in AXES:
            if getattr(task, field) is not None:
                open_stored(task, dataroot, field)


def read_stored(task, dataroot, latent_shape, embedding_shape):
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
