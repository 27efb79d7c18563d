"""Whether a pipeline's folder has weights that are loaded as they stand, and the way on where people
have others: a variant's, another format's, a note of git-lfs."""

import re
import shlex
from pathlib import Path

import torch
from safetensors import safe_open

from ..errors import UserError
from ..storage.reading import list_visible, plain_names, read_json

INDEX = "model_index.json"
WEIGHTS = {  # of each part: its weights' name without variant and suffix; others' names of it
    **dict.fromkeys(("unet", "transformer", "vae"), ("diffusion_pytorch_model", ())),
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3"), ("model", ("pytorch_model",))
    ),
}
POINTER = b"version https://git-lfs"
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that no loss asks for


def list_weights(folder: Path, part: str) -> list[Path]:
    """Weight files of a part, best first: whole before a variant's, safetensors before others."""
    stem, others = WEIGHTS[part]
    found = []
    for suffix in (".safetensors", ".bin"):
        for name in (stem, *others):
            found += list_visible(folder / part, f"{name}{suffix}")
            found += list_visible(folder / part, f"{name}{suffix}.index.json")
            found += list_visible(folder / part, f"{name}{suffix}.index.*.json")
            found += list_visible(folder / part, f"{name}.*{suffix}")
    return [path for path in found if not re.search(r"non_ema|-\d{5}-of-\d{5}", path.name)]


def is_ordinary(path: Path, part: str) -> bool:
    """Whether a weight file of a part is one that is loaded as it stands."""
    stem = WEIGHTS[part][0]
    ordinary = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return path.name in ordinary and not is_wrapped(path)


def is_wrapped(path: Path) -> bool:
    """Whether torch.compile or a wrapper has renamed the tensors of a safetensors file."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            names = plain_names(list(file.keys()))
    except Exception:  # a damaged file may raise anything; that it is one its loading tells
        return False
    return any(name != plain for name, plain in names.items())


def check_pointer(path: Path, item: str) -> None:
    """Raises UserError, naming `item`, where a weight file is git-lfs's note of one, or no file."""
    if not path.is_file():  # a folder, a pipe, a link to nothing
        raise UserError(f"{item}: {path.parent.name}/{path.name}: expected a file")
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{item}: {path.name} is git-lfs's note of a file, not the file; in its folder: git "
                f"lfs pull"
            )


def find_weights(folder: Path, part: str, item: str) -> Path:
    """The weights of a part. Raises UserError, naming `item`, where it has none, or a note of
    git-lfs."""
    found = list_weights(folder, part)
    if not found:
        there = ", ".join(path.name for path in list_visible(folder / part)) or "nothing"
        raise UserError(
            f"{item}: its {part} has no weights ({WEIGHTS[part][0]}.safetensors or .bin); there: "
            f"{there}; download it again"
        )
    check_pointer(found[0], item)
    return found[0]


def stored_type(folder: Path, part: str) -> torch.dtype:
    """The precision in which a part's weights stand in its files: half where all of them have the same,
    else float32."""
    name = rf"{WEIGHTS[part][0]}(-\d{{5}}-of-\d{{5}})?\.safetensors"
    kinds = set()
    for path in list_visible(folder / part, "*.safetensors"):
        if re.fullmatch(name, path.name):
            with safe_open(path, "pt") as file:
                kinds |= {file.get_slice(key).get_dtype() for key in file.keys()}
    return HALVES.get(str(kinds.pop()), torch.float32) if len(kinds) == 1 else torch.float32


def find_absent(folder: Path) -> list[str]:
    """Parts that no loss asks for and that a pipeline's index names, without being there."""
    index = read_json(folder / INDEX, "--sd_version")
    return [
        part
        for part in LEFT_OUT
        if isinstance(index.get(part), list) and index[part][0] and not (folder / part).is_dir()
    ]


def check_weights(folder: Path, unet: str = "") -> None:
    """Raises UserError, with the way on, where a pipeline's folder has no weights that are loaded as
    they stand. unet: the folder of a UNet that is used instead of its own, or ""."""
    item = f"--sd_version {folder}"
    for part in WEIGHTS:
        if (part == "unet" and unet) or not (folder / part).is_dir():
            continue
        path = find_weights(folder, part, item)
        if not is_ordinary(path, part):
            raise UserError(
                f"{item}: its {part} has {path.name} alone"
                f"{', as saved compiled or wrapped' if is_wrapped(path) else ''}; make a folder of it "
                f"that is loaded: {convert_command(folder)}"
            )


def convert_command(name: str | Path) -> str:
    """The command that makes a folder that is loaded as it stands of what people have of a model."""
    return f"python -m unlearn convert {shlex.quote(str(name))}"
