"""What people have of a model, made the diffusers folder that every command loads: links to what is
there, and only what cannot be linked (weights that are no safetensors, a single file) written anew."""

import os
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..datasets.presence import FILES_OF_MODELS, check_model
from ..datasets.settings import read_settings
from ..errors import UserError
from ..models.customization import CUSTOMIZED_WEIGHTS
from ..models.families import find_family
from ..models.parts import class_names
from ..models.weights import (
    INDEX,
    WEIGHTS,
    check_pointer,
    find_absent,
    find_weights,
    is_ordinary,
    list_weights,
)
from ..runtime.programs import say
from ..storage.reading import list_visible, read_json, read_text
from .assembly import assemble
from .checkpoints import convert_file, explain_lora
from .customized import is_customized, merge_customization
from .deltas import read_delta, unpack_delta

LORA = "pytorch_lora_weights.safetensors"
SETTINGS = "dataset.json"  # of a data root


@dataclass(frozen=True)
class Source:
    """A model as every command loads it."""

    pipeline: str  # diffusers folder or name on the hub
    unet: str = ""  # the folder of another UNet with its schedule
    lora: tuple[str, ...] = ()  # FILE[:WEIGHT] of LoRA files that change it
    side: int = 0  # pixels of its pictures' side, 0 for its own
    weights: str = ""  # their precision, "" where nobody says


def find_model(
    name: str | Path, base: str | Path | None, place: Path, given: Collection[str] = ()
) -> Source:
    """The model that a path or a name on the hub is; what must be put together stands in `place`.
    base: the model that a UNet's folder or a single file takes its other parts from; the folder of a
    data root is the model that its dataset.json says; given: parts whose weights it may lack, because
    a file has them. Raises UserError, with the way on, where it is none that can be used."""
    check_model(name)
    path = Path(name)
    if not path.exists():
        return Source(str(name))
    path = Path(os.path.abspath(path))
    if delta := read_delta(path):
        path = unpack_delta(path, delta, place / "delta")
    if path.is_file() and path.name not in CUSTOMIZED_WEIGHTS:
        configuration = lambda given: (
            find_model(base, None, place / "base", given).pipeline if base else None
        )
        return Source(str(convert_file(path, base, configuration, place)))
    path = path.parent if path.is_file() else find_snapshot(path)
    if is_customized(path):
        source = find_base(path, base, place)
        return Source(str(merge_customization(path, source.pipeline, source.unet, place)))
    if (path / INDEX).is_file():
        return Source(str(complete_folder(path, place, given)))
    if (path / SETTINGS).is_file():
        return open_root(path, place)
    unet = find_unet(path)
    if unet is None:
        raise UserError(f"--model {path}: {explain_folder(path)}")
    if base is None:
        raise UserError(
            f"--model {path}: has a UNet ({unet}) without the rest of a pipeline; give the model "
            f"that it was trained from: --base MODEL"
        )
    pipeline = find_model(base, None, place / "base").pipeline
    if (unet / "scheduler_config.json").is_file():
        return Source(pipeline, str(unet))
    if not Path(pipeline).is_dir():
        raise UserError(
            f"--base {base}: expected a folder, so that the UNet of {unet} can be put beside its "
            f"other parts; download it: hf download {shlex.quote(str(base))} --local-dir base"
        )
    return Source(str(replace_unet(Path(pipeline), unet, place)))


def open_root(root: Path, place: Path) -> Source:
    """The model of a data root, as its dataset.json says."""
    settings = read_settings(root)
    pipeline = find_model(settings["pipeline"], None, place).pipeline
    lora, side = tuple(settings["lora"]), settings["resolution"]
    return Source(pipeline, settings["unet"], lora, side, settings["weights"])


def list_loras(name: str | Path) -> list[str]:
    """FILE[:WEIGHT] of the LoRA files that a model has by itself: those of a data root."""
    path = Path(name)
    is_root = (path / SETTINGS).is_file() and not (path / INDEX).is_file()
    return read_settings(path)["lora"] if str(name) and is_root else []


def find_base(folder: Path, base: str | Path | None, place: Path) -> Source:
    """What a customized model was customized from. Raises UserError where nothing says it."""
    if base is not None:
        return find_model(base, None, place / "base")
    if (folder / INDEX).is_file():
        return Source(str(complete_folder(folder, place / "base")))
    raise UserError(
        f"--model {folder}: a customized model (custom diffusion), which holds what differs from "
        f"another; give the model that it was customized from: --base MODEL"
    )


def find_snapshot(folder: Path) -> Path:
    """The snapshot of a folder of the hub's cache (models--OWNER--NAME): its main one, else the
    newest; any other folder itself. Raises UserError where it has none."""
    if not folder.name.startswith("models--") or not (folder / "snapshots").is_dir():
        return folder
    main = folder / "refs/main"
    if main.is_file() and (found := folder / "snapshots" / read_text(main).strip()).is_dir():
        return found
    found = [path for path in list_visible(folder / "snapshots") if path.is_dir()]
    if not found:
        raise UserError(f"--model {folder}: a folder of the hub's cache without a snapshot")
    return max(found, key=lambda path: path.stat().st_mtime)


def find_unet(folder: Path) -> Path | None:
    """The folder of a UNet that a training run left: this one, its `unet`, or that of its last
    checkpoint; None where there is none."""
    runs = [path for path in list_visible(folder, "checkpoint-*") if path.name[11:].isdigit()]
    runs.sort(key=lambda path: int(path.name[11:]), reverse=True)
    for place in (folder, folder / "unet", *(run / "unet" for run in runs)):
        config = place / "config.json"
        if config.is_file() and "UNet" in str(read_object(config).get("_class_name")):
            return place
    return None


def read_object(path: Path) -> dict:
    """A JSON object, {} where it is something else."""
    found = read_json(path, "--model")
    return found if isinstance(found, dict) else {}


def explain_folder(folder: Path) -> str:
    """What a folder without a pipeline probably is, and the way on."""
    if (folder / LORA).is_file():
        return explain_lora(folder)
    files = [path for path in list_visible(folder) if path.suffix in FILES_OF_MODELS]
    if len(files) == 1:
        return f"no pipeline in diffusers' format, but one file; give that: --model {files[0]}"
    there = ", ".join(path.name for path in list_visible(folder)[:8]) or "nothing"
    return f"no pipeline in diffusers' format (no {INDEX}); there: {there}"


def find_faults(folder: Path, given: Collection[str] = ()) -> dict[str, Path]:
    """{part: the weights that stand there under other names or in another format than is loaded}, but
    for parts that are given. Raises UserError where a part has none, or a note of git-lfs."""
    index, faults = read_object(folder / INDEX), {}
    for part in WEIGHTS:
        is_named = isinstance(index.get(part), list) and (folder / part).is_dir()
        if not is_named or part in given:
            continue
        path = find_weights(folder, part, f"--model {folder}")
        if not is_ordinary(path, part):
            faults[part] = path
    return faults


def complete_folder(folder: Path, place: Path, given: Collection[str] = ()) -> Path:
    """A pipeline's folder as it is loaded: itself, or one of links, with the weights under their
    ordinary names, as safetensors, and without what is named but not there. given: parts whose weights
    it may lack."""
    index, faults = read_object(folder / INDEX), find_faults(folder, given)
    if find_family(str(index.get("_class_name")), class_names(index)) is None:
        return folder  # refused by name when it is loaded
    absent = find_absent(folder)
    if not faults and not absent:
        return folder
    for part, path in faults.items():
        say(f"{folder}: the {part}'s weights are those of {path.name}")
    index |= {part: [None, None] for part in absent}
    return assemble(folder, place, faults, {}, index)


def replace_unet(pipeline: Path, unet: Path, place: Path) -> Path:
    """A pipeline's folder with another UNet's configuration and weights."""
    found = list_weights(unet.parent, "unet") if unet.name == "unet" else []
    found = found or [
        path
        for suffix in (".safetensors", ".bin")
        for path in list_visible(unet, f"diffusion_pytorch_model*{suffix}")
    ]
    if not found:
        raise UserError(
            f"--model {unet}: a UNet's configuration without weights "
            f"(diffusion_pytorch_model.safetensors)"
        )
    check_pointer(found[0], f"--model {unet}")
    say(f"{unet}: a UNet alone; the other parts are those of {pipeline}")
    index = read_object(pipeline / INDEX)
    return assemble(pipeline, place, {"unet": found[0]}, {"unet": unet}, index)
