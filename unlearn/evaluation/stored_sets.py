"""What an influence file tells of several images at once: groups that were removed as a whole, and
images that are chosen together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..report.contents import Chosen, GroupScore, Row
from ..storage.reading import read_npz

REMEDY = "make it anew: the same command with --overwrite"
OF_GROUPS = {
    "group_names": ("U", 1),
    "group_of": ("iu", 1),
    "group_scores": ("f", 1),
    "group_low": ("f", 1),
    "group_high": ("f", 1),
}
OF_SETS = {"set_rows": ("iu", 1), "set_rises": ("f", 1)}


def read_groups(path: Path, ids: Sequence[str], rows: list[Row]) -> dict[str, GroupScore]:
    """The scores of groups that were removed as a whole, by name, of an influence file; {} where it
    has none, or its images are grouped otherwise by now. ids: of its images."""
    found = read_npz(path, OF_GROUPS, REMEDY)
    if {*OF_GROUPS} != found.keys():
        return {}
    names, owners = found["group_names"].tolist(), found["group_of"]
    if owners.shape != (len(ids),) or any(
        found[field].shape != (len(names),) for field in OF_GROUPS if field != "group_of"
    ):
        raise UserError(f"{path}: its groups are not those of {len(ids)} images; {REMEDY}")
    grouped = {
        id: names[owner] if 0 <= owner < len(names) else None for id, owner in zip(ids, owners)
    }
    if any((row.group if row.group in names else None) != grouped[row.id] for row in rows):
        return {}
    numbers = zip(*(found[field].tolist() for field in ("group_scores", "group_low", "group_high")))
    return {name: GroupScore(*each) for name, each in zip(names, numbers)}


def read_places(path: Path, num_images: int, remedy: str = REMEDY) -> tuple[list[int], list[float]]:
    """The images that are chosen together, of an influence file of so many, by their places there, and
    what each adds; none where it names none. Raises UserError, ending with `remedy`, where it names
    others."""
    found = read_npz(path, OF_SETS, remedy)
    if {*OF_SETS} != found.keys():
        return [], []
    places, rises = found["set_rows"].tolist(), found["set_rises"]
    is_known = len(set(places)) == len(places) == len(rises) and np.isfinite(rises).all()
    if not is_known or any(not 0 <= place < num_images for place in places):
        raise UserError(
            f"{path}: the images chosen together are not among its {num_images}; {remedy}"
        )
    return places, rises.tolist()


def read_set(path: Path, ids: Sequence[str], rows: Sequence[Row]) -> list[Chosen]:
    """The images that are chosen together, of an influence file; [] where it names none. ids: of its
    images; rows: theirs, most influential first. Raises UserError where it names others."""
    places, rises = read_places(path, len(ids))
    ranked: dict[str, tuple[int, Row]] = {row.id: (rank, row) for rank, row in enumerate(rows, 1)}
    known = [ranked[str(ids[place])] for place in places]
    return [Chosen(row, rank, adds) for (rank, row), adds in zip(known, rises)]
