"""What there is to say of a model, a data root and a task file before a run:
findings, each with what to do.

Nothing is written and no model is loaded.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from ..attribution.fishers import has_other_images
from ..datasets.conditioning import TEXT
from ..datasets.encoding import check_given, has_given_arrays
from ..datasets.pairs import count_pairs, list_pairs
from ..datasets.preparation import examine_pictures
from ..datasets.settings import read_settings
from ..datasets.tasks import Task, group_by_model, load_tasks
from ..datasets.training_sets import array_paths, open_arrays
from ..errors import UserError
from ..models.checks import check_pipeline, part_name
from ..models.customization import check_tokens
from ..models.families import Family
from ..models.lora import read_files
from ..models.lora_layers import check_family
from ..models.model import trained_resolution
from ..models.parts import Parts, class_names, family_of, read_index, read_parts
from ..models.unets import check_unet_folder
from ..storage.reading import read_json
from ..storage.records import check_content, record_path
from .advice import encode_command, fisher_command
from .inputs import find_fisher
from .machine import NOTE, OK, PROBLEM, Finding, try_out


def pipeline_folder(name: str | Path) -> Path | None:
    """Where the files of a pipeline stand on this machine, what is there under this name or the hub's
    cache; None where they do not. Raises ValueError where it is neither there nor a name on the
    hub."""
    if Path(name).exists():
        return Path(name)
    cached = try_to_load_from_cache(str(name), "model_index.json")
    return Path(cached).parent if isinstance(cached, str) else None


def examine_pipeline(name: str, unet: str) -> Finding:
    """Whether the pipeline is there: a folder, or a hub name whose files are in the cache; and
    whether its parts, by their configurations, are of a known kind and fit each other. unet: the
    data root's own, or ""."""
    try:
        folder = pipeline_folder(name)
    except ValueError:
        return Finding(
            PROBLEM,
            f"pipeline {name}: neither a folder nor a name on the hub",
            "give --sd_version one of them",
        )
    if folder is None:
        return Finding(
            NOTE,
            f"pipeline {name}: not in the hub's cache; it is downloaded at first use",
            f"where nodes have no network: hf download {name}",
        )
    where = f"pipeline {name}" + ("" if Path(name).exists() else ", in the hub's cache")
    # Of the cache only some of the files may be there: they are looked at when the model is loaded.
    if not Path(name).exists() and not has_all_parts(folder):
        return Finding(OK, where)
    return (
        (unet and try_out(check_unet_folder, unet)[1])
        or try_out(check_pipeline, folder, unet)[1]
        or Finding(OK, where)
    )


def has_all_parts(folder: Path) -> bool:
    """Whether every part that a pipeline of its family must have is in a folder; also where it is
    of no family, so that this is told."""
    index, _ = try_out(read_index, folder)
    if not isinstance(index, dict):
        return False
    family, problem = try_out(family_of, folder, index)
    parts = [] if problem else family.parts(class_names(index))
    return all((folder / part).exists() for part in parts)


def examine_resolution(name: str, settings: dict) -> list[Finding]:
    """Whether pictures are brought to the size that the model was trained on, as far as its
    configuration is there to be read."""

    def read_config(file: str) -> Any:
        if file.startswith("unet/") and settings["unet"]:
            return read_json(Path(settings["unet"]) / "config.json", file)
        is_folder = Path(name).is_dir()
        place: Any = Path(name) / file if is_folder else try_to_load_from_cache(name, file)
        return read_json(place, file)

    try:
        family = family_of(name, read_config("model_index.json"))
        configs = [read_config(f"{part}/config.json") for part in (family.denoiser, "vae")]
    except (UserError, ValueError, TypeError, AttributeError):  # told by `examine_pipeline`
        return []
    if not all(isinstance(config, dict) for config in configs):
        return []
    own, used = trained_resolution(family, *configs), settings["resolution"]
    if used and own and used != own:
        return [
            Finding(
                NOTE,
                f"pictures are brought to {used} x {used} pixels, as dataset.json says; the "
                f"model was trained on {own} x {own}",
            )
        ]
    return (
        []
        if own or used
        else [
            Finding(
                PROBLEM,
                f"the {part_name(family)}'s config.json has no sample_size",
                "give `resolution` in dataset.json",
            )
        ]
    )


def examine_fisher(args: Namespace) -> Finding:
    """The Fisher that compute_influence.py would take; removal needs none."""
    path, problem = try_out(find_fisher, args)
    if problem and not args.fisher_path:
        return Finding(
            NOTE,
            f"{args.dataroot}: no Fisher; unlearning needs one, --scoring removal does not",
            f"make it: {fisher_command(args)}",
        )
    if problem or not record_path(path).exists() or path.suffix != ".safetensors":
        return problem or Finding(
            NOTE, f"Fisher {path}: without a record; nothing says for which model it was made"
        )
    remedy = f"make it anew: {fisher_command(args, path, overwrite=True)}"
    if problem := try_out(check_content, path, remedy)[1]:
        return problem
    if not all(array.exists() for array in array_paths(args.dataroot)):
        return Finding(
            OK,
            f"Fisher {path}; whether it is of these training images is told once they are encoded",
        )
    is_other, problem = try_out(has_other_images, path, args.dataroot, args.laion_subset_size)
    if is_other:
        return Finding(
            NOTE,
            f"Fisher {path}: was made from other training images than those of {args.dataroot}",
            remedy,
        )
    return Finding(OK, f"Fisher {path}")


def check_shapes(dataroot: str | Path, parts: Parts | None, resolution: int) -> None:
    """Raises UserError where latents and embeddings cannot be opened, or have other shapes than a
    model of these Parts (None: not known) makes."""
    latents, embeddings = open_arrays(dataroot)[:2]
    if parts is None or parts.classes["vae"] not in parts.family.classes["vae"]:
        return
    family = parts.family
    if (pixels := family.pixels_a_latent(parts.vae)) is None:
        return
    size = resolution // pixels
    text = family.shapes(parts)[TEXT]
    if None in text:
        return
    shapes = (family.latent_channels(parts), size, size), text
    for path, array, shape in zip(array_paths(dataroot), (latents, embeddings), shapes):
        if array.shape[array.ndim - len(shape) :] != shape:
            raise UserError(
                f"{path}: expected rows {list(shape)} of this model, found {list(array.shape)}"
            )


def examine_training_set(args: Namespace, parts: Parts | None, resolution: Any) -> Finding:
    """Images, captions, latents and embeddings of a data root, and whether these are such as a
    model of these Parts (None: not known) makes."""
    dataroot = args.dataroot
    given = has_given_arrays(dataroot)
    pairs, problem = ([], None) if given else try_out(list_pairs, dataroot)
    if problem := problem or try_out(check_given, dataroot, encode_command(args))[1]:
        return problem
    made = all(path.exists() and record_path(path).exists() for path in array_paths(dataroot))
    _, problem = (
        try_out(check_shapes, dataroot, parts, resolution) if given or made else (None, None)
    )
    if given:
        return problem or Finding(
            OK, f"{len(open_arrays(dataroot)[1])} training images, latents and embeddings given"
        )
    count = count_pairs(dataroot)
    left_out = (
        f" ({len(pairs[0]) - count} left out, which cannot be read)"
        if count < len(pairs[0])
        else ""
    )
    if made and not problem:
        return Finding(OK, f"{count} training images{left_out}, encoded")
    return Finding(
        NOTE,
        f"{count} training images{left_out}, to be encoded "
        f"{f'anew at the next use: {problem.text}' if problem else 'at first use'}",
        f"ahead of time, by one process: {encode_command(args)}",
    )


def examine_lora(name: str, family: Family | None) -> Finding:
    """A LoRA by its file, and whether it is of the model's family where that is known: whether it
    fits the model shows when that is loaded."""
    found, problem = try_out(lambda: read_files([name], is_fused=False))
    if problem:
        return problem
    [lora] = found
    _, problem = try_out(check_family, lora, family) if family else (None, None)
    if problem:
        return problem
    parts = sorted({part for part, _ in lora.pairs})
    return Finding(OK, f"--lora {name}: changes {len(lora.pairs)} layers of {' and '.join(parts)}")


def examine_data(args: Namespace) -> tuple[list[Finding], bool]:
    """A data root: (its findings, that of the training set first, whether it can be read at
    all)."""
    settings, problem = try_out(read_settings, args.dataroot)
    if not Path(args.dataroot).is_dir():
        problem = Finding(
            PROBLEM,
            f"--dataroot {args.dataroot}: no such folder",
            "see the README on downloading the data",
        )
    if problem:
        return [problem], False
    pipeline, unet = args.sd_version or settings["pipeline"], settings["unet"]
    found = examine_pipeline(pipeline, unet)
    parts = read_parts(pipeline, unet) if found.status == OK and Path(pipeline).is_dir() else None
    resolution = settings["resolution"] or (
        parts and trained_resolution(parts.family, parts.denoiser, parts.vae)
    )
    family = parts.family if parts else None
    loras = [examine_lora(name, family) for name in args.lora or settings["lora"]]
    return [
        examine_training_set(args, parts if resolution else None, resolution),
        found,
        *loras,
        *examine_resolution(pipeline, settings),
        examine_fisher(args),
    ], True


def examine_tasks(args: Namespace) -> tuple[list[Finding], dict[str | None, list[Task]]]:
    """A task file: (its findings, its tasks by model)."""
    tasks, problem = try_out(load_tasks, args.task_json, args.dataroot)
    groups, problem = ({}, problem) if problem else try_out(group_by_model, tasks)
    if problem:
        return [problem], {}
    pipeline = args.sd_version or read_settings(args.dataroot)["pipeline"]
    checks = [
        try_out(check_tokens, group[0].model_dir(args.dataroot), group, pipeline)[1]
        for group in groups.values()
    ]
    pictures = [try_out(examine_pictures, group, args.dataroot) for group in groups.values()]
    findings = [
        *filter(None, checks),
        *(problem for _, problem in pictures if problem),
        *(Finding(NOTE, note) for notes, _ in pictures for note in notes or []),
    ]
    return [
        Finding(OK, f"{args.task_json}: {len(tasks)} queries of {len(groups)} models"),
        *findings,
    ], groups
