"""A customized model in the one file of its authors' training program (`delta.bin`: a UNet's changed
weights and new tokens), put into a folder as every command reads it."""

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..models.customization import CUSTOMIZED_WEIGHTS, TOKEN
from ..runtime.programs import say
from ..storage.artifacts import write_tensors
from ..storage.hashes import digest
from ..storage.reading import check_tensors, holds_safetensors, load_tensors

PARTS = {"unet", "modifier_token"}


def read_delta(path: Path) -> dict[str, Any] | None:
    """What a customized model's file holds by part; None where a file is something else, which its own
    reading tells."""
    if not path.is_file() or holds_safetensors(path):
        return None
    try:
        found = load_tensors(path)
    except Exception:  # a damaged or hostile file may raise anything
        return None
    return found if isinstance(found, dict) and PARTS <= found.keys() else None


def unpack_delta(path: Path, found: dict[str, Any], place: Path) -> Path:
    """The folder of a customized model, made once of what its file holds. Raises UserError, by name, where
    that is more than a UNet's weights and one embedding for each token."""
    named = f"--model {path}: a customized model (custom diffusion)"
    weights, tokens = found["unet"], found["modifier_token"]
    if more := sorted(map(str, found.keys() - PARTS)):
        raise UserError(
            f"{named} with {more[0]:.60}, which was trained too; such models are not read so far: "
            f"supported are those of K, V and tokens"
        )
    if isinstance(tokens, dict) and any(isinstance(each, list) for each in tokens.values()):
        raise UserError(
            f"{named} of Stable Diffusion XL (its tokens have an embedding for each of two text "
            f"encoders); supported are those of Stable Diffusion 1 and 2"
        )
    if isinstance(weights, dict) and any(isinstance(each, dict) for each in weights.values()):
        raise UserError(f"{named} that was compressed; give the file that it was compressed from")
    for tensors in (weights, tokens):
        check_tensors(path, "--model", tensors)
    if odd := [token for token in tokens if not TOKEN.fullmatch(token)]:
        raise UserError(f"{named}: {odd[0]!a:.80}: expected new tokens such as <new1>")
    status = path.stat()
    target = place / f"{path.stem}-{digest(str(path), status.st_size, status.st_mtime_ns)[:8]}"
    last = target / CUSTOMIZED_WEIGHTS[1]
    if not last.is_file():
        say(f"{path}: a customized model in one file; it becomes a folder once, {target}")
        target.mkdir(parents=True, exist_ok=True)
        for token, vector in tokens.items():
            write_tensors(target / f"{token}.safetensors", {token: own(vector)})
        write_tensors(last, {name: own(value) for name, value in weights.items()})
    return target


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in memory of its own, as safetensors must be written from."""
    return tensor.detach().contiguous().clone()
