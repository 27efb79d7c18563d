"""What doctor looks at of the machine: packages, device, memory and disk."""

import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Collection
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .. import noise
from ..errors import UserError
from ..runtime.programs import choose_device

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
