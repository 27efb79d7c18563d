"""What there is to say of a machine, an environment, a data root and a task file before a run:
findings, each with what to do.

Nothing is written and no model is loaded.
"""

import os
import platform
import shutil
import tomllib
from argparse import Namespace
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from huggingface_hub import try_to_load_from_cache
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .. import noise
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
from ..runtime.programs import choose_device
from ..storage.reading import read_json
from ..storage.records import check_content, record_path
from .advice import encode_command, fisher_command
from .inputs import find_fisher

OK, NOTE, PROBLEM = "ok", "note", "problem"
PYPROJECT = Path(__file__).parent.parent.parent / "pyproject.toml"
LITTLE_DISK = 2 << 30  # bytes


class Finding(NamedTuple):
    """OK, NOTE (nothing that must be put right) or PROBLEM; what was found; what to do about it, ""
    where nothing."""

    status: str
    text: str
    remedy: str = ""


def try_out(function: Callable[..., Any], *args: Any) -> tuple[Any, Finding | None]:
    """(what a function gives, None), or (None, the PROBLEM it raised as UserError, which says what
    to do)."""
    try:
        return function(*args), None
    except UserError as error:
        return None, Finding(PROBLEM, " ".join(str(error).split()))


def read_requirements() -> tuple[str, list[Requirement]]:
    """(range of Python, requirements): of pyproject.toml in a checkout, else of the installed
    package, which has no such file."""
    if PYPROJECT.is_file():
        project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], list(map(Requirement, project["dependencies"]))
    installed = metadata("unlearn")
    return installed["Requires-Python"], [
        each
        for each in map(Requirement, installed.get_all("Requires-Dist", []))
        if not each.marker or each.marker.evaluate({"extra": ""})
    ]


def examine_environment() -> list[Finding]:
    """Python, the packages that this one asks for, and whether NumPy still draws the noise that
    caches were made with."""
    (python, requirements) = read_requirements()
    found = [f"Python {platform.python_version()}"]
    findings = []
    if platform.python_version() not in SpecifierSet(python):
        findings.append(
            Finding(
                PROBLEM,
                f"Python {platform.python_version()}: expected {python}",
                "micromamba create -f env.yml",
            )
        )
    for requirement in requirements:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            findings.append(
                Finding(
                    PROBLEM,
                    f"{requirement.name}: expected {requirement.specifier}, found "
                    f"{installed or 'none'}",
                    f"python -m pip install '{requirement}'",
                )
            )
        else:
            found.append(f"{requirement.name} {installed}")
    if (answer := noise.known_answer()) != noise.KNOWN_ANSWER:
        findings.append(
            Finding(
                PROBLEM,
                f"NumPy draws other noise than caches were made with: {answer}, expected "
                f"{noise.KNOWN_ANSWER}",
                "use the NumPy of pyproject.toml's `tested`, or make every cache anew",
            )
        )
    return [Finding(OK, ", ".join(found)), *findings]


def examine_device(name: str | None) -> list[Finding]:
    """The device that a run would take, its memory or cores."""
    device, problem = try_out(choose_device, name)
    if problem:
        return [problem]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        text = (
            f"{device}: {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of "
            f"{total / 1e9:.1f} GB free"
        )
        return [
            Finding(OK, text)
            if free > total / 2
            else Finding(NOTE, text, "another program uses it: nvidia-smi names it")
        ]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    findings = [Finding(OK, f"cpu, {torch.get_num_threads()} threads on {cores} cores")]
    if torch.get_num_threads() > cores:
        findings.append(
            Finding(
                NOTE, "more threads than cores slow each other", f"export OMP_NUM_THREADS={cores}"
            )
        )
    if name is None and shutil.which("nvidia-smi"):
        findings.append(
            Finding(
                NOTE,
                f"there is an NVIDIA driver, but torch {torch.__version__} (built for "
                f"{f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs'}) sees no device",
                "install torch for CUDA; in a SLURM job, ask for a GPU (--gres=gpu:1)",
            )
        )
    return findings


def memory_limit() -> int:
    """Bytes of memory that this process may use at most: the machine's, or less in a container or a
    SLURM job."""
    limits = [psutil.virtual_memory().total]
    for path in "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes":
        if os.path.exists(path) and (text := Path(path).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def examine_memory(pipeline: str | Path | None) -> list[Finding]:
    """Memory, and whether a local pipeline's weights, made float32, fit into it."""
    available, total = psutil.virtual_memory().available, memory_limit()
    needed = (
        2 * sum(path.stat().st_size for path in Path(pipeline).glob("*/*.safetensors"))
        if pipeline and Path(pipeline).is_dir()
        else 0
    )
    text = f"{min(available, total) / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if needed > min(available, total):
        return [
            Finding(
                PROBLEM,
                f"{text}; the weights of {pipeline} may need {needed / 1e9:.1f} GB",
                "ask for more (SLURM: --mem)",
            )
        ]
    return [Finding(OK, text)]


def examine_disk(
    folders: dict[str, str], remedies: dict[str, str] | None = None, only_read: Collection[str] = ()
) -> list[Finding]:
    """Free space where a run writes, {what: folder}, and whether it may write there. remedies:
    {what: what to do where it may not}, if not to give another folder; only_read: what of these
    nothing is to be written in."""
    findings = []
    for item, folder in folders.items():
        place = Path(folder).absolute()
        while not place.is_dir() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        text = f"{item} {folder}: {free / 1e9:.1f} GB free"
        if not os.access(place, os.W_OK | os.X_OK) and item in only_read:
            findings.append(
                Finding(OK, f"{item} {folder}: cannot be written, and nothing has to be")
            )
        elif not os.access(place, os.W_OK | os.X_OK):
            findings.append(
                Finding(
                    PROBLEM,
                    f"{text}, but no permission to write in {place}",
                    (remedies or {}).get(item, "give another folder"),
                )
            )
        else:
            findings.append(
                Finding(OK, text)
                if free > LITTLE_DISK
                else Finding(NOTE, text, "make room: a run that fills the disk stops")
            )
    return findings


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
