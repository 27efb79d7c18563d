"""Records: what says how an artefact was made.

Beside an artefact `NAME.npy` stands its record `NAME.json`: `identity` (must match wherever the artefact is used),
`circumstances` (reported, never refused) and `content`, a hash of the artefact. The record is written last, so that
its existence means that the artefact is complete.
"""

import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from . import UserError, __version__
from .artifacts import write_json
from .hashes import hash_file
from .reading import read_json

FORMAT_VERSION = 1


def record_path(path):
    """Where the record of an artefact stands: `loss.npy` -> `loss.json`."""
    return Path(path).with_suffix(".json")


def circumstances(device=None):
    """What is reported of a run but never refused: versions, git commit, device, time."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True) if (root / ".git").exists() else None
    return {"unlearn": __version__, "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
            "git_commit": git.stdout.strip() if git and git.returncode == 0 else None,
            "device": torch.cuda.get_device_name(device) if device and torch.device(device).type == "cuda" else str(device),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def write_record(path, identity, device=None, content=None, found=None):
    """Writes the record of a complete artefact, whose hash `content` is where it is known already. found: what else is reported
    of it, beside the circumstances."""
    write_json(record_path(path), {"identity": {"format_version": FORMAT_VERSION, **identity},
                                   "circumstances": {**circumstances(device), **(found or {})}, "content": content or hash_file(path)})


def is_complete(path):
    """Whether an artefact and its record are there."""
    return Path(path).exists() and record_path(path).exists()


def keep_complete(path, identity, overwrite, remedy):
    """Whether a complete artefact made with these settings is there and is to be kept. Raises UserError where what is
    there was made with others and may not be overwritten. One without a record was killed before it was complete."""
    if not is_complete(path):
        return False
    try:
        check_record(path, identity, remedy)
    except UserError:
        if not overwrite:
            raise
        return False
    return True


def compare_identity(path, expected, found, remedy):
    """Raises UserError naming the first identity field in which the artefact's record differs from what is expected."""
    for field, value in {"format_version": FORMAT_VERSION, **expected}.items():
        if found.get(field) != value:
            raise UserError(f"{path}: made with other settings: {field} is {found.get(field)!r}, expected {value!r}; {remedy}")


def read_record(path, remedy):
    """The record of an artefact. Raises UserError, ending with `remedy`, where one of them is missing or it is malformed."""
    if not Path(path).exists():
        raise UserError(f"{path}: no such file; {remedy}")
    if not record_path(path).exists():
        raise UserError(f"{path}: has no record ({record_path(path).name}) that says how it was made; {remedy}")
    try:
        record = read_json(record_path(path), "record")
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from None
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise UserError(f"{record_path(path)}: not a record; {remedy}")
    return record


def check_content(path, remedy, record=None):
    """Checks an artefact against the hash in its record. Raises UserError, ending with `remedy`, where it was changed."""
    if (record or read_record(path, remedy)).get("content") != hash_file(path):
        raise UserError(f"{path}: its content is not what its record says (damaged or replaced); {remedy}")


def check_record(path, expected, remedy):
    """Checks an artefact against its record: identity field by field, then the hash of its content.

    Raises UserError where the record is missing or malformed, a field differs, or the content was changed; the message
    ends with `remedy`.
    """
    record = read_record(path, remedy)
    compare_identity(path, expected, record["identity"], remedy)
    check_content(path, remedy, record)
