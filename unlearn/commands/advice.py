"""Commands that messages tell people to type: they carry the flags in use, those that are not the
defaults, and run as printed."""

import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..attribution.ekfac import EKFAC
from ..attribution.fishers import KV, is_ekfac
from ..attribution.names import REMOVAL
from ..datasets.settings import OWN_DEFAULTS, read_settings
from ..models.lora import choose_selection
from ..runtime.programs import choose_device
from .removal_flags import DEFAULTS as REMOVAL_DEFAULTS
from .removal_flags import OWN

ENCODING = ("sd_version", "lora", "weights", "vae_batch_size", "device")
IMAGES = (*ENCODING, "laion_subset_size")
LOSSES = (*IMAGES, "batch_size", "time_samples", "noise_seed", "precision")
TASKS = ("task_json", "dataroot")
# program -> those of its flags that other programs have too; a loss_ in front is not told apart
FLAGS = {
    "compute_training_loss.py": (*TASKS, "result_dir", *LOSSES, "compat"),
    "compute_influence.py": (
        *TASKS,
        "result_dir",
        *IMAGES,
        "loss_batch_size",
        "loss_time_samples",
        "noise_seed",
        "precision",
        "compat",
        "scoring",
        "fisher_path",
        "weight_selection",
        "damping",
        "num_train",
        "unlearn_lr",
        "unlearn_steps",
        "unlearn_batch_size",
        "unlearn_grad_accum_steps",
        "seed",
        "top_k",
        *OWN,
        "box",
    ),
    "fisher": ("dataroot", *IMAGES, "precision", "weight_selection"),
    "index": (*TASKS, *LOSSES, "fisher_path", "damping"),
    "encode": ("dataroot", *ENCODING),
    "baselines": (*TASKS, "result_dir", *LOSSES, "fisher_path", "damping"),
    "retrain": (
        *TASKS,
        "result_dir",
        *(flag for flag in IMAGES if flag != "lora"),
        "noise_seed",
    ),
}
DEFAULTS = {
    **OWN_DEFAULTS,
    "result_dir": "results",
    "scoring": "exact",
    "output": "results/index",
    "seed": 0,
    **REMOVAL_DEFAULTS,
}
TAKE_BF16 = ("compute_influence.py", "index")


def find_program(name: str) -> list[str]:
    """How a program is started: a script by its path, where it is not in the present folder."""
    if not name.endswith(".py"):
        return ["-m", "unlearn", name]
    return [name if Path(name).is_file() else str(Path(__file__).parent.parent.parent / name)]


def write_command(name: str, args: Namespace, *words: str, **more: Any) -> str:
    """The command line of a program of this project that goes with a run's flags `args`. words:
    what follows its name; more: further flags, or other values of flags, True where one takes
    none."""
    defaults = {**DEFAULTS, **read_settings(args.dataroot)}
    defaults.update(sd_version=defaults["pipeline"], device=choose_device())
    values = {flag.removeprefix("loss_"): value for flag, value in vars(args).items()}
    usual = "all" if values.get("scoring") == REMOVAL else KV
    defaults["weight_selection"] = choose_selection(None, values.get("lora") or [], usual)
    values = {**{flag: values.get(flag.removeprefix("loss_")) for flag in FLAGS[name]}, **more}
    if values.get("precision") == "bf16" and name not in TAKE_BF16:
        del values["precision"]
    parts = ["python", *find_program(name), *words]
    for flag, value in values.items():
        several = value if isinstance(value, (list, tuple)) else [value]
        is_given = value is not None and value is not False and value not in ("", [])  # 0 is
        if is_given and str(value) != str(defaults.get(flag.removeprefix("loss_"))):
            parts += [f"--{flag}", *(map(str, several) if value is not True else [])]
    return shlex.join(parts)


def loss_command(args: Namespace, **more: Any) -> str:
    """What caches the losses that a run needs."""
    return write_command("compute_training_loss.py", args, **more)


def index_command(args: Namespace, **more: Any) -> str:
    """What builds the indices that a run asks for."""
    return write_command("index", args, **{"output": getattr(args, "index", None), **more})


def influence_command(args: Namespace, **more: Any) -> str:
    """What ranks the queries of a run's task file."""
    index = {
        name: getattr(args, name)
        for name in ("index", "shortlist", "audit")
        if getattr(args, "index", None)
    }
    return write_command("compute_influence.py", args, **index, **more)


def encode_command(args: Namespace, **more: Any) -> str:
    """What encodes a data root's training set."""
    return write_command("encode", args, **more)


def fisher_command(args: Namespace, output: str | Path | None = None, **more: Any) -> str:
    """What makes the Fisher that a run asks for, and what must then be given where it would not be
    found by itself."""
    given = getattr(args, "fisher_path", None)
    if given and is_ekfac(Path(given), "make it anew"):
        more = {"curvature": EKFAC, **more}
    output = (
        Path(output)
        if output
        else Path(args.fisher_path).with_suffix(".safetensors")
        if getattr(args, "fisher_path", None) and Path(args.fisher_path).name  # and not /
        else None
    )
    if output in (None, Path(args.dataroot) / "sd_fisher.safetensors"):
        return write_command("fisher", args, **more)
    return (
        f"{write_command('fisher', args, output=output, **more)} and give --fisher_path "
        f"{shlex.quote(str(output))}"
    )
