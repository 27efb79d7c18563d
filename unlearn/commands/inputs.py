"""What commands need before they start, of a run's flags: inputs checked, the training set and the
Fisher found and loaded."""

import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..attribution import fishers
from ..attribution.curvature import DiagonalFisher
from ..attribution.draws import BatchNoise, ImageNoise
from ..datasets import preparation
from ..datasets.boxes import Box, check_inside
from ..datasets.pictures import load_image
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models import pipelines
from ..models.pipelines import Model, select_parameters
from ..runtime.programs import say
from .advice import encode_command, fisher_command


def check_result_dir(result_dir: str | Path) -> None:
    """Raises UserError where nothing could be written below `result_dir`; makes nothing."""
    folder = Path(result_dir).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--result_dir {result_dir}: cannot be written: {folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"--result_dir {result_dir}: cannot be written: no permission to write in {folder}"
        )


def check_training_files(args: Namespace) -> int:
    """`preparation.check_training_files` of a run."""
    return preparation.check_training_files(
        args.dataroot, args.laion_subset_size, encode_command(args)
    )


def load_model(args: Namespace, fuse_lora: bool = False, trained: bool = True) -> Model:
    """`pipelines.load_model` of a run's flags."""
    return pipelines.load_model(
        args.sd_version, args.device, args.unet, trained, args.lora, fuse_lora, args.weights
    )


def prepare_training_set(model: Model, args: Namespace) -> TrainingSet:
    """`preparation.prepare_training_set` of a run; with --dry_run nothing is encoded."""
    subset_size = getattr(args, "laion_subset_size", None)
    if getattr(args, "dry_run", False):
        return preparation.imagine_training_set(model, args.dataroot, subset_size)
    vae_batch_size = getattr(args, "vae_batch_size", None)
    return preparation.prepare_training_set(
        model, args.dataroot, subset_size, vae_batch_size, encode_command(args)
    )


def find_fisher(args: Namespace) -> Path:
    """`fishers.find_fisher` of a run."""
    return fishers.find_fisher(args.dataroot, args.fisher_path, fisher_command(args))


def load_fisher(
    model: Model, args: Namespace, selection: str = "cross-attn-kv", damping: float | None = None
) -> DiagonalFisher:
    """The damped Fisher of a run: `fishers.open_fisher`."""
    path, make = find_fisher(args), partial(fisher_command, args, weight_selection=selection)
    remedy = fishers.find_remedy(path, args.dataroot, model, selection, make)
    parameters = select_parameters(model.denoiser, selection)
    return fishers.open_fisher(
        path, model, parameters, args.damping if damping is None else damping, remedy
    )


def warn_of_fisher(
    fisher: DiagonalFisher,
    training_set: TrainingSet,
    args: Namespace,
    selection: str = "cross-attn-kv",
) -> None:
    """Has a run's Fisher bear what there is to warn of it: `fishers.compare_images`."""
    make = partial(fisher_command, args, weight_selection=selection)
    fisher.warnings = fishers.compare_images(find_fisher(args), training_set, args.dataroot, make)


def check_boxes(box: Box | None, tasks: Sequence[Task], dataroot: str) -> None:
    """Raises UserError where a box reaches out of a query's picture."""
    for path in [Path(dataroot) / task.synth_image_path for task in tasks]:
        if box and path.is_file():  # of latents alone it is told when they are read
            check_inside(box, load_image(path).size, path)


def check_pictures(tasks: list[Task], dataroot: str | Path) -> None:
    """Tells of `preparation.examine_pictures`' lines, and raises what it raises."""
    for note in preparation.examine_pictures(tasks, dataroot):
        say(note)


def loss_path(args: Namespace, task: Task, name: str) -> Path:
    """Where compute_training_loss.py caches the losses (`exemplar` or `laion`) of a task's
    model."""
    return Path(args.result_dir) / "orig_loss" / task.model_name / f"{name}_loss.npy"


def loss_noise(args: Namespace, batch_flag: str = "batch_size") -> ImageNoise | BatchNoise:
    """The noise of a run's losses."""
    return BatchNoise(getattr(args, batch_flag)) if args.compat else ImageNoise(args.noise_seed)
