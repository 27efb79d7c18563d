"""Command lines: flags that programs share, and their groups. It imports nothing that takes long, so
that a command that imports its work where it does it shows its help, and a mistake, at once."""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import UserError

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
    "weights": (
        "model",
        str,
        "fp32 or bf16: all weights but those that are unlearned in half precision (default "
        "dataset.json's, else fp32)",
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
CHOICES = {"precision": ("fp32", "tf32"), "compat": ("abu",), "weights": ("fp32", "bf16")}
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


def add_box(parser: Parser) -> None:
    """Adds --box, which both programs that rank images take."""
    parser.add(
        "scoring",
        "--box",
        type=int,
        nargs=4,
        metavar=("X0", "Y0", "X1", "Y1"),
        help="only what the pictures that are asked about show in this box counts; "
        "pixels from the top left corner",
    )
