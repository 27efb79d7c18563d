"""Sets of images that are left out together, as people name them."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..report.ranking import name_images
from ..runtime.printing import shorten
from ..storage.reading import read_json

Sets = tuple[tuple[str, tuple[str, ...]], ...]  # (name, images by their files' names or ids)
SET_NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")


def read_sets(path: str | Path) -> Sets:
    """The sets of images that a JSON file names, {name: [image]}. Raises UserError where it is of
    another form."""
    found = read_json(Path(path), "sets of images")
    expected = f'{path}: expected {{"name of a set": ["image", ...], ...}}'
    if not isinstance(found, dict) or not found:
        raise UserError(f"{expected}, found another form")
    for name, images in found.items():
        if not SET_NAME.fullmatch(name):
            raise UserError(
                f"{path}: {shorten(name)}: a set's name has letters, digits, - and _, at most 60"
            )
        if not isinstance(images, list) or not all(isinstance(each, str) for each in images):
            raise UserError(f"{expected}, found {name} without a list of names")
    return tuple((name, tuple(images)) for name, images in found.items())


def find_rows(training_set: TrainingSet, name: str, images: Sequence[str]) -> list[int]:
    """The rows of a set's images in the training set. Raises UserError where one is not there."""
    ids = training_set.ids
    files = name_images(ids, training_set.paths, np.zeros(len(ids), bool))
    rows = {known: row for names in (ids, files) for row, known in enumerate(names)}
    for image in images:
        if image not in rows:
            raise UserError(
                f"set {name}: {shorten(image)}: none of the {len(ids)} training images, which are "
                f"named as in influence.csv, such as {shorten(files[0])}"
            )
    return [rows[image] for image in images]
