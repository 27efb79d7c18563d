"""Ways of scoring that the front door knows, and the one that is its own: removal."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..attribution.names import FRONT_SCORINGS, REMOVAL
from ..attribution.removal import own_settings
from ..attribution.removal_studies import RemovalStudy
from ..datasets.boxes import Box, check_box
from ..datasets.originals import read_originals
from ..datasets.settings import read_settings
from ..datasets.tasks import BASE
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model


def check_scoring(scoring: str, use_repeats: bool, box: Sequence[int] | None) -> Box | None:
    """The box that is given, None where none is. Raises UserError where there is no such way of
    scoring, or repeats mean nothing to it."""
    if scoring not in FRONT_SCORINGS:
        raise UserError(f"--scoring {scoring}: expected one of {', '.join(FRONT_SCORINGS)}")
    if use_repeats and scoring != REMOVAL:
        raise UserError(
            f"--use_repeats: means nothing to --scoring {scoring}, only to {REMOVAL}; leave it out"
        )
    return check_box(box) if box else None


def open_removal(
    model: Model,
    images: TrainingSet,
    root: Path,
    results: Path,
    use_repeats: bool,
    box: Box | None,
) -> RemovalStudy:
    """What ranks the images by removal, with features at a place of this run's own."""
    repeats: tuple[int, ...] = ()
    if use_repeats:
        originals = read_originals(root)
        folder = root / read_settings(root)["images"]
        files = [os.path.relpath(path, folder) if path else "" for path in images.paths]
        repeats = tuple(originals[file].repeats if file in originals else 1 for file in files)
    if set(repeats) == {1}:
        repeats = ()
    place, settings = results / "removal" / BASE, own_settings(model)
    return RemovalStudy(
        model,
        {"laion": images},
        place,
        settings,
        repeats=repeats,
        box=box,
        overwrite=True,
    )
