"""How LoRA files are named on a command line: FILE_OR_FOLDER[:WEIGHT]."""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..storage.reading import list_visible

SUFFIX, USUAL_NAME = ".safetensors", "pytorch_lora_weights.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Named:
    """A LoRA as it is asked for."""

    path: Path
    weight: float  # what its change is multiplied by

    def __str__(self) -> str:
        return f"{self.path}:{self.weight:g}"


def parse_name(text: str) -> Named:
    """The LoRA that FILE_OR_FOLDER[:WEIGHT] names. Raises UserError where there is no such file, it
    is no safetensors file, or the weight is none."""
    path, weight = text, 1.0
    head, colon, tail = text.rpartition(":")
    if colon and head and not Path(text).exists():
        try:
            path, weight = head, float(tail)
        except ValueError:
            pass
    if not math.isfinite(weight) or weight == 0:
        raise UserError(
            f"--lora {text}: expected a weight other than 0, such as {path}:0.8, found {tail}"
        )
    return Named(find_file(path), weight)


def find_file(name: str) -> Path:
    """The safetensors file that a path is or, of a folder, holds. Raises UserError, with the way
    on, where there is none."""
    path = Path(name)
    if not name or not path.exists():
        raise UserError(f"--lora {name or repr(name)}: no such file or folder")
    if path.is_dir():
        found = [path / USUAL_NAME] if (path / USUAL_NAME).is_file() else []
        found = found or list_visible(path, f"*{SUFFIX}")
        if len(found) > 1:
            names = ", ".join(each.name for each in found[:5])
            raise UserError(
                f"--lora {path}: has {len(found)} such files ({names}); name one of them"
            )
        if not found:
            others = [each for each in list_visible(path) if each.suffix in PICKLES]
            if others:
                return find_file(str(others[0]))
            raise UserError(f"--lora {path}: holds no {SUFFIX} file")
        path = found[0]
    if path.suffix in PICKLES:
        raise UserError(
            f"--lora {path}: a pickle, which may run code when it is opened; where you trust it, "
            f"make it a {SUFFIX} file: {convert_command(path)}"
        )
    if path.suffix != SUFFIX:
        raise UserError(f"--lora {path}: expected a {SUFFIX} file, or a folder with one")
    return path


def convert_command(path: Path) -> str:
    """What makes a safetensors file of a torch file, without running code in it."""
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"save_file({{k: v.contiguous() for k, v in torch.load({str(path)!r}, map_location='cpu', "
        f"weights_only=True).items()}}, {str(path.with_suffix(SUFFIX))!r})"
    )
    return f"python -c {shlex.quote(code)}"
