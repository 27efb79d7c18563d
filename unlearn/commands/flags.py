"""Flags resolved: their defaults, and what a run costs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..datasets.preparation import count_images
from ..datasets.settings import AUTO, OWN_DEFAULTS, check_number, read_settings
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.lora_names import parse_name
from ..models.precision import check_weights_type
from ..runtime.printing import show
from ..runtime.programs import choose_device, set_precision
from ..storage.reading import check_name
from ..storage.records import NAMES, name_input
from .parsing import Parser, add_flags, make_parser

__all__ = [
    "Parser",
    "add_flags",
    "check_names",
    "make_parser",
    "print_plan",
    "resolve",
    "step_size",
]


def check_names(args: argparse.Namespace) -> None:
    """Raises UserError where a flag names something that is not UTF-8."""
    for flag, value in vars(args).items():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                check_name(f"--{flag}", name)


def step_size(text: str) -> float | str:
    """The type of --unlearn_lr: a number or auto."""
    return text if text == AUTO else float(text)


def resolve(
    args: argparse.Namespace, flag_of: dict[str, str] | None = None, with_lora: bool = True
) -> dict:
    """Fills the flags left at None in place: from the data root's dataset.json, else as published,
    or chosen for a data root that is neither. Sets precision and device. `flag_of` maps a flag to a
    setting of another name; with_lora: whether the data root's LoRA changes the model. Raises
    UserError for values out of range."""
    flag_of = {"sd_version": "pipeline", **(flag_of or {})}
    dataroot = "data/abc" if args.dataroot is None else args.dataroot
    if not dataroot or not Path(dataroot).is_dir():
        raise UserError(
            f"--dataroot {dataroot or repr(dataroot)}: no such folder; see the README on "
            f"downloading the data"
        )
    settings = {**OWN_DEFAULTS, **read_settings(dataroot)}
    # Of the data root, whichever pipeline (a mirror, a local copy) the other parts come from.
    check_weights_type(settings["weights"], f"{dataroot}/dataset.json: weights")
    args.unet, args.weights = (
        settings["unet"],
        getattr(args, "weights", None) or settings["weights"],
    )
    args.lora = (getattr(args, "lora", None) or settings["lora"]) if with_lora else []
    check_names(args)
    for flag, value in vars(args).items():
        setting = flag_of.get(flag, flag)
        if value is None and setting in settings:
            setattr(args, flag, settings[setting])
        else:
            check_number(f"--{flag}", setting, value)
    if getattr(args, "num_train", 0) is None:
        # Of the whole root, whatever part of it is ranked: all of it was trained on.
        args.num_train = count_images(dataroot)
    NAMES.clear()
    name_input("data root", dataroot)
    pipeline = getattr(args, "sd_version", None) or settings["pipeline"]
    for lora in args.lora:
        parse_name(lora)  # raises where it is not there
    name_input("model", " with ".join(filter(None, [pipeline, args.unet, *args.lora])))
    set_precision(getattr(args, "precision", OWN_DEFAULTS["precision"]))
    args.device = choose_device(getattr(args, "device", None))
    return settings


def print_plan(
    args: argparse.Namespace,
    groups: dict[str | None, list[Task]],
    training_set: TrainingSet,
    grid: Sequence[int],
    num_sweeps: int,
    batch_size: int,
    num_draws: int = 0,
    change_bytes: int = 0,
) -> None:
    """Prints the resolved flags and what the run costs: forward passes, memory of a batch's inputs,
    disk. num_sweeps: how often the training set is scored; num_draws: samples of unlearning, over
    all queries; change_bytes: size of a query's weight change."""
    for flag, value in {**vars(args), "laion_subset_size": len(training_set)}.items():
        show(f"{flag:<26} {'none' if value == '' else value}")
    num_rows = training_set.latents.shape[0] * len(training_set)
    num_samples = num_rows * training_set.embeddings.shape[1] * len(grid)
    sample_bytes = 4 * (3 * training_set.latents[0, 0].size + training_set.embeddings[0, 0].size)
    print(
        f"\n{len(groups)} models, {sum(map(len, groups.values()))} queries, {len(training_set)} "
        f"training images"
    )
    print(
        f"{num_sweeps} sweeps of {num_samples:,} forward passes; {num_draws:,} forward and "
        f"backward passes of unlearning"
    )
    print(
        f"{sample_bytes * batch_size / 1e6:.1f} MB of inputs in a batch; "
        f"{4 * num_sweeps * num_rows / 1e6:.2f} MB of losses"
        + (
            f" and {change_bytes * num_sweeps / 1e6:.1f} MB of weight changes"
            if change_bytes
            else ""
        )
        + " on disk"
    )
