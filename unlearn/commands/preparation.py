"""What both scripts do before they compute: check all that can be checked, load, encode."""

from argparse import Namespace
from dataclasses import dataclass

from .. import noise
from ..attribution.curvature import DiagonalFisher
from ..attribution.names import REMOVAL
from ..datasets.queries import read_stored
from ..datasets.repeats import read_repeats
from ..datasets.settings import read_settings
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet, label_rows
from ..models.customization import check_customization, check_tokens
from ..models.lora import is_fused
from ..models.lora_files import read_header
from ..models.lora_headers import compare_header, parse_header
from ..models.lora_names import parse_name
from ..models.pipelines import Model
from ..models.precision import check_scoring
from ..runtime.programs import log
from .inputs import check_pictures, load_fisher, load_model, prepare_training_set, warn_of_fisher


@dataclass
class Prepared:
    """What a run computes from, all checked."""

    model: Model
    grid: list[int]  # timesteps of the losses
    training_set: TrainingSet
    fisher: DiagonalFisher | None  # of the weights that are unlearned, where any are


def tell_headers(args: Namespace, model: Model) -> None:
    """Says what the headers of a run's LoRA files say otherwise than its data root."""
    if not args.lora:
        return
    settings = read_settings(args.dataroot)
    _, _, captions = label_rows(args.dataroot)
    repeats = read_repeats(args.dataroot, len(captions)) if settings["repeats"] else None
    for name in args.lora[:1]:  # what else changes the model was trained on other images
        header = parse_header(read_header(parse_name(name).path))
        few = [[caption] for caption in captions]
        for note in compare_header(header, few, model.resolution(settings), repeats, model):
            log.warning(f"--lora {name}: {note}")


def prepare(args: Namespace, groups: dict[str | None, list[Task]], grid_flag: str) -> Prepared:
    """Checks the inputs of a run that ranks, or scores under, the models of some tasks, {path of
    the model: its tasks}; loads the base model, its Fisher where `args` ask for one, and the
    training set. grid_flag: the flag that says the number of timesteps. Raises UserError, before
    what is expensive, where something is missing or does not fit."""
    check_scoring(getattr(args, "scoring", None), args.weights)
    weights = getattr(args, "weight_selection", None)
    selection = None if getattr(args, "scoring", None) == REMOVAL else weights
    check_pictures([task for tasks in groups.values() for task in tasks], args.dataroot)
    for tasks in groups.values():
        check_tokens(tasks[0].model_dir(args.dataroot), tasks, args.sd_version)
    model = load_model(args, fuse_lora=is_fused(weights))
    time_samples = getattr(args, grid_flag.removeprefix("--"))
    grid = noise.timestep_grid(time_samples, model.num_train_timesteps, grid_flag)
    latent_shape = model.latent_shape(model.resolution(read_settings(args.dataroot)))
    for tasks in groups.values():
        check_customization(model, tasks[0].model_dir(args.dataroot), tasks)
        for task in tasks:
            read_stored(task, args.dataroot, latent_shape, model.embedding_shape)
    fisher = load_fisher(model, args, selection) if selection else None
    training_set = prepare_training_set(model, args)
    tell_headers(args, model)
    if fisher and selection:
        warn_of_fisher(fisher, training_set, args, selection)
    return Prepared(model, grid, training_set, fisher)
