"""By removal: how much less certain the model would be of a query without images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ..attribution.removal import RemovalSettings, own_settings
from ..attribution.removal_groups import check_groups
from ..attribution.removal_scores import RIDGE
from ..attribution.removal_sets import ChosenSet
from ..attribution.removal_studies import RemovalStudy
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from ..runtime.programs import in_precision


@contextmanager
def opened(
    model: Model,
    images: TrainingSet,
    cache: str | Path | None,
    settings: RemovalSettings | None,
    ridge: float,
    repeats: tuple[int, ...],
) -> Iterator[RemovalStudy]:
    """What ranks the images, with features in `cache`, or in a folder that is removed again."""
    with TemporaryDirectory() as folder, in_precision("fp32"):
        place, settings = Path(cache or folder), settings or own_settings(model)
        yield RemovalStudy(model, {"laion": images}, place, settings, ridge, repeats)


def removal_scores(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    cache: str | Path | None = None,
    settings: RemovalSettings | None = None,
    ridge: float = RIDGE,
    repeats: tuple[int, ...] = (),
) -> np.ndarray:
    """How much less certain the model's prediction of a query would be without each image, at each
    timestep: float64 [timesteps, n], higher is more influential. `rank` sums over them and tells
    from their spread how sure the sums are.

    cache: a folder that keeps the images' features, one backward pass an image, timestep and probe:
    called again, for this query or another, only the query's own are made. settings: weights,
    timesteps, probes, numbers kept of a gradient and noise seed, by default all weights, of a LoRA
    its own matrices, and what the commands take; ridge: lambda; repeats: how often training saw each image. Raises UserError
    where the folder holds features of something else. Source: Woodbury's identity, see
    `attribution.removal`.
    """
    with opened(model, images, cache, settings, ridge, repeats) as study:
        study.build()
        return study.score_draws([query])[0][:, 0]


def removal_group_scores(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    groups: Mapping[str, Sequence[int]],
    cache: str | Path | None = None,
    settings: RemovalSettings | None = None,
    ridge: float = RIDGE,
    repeats: tuple[int, ...] = (),
) -> dict[str, np.ndarray]:
    """How much less certain the model's prediction of a query would be without all images of a group
    at once, at each timestep: {name: float64 [timesteps]}. That is more than the sum of the images'
    own scores where they stand in for each other. groups: {name: rows of the training set}; other
    arguments as of `removal_scores`. Raises UserError where a group holds all images, or one that is
    not there."""
    with opened(model, images, cache, settings, ridge, repeats) as study:
        check_groups(groups, study.num_images)
        study.build()
        together = study.score_all([query], groups).groups[:, 0]
    return dict(zip(groups, together.T))


def choose_set(
    model: Model,
    images: TrainingSet,
    query: TrainingSet,
    count: int,
    cache: str | Path | None = None,
    settings: RemovalSettings | None = None,
    ridge: float = RIDGE,
    repeats: tuple[int, ...] = (),
) -> ChosenSet:
    """The images that would be missed most together: `count` of them, or all but one where there are
    no more; fewer where a tiny ridge leaves the next to rounding. `rows` of the training set in the order in which they were chosen, and `rises`, what each
    adds to their score where those before it are gone: float64, `score` is their sum. They are not
    the first of the ranking where images stand in for each other. Arguments as of `removal_scores`.
    Raises UserError where count is less than 1."""
    if count < 1:
        raise UserError(f"count {count}: expected at least 1")
    with opened(model, images, cache, settings, ridge, repeats) as study:
        study.build()
        [chosen] = study.score_all([query], set_size=count).sets
    return chosen
