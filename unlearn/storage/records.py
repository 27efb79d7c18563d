"""Records: what says how an artefact was made.

Beside an artefact `NAME.npy` stands its record `NAME.json`: `identity` (must match wherever the
artefact is used), `circumstances` (reported, never refused) and `content`, a hash of the artefact.
The record is written last, so that its existence means that the artefact is complete.
"""

import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..errors import NotThere, UserError
from ..version import __version__
from .artifacts import write_json
from .hashes import hash_file
from .reading import read_json

FORMAT_VERSION = 1
HASH = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}")
# what this run was given, by kind (model, data root, Fisher): a record that tells hashes alone
# explains nothing
NAMES = {}
WEIGHTS = {"weights", "initial_weights"}  # fields of an identity that depends on a model's weights
# What a field of an identity is, in words, and under which kind its name is known.
MEANINGS = {
    "format_version": ("version of these files", None),
    "weights": ("weights of the model", "model"),
    "lora": ("LoRA, or its weight", "model"),
    "weights_precision": ("precision of the weights", "model"),
    "schedule": ("noise schedule of the model", "model"),
    "density": ("how often training takes each noise level", "model"),
    "loss_weight": ("weight of each noise level in training's loss", "model"),
    "guidance": ("guidance that the model is told in training", "model"),
    "noise_schedule": ("noise schedule of the model", "model"),
    "prediction_type": ("what the model predicts", "model"),
    "unet": ("configuration of the UNet", "model"),
    "initial_weights": ("weights before training", "model"),
    "vae": ("weights of the VAE", "model"),
    "text_encoder": ("weights of the text encoder", "model"),
    "text_encoder_2": ("weights of the second text encoder", "model"),
    "text_encoder_3": ("weights of the third text encoder", "model"),
    "tokens": ("tokens of the captions", "data root"),
    "tokens_2": ("tokens of the captions for the second text encoder", "data root"),
    "tokens_3": ("tokens of the captions for the third text encoder", "data root"),
    "scaling": ("scaling of the VAE's latents", "model"),
    "images": ("pictures of the training set", "data root"),
    "captions": ("captions of the training set", "data root"),
    "num_captions": ("captions an image", "data root"),
    "left_out": ("pictures that were left out", "data root"),
    "resolution": ("pixels of a picture's side", "data root"),
    "dataset": ("name of the data set", "data root"),
    "num_images": ("number of training images", "data root"),
    "training_set": ("training images, their order and what they were encoded by", "data root"),
    "candidates": ("images that were ranked", "data root"),
    "exemplars": ("pictures of the exemplars", "data root"),
    "query": ("query: its picture, prompt or stored latent", "query"),
    "queries": ("queries: their pictures, prompts, seeds", "data root"),
    "query_seed": ("seed that the query was made with", "query"),
    "prompts": ("prompts", None),
    "first_seed": ("seed of the first prompt", None),
    "fisher": ("Fisher, or its damping", "Fisher"),
    "fit_images": ("images that an index is fitted to", None),
    "weight_change": ("weight change that was scored", None),
    "losses_before": ("losses before unlearning", None),
    "settings": ("settings", None),
    "scores": ("scores", None),
    "method": ("method", None),
    "features": ("model of the features", None),
    "image_features": ("features of the training images", None),
    "timestep_number": ("which of the timesteps", None),
    "readings": ("how pictures that are not plain are read", "data root"),
    "cosines": ("how features are centred", None),
    "gradients": ("how the gradients of an image's samples are averaged", None),
    "mucs_rate": ("learning rate of bounded unlearning", None),
    "mucs_steps": ("its steps at most", None),
    "mucs_batch": ("training images, and copies of the query, of its step", None),
    "mucs_draws": ("noise draws that images are scored by", None),
    "patch_size": ("side of a patch of latents", None),
    "patch_timestep": ("timestep of the noise on patches", None),
    "function": ("function whose gradients are taken", None),
    "noise": ("how noise is drawn", None),
    "noise_device": ("device that draws noise", None),
    "known_answer": ("numbers that NumPy draws", None),
    "noise_seed": ("seed of the noise", None),
    "seed": ("seed", None),
    "draws": ("how unlearning draws noise", None),
    "batch_size": ("samples a batch", None),
    "timesteps": ("timesteps of the noise", None),
    "time_samples": ("timesteps of the loss's grid", None),
    "precision": ("arithmetic", None),
    "mixed_precision": ("arithmetic of training", None),
    "compat": ("the published program's arithmetic", None),
    "scoring": ("way of scoring", None),
    "probes": ("random probes a sample", None),
    "shortlist": ("images of the index's shortlist", None),
    "audit": ("other images that are scored to check it", None),
    "audited": ("how those are chosen", None),
    "views": ("how an image's score follows from its views", None),
    "weight_selection": ("weights that are selected", None),
    "unread": ("selected weights on which no prediction depends", None),
    "curvature": ("kind of curvature", None),
    "damping": ("added to the Fisher", None),
    "num_train": ("N of the Newton update", None),
    "unlearn_lr": ("alpha of the Newton update", None),
    "target_change": ("change of the weights that the step is chosen for", None),
    "unlearn_steps": ("Newton steps", None),
    "unlearn_batch_size": ("noise draws of a Newton step", None),
    "unlearn_grad_accum_steps": ("a factor of them", None),
    "num_samples": ("gradient samples", None),
    "sketch_size": ("numbers that a gradient is sketched to", None),
    "projection_size": ("numbers that a gradient is projected to", None),
    "trak_lambda": ("ridge of the kernel", None),
    "num_inference_steps": ("sampling steps of a picture", None),
    "guidance_scale": ("classifier-free guidance", None),
    "epochs": ("passes over the training set", None),
    "box": ("box of the query's picture that counts", None),
    "ridge": ("ridge of the inverse, of a row's mean squared norm", None),
    "repeats": ("how often an epoch sees each image", "data root"),
    "rate": ("learning rate", None),
    "optimizer": ("optimizer", None),
    "warmup": ("steps before the full learning rate", None),
    "members": ("images that the model was trained on", None),
    "start": ("trained UNet that training starts from", "data root"),
    "lora_rank": ("rank of the LoRA that was trained", None),
    "lora_alpha": ("alpha of the LoRA that was trained", None),
    "lora_targets": ("layers that the LoRA changes", None),
    "recipe": ("how the model was trained", None),
}


def record_path(path: str | Path) -> Path:
    """Where the record of an artefact stands: `loss.npy` -> `loss.json`."""
    path = Path(path)
    return path.with_suffix(".json") if path.name else path / ".json"  # of / there is none


def circumstances(device: torch.device | str | None = None) -> dict:
    """What is reported of a run but never refused: versions, git commit, device, time."""
    root = Path(__file__).parent.parent.parent
    git = (
        subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True)
        if (root / ".git").exists()
        else None
    )
    return {
        "unlearn": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "git_commit": git.stdout.strip() if git and git.returncode == 0 else None,
        "names": dict(NAMES),
        "device": torch.cuda.get_device_name(device)
        if device and torch.device(device).type == "cuda"
        else str(device),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def name_input(kind: str, name: object) -> None:
    """Tells the records that are written from here on what an input, that they know by a hash, is
    called."""
    NAMES[kind] = str(name)


@contextmanager
def named_input(kind: str, name: object) -> Iterator[None]:
    """`name_input` for a while."""
    before = NAMES.get(kind)
    name_input(kind, name)
    try:
        yield
    finally:
        name_input(kind, before)


def names_of(record: dict) -> dict:
    """What a record calls the inputs that it was made from, {} where it does not say."""
    found = record.get("circumstances")
    names = found.get("names") if isinstance(found, dict) else None
    return names if isinstance(names, dict) else {}


def names_of_file(path: str | Path) -> dict:
    """`names_of` the record of an artefact."""
    return names_of(read_record(path, ""))


def tell_name(path: str | Path, kind: str) -> str:
    """What the record of an artefact calls one of its inputs."""
    return names_of_file(path).get(kind) or f"another {kind}"


def is_opaque(value: object) -> bool:
    """Whether a value of an identity holds a hash, which says nothing to anybody."""
    if isinstance(value, dict):
        return any(map(is_opaque, value.values()))
    return (
        any(map(is_opaque, value))
        if isinstance(value, list)
        else isinstance(value, str) and bool(HASH.fullmatch(value))
    )


def explain_difference(field: str, found: object, expected: object, then: dict, now: dict) -> str:
    """How two values of an identity's field differ, in words. then, now: names of the inputs that
    they were made from, by kind."""
    if isinstance(found, dict) and isinstance(expected, dict):
        name = next(
            (name for name in {**expected, **found} if found.get(name) != expected.get(name)), None
        )
        return explain_difference(
            name if name in MEANINGS else field, found.get(name), expected.get(name), then, now
        )
    words, kind = MEANINGS.get(field, (field, None))
    if not is_opaque(found) and not is_opaque(expected):
        return f"{field} is {found!r:.200}, expected {expected!r:.200} ({words})"
    if found is None or expected is None:
        return (
            f"other {words} ({'none' if found is None else 'some'}, expected "
            f"{'none' if expected is None else 'some'})"
        )
    before, after = then.get(kind), now.get(kind)
    if before and after and before != after:
        return f"other {words}: that of {before}, expected that of {after}"
    return (
        f"other {words}: {after or before} has changed since"
        if after or before
        else f"other {words}"
    )


def write_record(
    path: str | Path,
    identity: dict,
    device: torch.device | str | None = None,
    content: str | None = None,
    found: dict | None = None,
) -> None:
    """Writes the record of a complete artefact, whose hash `content` is where it is known already.
    found: what else is reported of it, beside the circumstances."""
    write_json(
        record_path(path),
        {
            "identity": {"format_version": FORMAT_VERSION, **identity},
            "circumstances": {**circumstances(device), **(found or {})},
            "content": content or hash_file(path),
        },
    )


def is_complete(path: str | Path) -> bool:
    """Whether an artefact and its record are there."""
    return Path(path).exists() and record_path(path).exists()


def keep_complete(path: str | Path, identity: dict, overwrite: bool, remedy: str) -> bool:
    """Whether a complete artefact made with these settings is there and is to be kept. Raises
    UserError where what is there was made with others and may not be overwritten. One without a
    record was killed before it was complete, or another process is making it."""
    try:
        check_record(path, identity, remedy)
    except NotThere:
        return False
    except UserError:
        if not overwrite:
            raise
        return False
    return True


def compare_identity(
    path: str | Path, expected: dict, found: dict, remedy: str, names: dict | None = None
) -> None:
    """Raises UserError naming the first identity field in which the artefact's record differs from
    what is expected. names: see `names_of`."""
    # Said only where it is not fp32: of an expected model whose weights are, it must be so.
    told = {"weights_precision": "fp32"} if expected.keys() & WEIGHTS else {}
    for field, value in {"format_version": FORMAT_VERSION, **told, **expected}.items():
        there = found.get(field, told.get(field))
        if there != value:
            reason = explain_difference(field, there, value, names or {}, NAMES)
            raise UserError(f"{path}: made with other settings: {reason}; {remedy}")


def read_record(path: str | Path, remedy: str) -> dict:
    """The record of an artefact. Raises UserError, ending with `remedy`, where one of them is
    missing (NotThere) or it is malformed."""
    if not Path(path).exists():
        raise NotThere(f"{path}: no such file; {remedy}")
    if not record_path(path).exists():
        raise NotThere(
            f"{path}: has no record ({record_path(path).name}) that says how it was made; {remedy}"
        )
    try:
        record = read_json(record_path(path), "record")
    except UserError as error:
        raise type(error)(f"{error}; {remedy}") from None
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise UserError(f"{record_path(path)}: not a record; {remedy}")
    return record


def check_content(path: str | Path, remedy: str, record: dict | None = None) -> None:
    """Checks an artefact against the hash in its record. Raises UserError, ending with `remedy`,
    where it was changed."""
    record = record or read_record(path, remedy)
    try:
        content = hash_file(path)
    except FileNotFoundError:
        raise NotThere(f"{path}: no such file; {remedy}") from None
    if record.get("content") != content:
        raise UserError(
            f"{path}: its content is not what its record says (damaged or replaced); {remedy}"
        )


def check_record(path: str | Path, expected: dict, remedy: str) -> None:
    """Checks an artefact against its record: identity field by field, then the hash of its content.

    Raises UserError where the record is missing or malformed, a field differs, or the content was
    changed; the message ends with `remedy`.
    """
    record = read_record(path, remedy)
    compare_identity(path, expected, record["identity"], remedy, names_of(record))
    check_content(path, remedy, record)


def check_unrecorded(path: str | Path, identity: dict, overwrite: bool, remedy: str) -> None:
    """Raises UserError where something without a record stands at `path` and may not be replaced.
    To be asked where no parts of it stand beside it: with them it was killed before its record."""
    if Path(path).exists() and not record_path(path).exists() and not overwrite:
        check_record(path, identity, remedy)
