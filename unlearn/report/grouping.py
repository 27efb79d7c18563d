"""Which training images belong together, where a page shows groups: those that people named, else the
folders that images stand in."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..datasets.originals import Original, read_originals
from ..datasets.settings import read_settings
from .ranking import Ranking

MOST_GROUPS = 30
TOP = "the folder itself"  # a group beside those of the folders in it
REST = "training images"  # beside exemplars: not one that anybody made
EXEMPLARS = "exemplars"


def group_images(names: Sequence[str], is_exemplar: np.ndarray) -> list[str | None]:
    """The group of each image: exemplars, or the folder that it stands in; None of all where there
    is one folder alone, or so many that they say nothing."""
    folders = [name.rpartition("/")[0] for name in names]
    several = {folder for folder, mask in zip(folders, is_exemplar) if not mask}
    if 1 < len(several) <= MOST_GROUPS:
        return [EXEMPLARS if mask else folder or TOP for folder, mask in zip(folders, is_exemplar)]
    if is_exemplar.any() and not is_exemplar.all():
        return [EXEMPLARS if mask else REST for mask in is_exemplar]
    return [None] * len(names)


def find_originals(
    paths: Sequence[Path | None], dataroot: str | Path | None
) -> list[Original | None]:
    """What a data root that was made of a folder knows of its pictures; None of others'."""
    originals = read_originals(dataroot) if dataroot else {}
    if dataroot is None or not originals:
        return [None] * len(paths)
    images = Path(dataroot) / read_settings(dataroot)["images"]
    return [originals.get(os.path.relpath(path, images)) if path else None for path in paths]


def find_groups(ranking: Ranking, dataroot: str | Path) -> dict[str, list[int]]:
    """The groups of a ranking's images that are removed as a whole, {name: their rows}: those that
    its page shows, but for what is left beside exemplars, and for one that holds all. {} where
    there are fewer than two, or more than a page can show."""
    found = group_images(ranking.names, ranking.is_exemplar)
    known = find_originals(ranking.paths, dataroot)
    names = [own.group if own and own.group else name for own, name in zip(known, found)]
    groups = {}
    for row, name in enumerate(names):
        if name is not None:
            groups.setdefault(name, []).append(row)
    if not 1 < len(groups) <= MOST_GROUPS:
        return {}
    return {name: rows for name, rows in groups.items() if name != REST and len(rows) < len(names)}
