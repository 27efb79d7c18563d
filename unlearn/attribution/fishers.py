"""Fisher files: which one a run takes, and whether it is this model's and of these images."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import torch

from ..datasets.conditioning import TEXT
from ..datasets.settings import read_settings
from ..datasets.training_sets import TrainingSet, find_extras, open_arrays, open_training_set
from ..errors import UserError
from ..models.lora import SELECTION, has_matrices
from ..models.pipelines import Model
from ..runtime.programs import log
from ..storage.reading import read_tensors
from ..storage.records import check_record, name_input, read_record, record_path
from .curvature import DiagonalFisher, check_fisher
from .ekfac import EKFAC, EkFac, check_ekfac

KV = "cross-attn-kv"


def find_fisher(dataroot: str | Path, asked: str | Path | None, command: str) -> Path:
    """The Fisher file asked for, else the one that dataset.json names where it is there, else
    sd_fisher.* of the data root. Raises UserError where there is none; command: that makes it."""
    root = Path(dataroot)
    named = root / read_settings(dataroot)["fisher"]
    found = sorted(
        path for path in root.glob("sd_fisher.*") if path.suffix in (".safetensors", ".pt", ".bin")
    )
    if asked:
        path = Path(asked)
    elif named.is_file():
        path = named
    else:
        path = found[-1] if found else root / "sd_fisher.safetensors"
    if not path.is_file():
        raise UserError(f"--fisher_path {path}: no such file; make it: {command}")
    return path


def own_selection(model: Model) -> str:
    """The weights of a model that are unlearned where nobody says: a LoRA's own, where its matrices
    stand beside the UNet's weights."""
    return SELECTION if has_matrices(model.denoiser) else KV


def own_fisher_path(dataroot: str | Path, model: Model, selection: str = KV) -> Path:
    """Where the Fisher of a model stands in a data root that has another one's: its name holds the
    weights' hash."""
    suffix = "" if selection == KV else f"-{selection}"
    return Path(dataroot) / f"sd_fisher-{model.weights_hash[:8]}{suffix}.safetensors"


def open_fisher(
    path: Path,
    model: Model,
    parameters: dict[str, torch.nn.Parameter],
    damping: float,
    remedy: str,
) -> DiagonalFisher:
    """The DiagonalFisher of a file, damped: damping is a multiple of each parameter's mean entry.
    Raises UserError, ending with `remedy`, where its record says that it was made for another model
    (published ones, .pt, have none), it was changed, or it cannot be divided by."""
    name_input("Fisher", f"{path} with damping {damping:g}")
    if path.suffix == ".safetensors" and record_path(path).exists():
        check_record(path, model.identity, remedy)
    if is_ekfac(path, remedy):
        tensors = read_tensors(path, "--fisher_path")
        check_ekfac(path, tensors, parameters, damping, remedy)
        return EkFac(tensors, damping)
    diagonal = read_tensors(path, "--fisher_path", set(parameters))
    check_fisher(path, diagonal, parameters, damping, remedy)
    return DiagonalFisher(diagonal, damping)


def is_ekfac(path: Path, remedy: str) -> bool:
    """Whether a file's record says that it holds EK-FAC."""
    has_record = path.suffix == ".safetensors" and record_path(path).exists()
    return has_record and read_record(path, remedy)["identity"].get("curvature") == EKFAC


def find_remedy(
    path: Path, dataroot: str | Path, model: Model, selection: str, make: Callable[..., str]
) -> str:
    """What to do where a Fisher is not this model's. make(output): the command that makes one."""
    own = own_fisher_path(dataroot, model, selection)
    if own.is_file() and own != path:
        return f"give --fisher_path {shlex.quote(str(own))}"
    return f"make this model's own: {make(own)}"


def has_other_images(path: Path, dataroot: str | Path, subset_size: int | None = None) -> bool:
    """Whether a Fisher's record says that it was made from other training images than a data root's
    encoded ones. Nothing says so of published ones (.pt), which have no record. subset_size: how
    many images a run uses; records from before they told the number of the Fisher's are taken to be
    of so many, or of as many as are used where nobody asks."""
    if path.suffix != ".safetensors" or not record_path(path).exists():
        return False
    record = read_record(path, "make it anew")
    if (made_from := record["identity"].get("training_set")) is None:
        return False
    settings = read_settings(dataroot)
    latents, embeddings = open_arrays(dataroot)[:2]
    shapes = {TEXT: embeddings.shape[-2:], **find_extras(dataroot)}
    images = open_training_set(
        dataroot, settings["name"], latents.shape[1:], shapes, len(embeddings)
    )
    circumstances = record.get("circumstances")
    told = circumstances.get("num_images") if isinstance(circumstances, dict) else None
    counts = [min(len(images), settings["largest_subset"]), subset_size]
    if isinstance(told, int):
        counts = [told]
    return made_from not in [images.first(count).identity for count in counts]


def compare_images(
    path: Path, training_set: TrainingSet, dataroot: str | Path, make: Callable[..., str]
) -> list[str]:
    """What there is to warn of where a Fisher was made from other training images than those of the
    data root, which are encoded by now: sentences for everything that is made with it, also logged.
    Raises UserError where it stands in the data root, as if it were its own. make(output): the
    command that makes one."""
    if not training_set.source or not has_other_images(path, dataroot, len(training_set)):
        return []
    if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(dataroot)):
        raise UserError(
            f"{path}: was made from other training images than those of {dataroot}; make it anew: "
            f"{make(path, overwrite=True)}; or, where the model was trained on those others, move "
            f"it out of the data root and name it by --fisher_path"
        )
    warning = f"the Fisher {path} was made from other training images than those of {dataroot}"
    log.warning(f"{warning}: right only where the model was trained on those")
    return [warning]
