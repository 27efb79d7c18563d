"""The published way of scoring, for the front door: curvature, losses, unlearning."""

from pathlib import Path

from .. import noise
from ..attribution.caches import cache_losses
from ..attribution.curvature import DiagonalFisher
from ..attribution.draws import ImageNoise
from ..attribution.estimation import FisherSettings, choose_num_samples, estimate_fisher
from ..attribution.fishers import open_fisher, own_selection
from ..attribution.names import OUTPUT
from ..attribution.settings import LossSettings, ScoreSettings, UnlearnSettings
from ..attribution.studies import Study
from ..datasets.boxes import Box
from ..datasets.settings import read_settings
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..models.pipelines import Model, select_parameters
from ..running import Output, attribute_queries, group_size
from ..storage.hashes import hash_file
from . import costs

SELF = "give another --out"


def make_fisher(model: Model, images: TrainingSet, root: Path, damping: float) -> DiagonalFisher:
    """The Fisher of a data root, estimated at first use."""
    path, selection = root / "sd_fisher.safetensors", own_selection(model)
    parameters = select_parameters(model.denoiser, selection)
    settings = FisherSettings(choose_num_samples(root, len(images)), selection)
    # Another model's, or of other images: its place is this run's own.
    estimate_fisher(model, images, settings, path, overwrite=True)
    return open_fisher(path, model, parameters, damping, SELF)


def make_losses(study: Study, model: Model, images: TrainingSet, results: Path) -> None:
    """Gives a study the losses before unlearning, made at first use. Of output scoring they tell a
    picture of another model, and are no part of the scores."""
    path, identity = results / "orig_loss/base/laion_loss.npy", study.losses.identity(model, images)
    study.before["laion"] = cache_losses(study.sweep(images), model, path, identity, True)
    if study.scoring.scoring != OUTPUT:
        study.before_hashes["laion"] = hash_file(path)


def open_study(
    model: Model,
    images: TrainingSet,
    fisher: DiagonalFisher,
    root: Path,
    scoring: str,
    box: Box | None,
) -> Study:
    """What ranks the images, without the losses before unlearning."""
    settings = read_settings(root)
    grid = noise.timestep_grid(settings["time_samples"], model.num_train_timesteps)
    unlearning = UnlearnSettings(
        own_selection(model), damping=settings["damping"], num_train=len(images), box=box
    )
    return Study(
        model,
        {"laion": images},
        fisher,
        unlearning,
        LossSettings(grid, ImageNoise()),
        ScoreSettings(scoring),
        batch_size=settings["batch_size"],
        overwrite=True,
    )


def unlearn_each(
    model: Model,
    images: TrainingSet,
    root: Path,
    results: Path,
    tasks: list[Task],
    output: Output,
    clock: costs.Clock,
    scoring: str,
    box: Box | None,
) -> None:
    """Ranks the images for each picture by unlearning it."""
    with clock.step(costs.CURVATURE):
        fisher = make_fisher(model, images, root, read_settings(root)["damping"])
    study = open_study(model, images, fisher, root, scoring, box)
    with clock.step(costs.LOSSES):
        make_losses(study, model, images, results)
    size = group_size(study)
    with clock.step(costs.SCORING):
        for start in range(0, len(tasks), size):
            attribute_queries(study, tasks[start : start + size], output)
