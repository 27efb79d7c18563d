"""Command lines: flags that programs share, their groups and defaults, and what a run costs."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..datasets.preparation import count_images
from ..datasets.settings import AUTO, OWN_DEFAULTS, check_number, read_settings
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.lora_files import parse_name
from ..runtime.printing import show
from ..runtime.programs import choose_device, set_precision
from ..storage.reading import check_name
from ..storage.records import NAMES, name_input

GROUPS = ("model", "data", "unlearning", "scoring", "output", "running")
# Flags that programs share: group, type (None: a switch), help. Their defaults are None, and
# `resolve` fills them.
FLAGS = {
    "sd_version": (
        "model",
        str,
        "diffusers pipeline, a folder or a hub name (default dataset.json's, of AbC "
        "CompVis/stable-diffusion-v1-4)",
    ),
    "lora": (
        "model",
        str,
        "LoRA files or folders that change it, FILE_OR_FOLDER[:WEIGHT] (default dataset.json's)",
    ),
    "task_json": ("data", str, "task file: which synthesized images, of which models"),
    "dataroot": ("data", str, "data root (default data/abc)"),
    "laion_subset_size": (
        "data",
        int,
        "how many training images (default all, at most 100,000)",
    ),
    "time_samples": (
        "scoring",
        int,
        "timesteps of the loss's grid, which must divide the model's training timesteps (default "
        "dataset.json's, else 10)",
    ),
    "noise_seed": ("scoring", int, "seed of the losses' noise (default 0)"),
    "result_dir": ("output", str, "where losses and results stand (default results)"),
    "overwrite": ("output", None, "replace what was made with other settings"),
    "precision": ("running", str, "fp32 (default) or tf32"),
    "compat": (
        "running",
        str,
        "abu: the published program's arithmetic, to reproduce its numbers",
    ),
    "device": ("running", str, "cuda, cuda:N or cpu (default cuda if there is one)"),
    "batch_size": (
        "running",
        int,
        "noisy samples in one forward pass; memory only (default dataset.json's, else 200)",
    ),
    "vae_batch_size": (
        "running",
        int,
        "images the VAE encodes at once; memory only (default dataset.json's, else 20)",
    ),
    "shard": (
        "running",
        str,
        "I/N: only the I-th of N nearly equal parts of the work, for the tasks of a SLURM array",
    ),
    "dry_run": (
        "running",
        None,
        "check every input, print the resolved plan with its cost, and stop",
    ),
}
CHOICES = {"precision": ("fp32", "tf32"), "compat": ("abu",)}
REQUIRED = ("task_json",)
SEVERAL = ("lora",)
DEFAULTS = {"result_dir": "results"}


class Parser(argparse.ArgumentParser):
    """A parser whose flags stand in GROUPS, and whose errors are one line."""

    def __init__(self, doc: str | None, prog: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=doc,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.groups = {title: self.add_argument_group(title) for title in GROUPS}

    def add(self, group: str, *args: Any, **kwargs: Any) -> argparse.Action:
        """Adds a flag to one of GROUPS."""
        return self.groups[group].add_argument(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The flags. Raises UserError, naming the nearest flag, where one is not known."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(flag, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """A user's mistake: one line."""
        raise UserError(f"{message}; see {self.prog} --help")


def make_parser(doc: str | None, prog: str | None = None, epilog: str | None = None) -> Parser:
    """The parser of a program that is documented by `doc`, and in `epilog` what its words mean."""
    return Parser(doc, prog, epilog)


def add_flags(parser: Parser, *names: str) -> None:
    """Adds shared flags to their groups."""
    for name in names:
        group, kind, text = FLAGS[name]
        if kind is None:
            parser.add(group, f"--{name}", action="store_true", help=text)
        else:
            parser.add(
                group,
                f"--{name}",
                type=kind,
                help=text,
                choices=CHOICES.get(name),
                nargs="+" if name in SEVERAL else None,
                required=name in REQUIRED,
                default=DEFAULTS.get(name),
            )


def check_names(args: argparse.Namespace) -> None:
    """Raises UserError where a flag names something that is not UTF-8."""
    for flag, value in vars(args).items():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                check_name(f"--{flag}", name)


def step_size(text: str) -> float | str:
    """The type of --unlearn_lr: a number or auto."""
    return text if text == AUTO else float(text)


def resolve(args: argparse.Namespace, flag_of: dict[str, str] | None = None) -> dict:
    """Fills the flags left at None in place: from the data root's dataset.json, else as published,
    or chosen for a data root that is neither. Sets precision and device. `flag_of` maps a flag to a
    setting of another name. Raises UserError for values out of range."""
    flag_of = {"sd_version": "pipeline", **(flag_of or {})}
    dataroot = "data/abc" if args.dataroot is None else args.dataroot
    if not dataroot or not Path(dataroot).is_dir():
        raise UserError(
            f"--dataroot {dataroot or repr(dataroot)}: no such folder; see the README on "
            f"downloading the data"
        )
    settings = {**OWN_DEFAULTS, **read_settings(dataroot)}
    # Of the data root, whichever pipeline (a mirror, a local copy) the other parts come from.
    args.unet = settings["unet"]
    args.lora = getattr(args, "lora", None) or settings["lora"]
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
