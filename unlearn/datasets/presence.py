"""Whether what is named is there: all that can be told before libraries are imported that take seconds,
so this module imports none."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

HUB = "hf:"  # before the name of a data set on the hub
FILES_OF_MODELS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
FILES_OF_OTHERS = (".gguf", ".onnx", ".zip", ".tar", ".7z")


def check_pictures(pictures: Iterable[str | Path]) -> None:
    """Raises UserError where a picture is not there, or is a folder."""
    for name in pictures:
        path = Path(name)
        if path.is_dir():
            raise UserError(
                f"{path}: expected a picture, found a folder; name the pictures in it, such as "
                f"{path}/*.png"
            )
        if not path.exists():
            raise UserError(f"image {path}: no such file")


def check_images(folder: str | Path) -> None:
    """Raises UserError where training images are in no folder, or in an empty one."""
    if str(folder).startswith(HUB):
        return
    path = Path(folder)
    if not path.is_dir():
        what = "a file; unpack it" if path.exists() else "no such folder"
        raise UserError(f"{folder}: expected a folder of pictures, found {what}")
    with suppress(OSError):  # told by name when it is read
        if not any(path.iterdir()):
            raise UserError(
                f"{folder}: no pictures, the folder is empty; give the folder of all images that "
                f"the model was trained on"
            )


def check_model(name: str | Path) -> None:
    """Raises UserError where a model is not there, and its name can be none on the hub."""
    if not str(name):
        raise UserError("--model: names nothing; give a folder, a file or a name on the hub")
    path = Path(name)
    looks_local = str(name).startswith(("/", ".", "~")) or str(name).count("/") > 1
    is_file = path.suffix in (*FILES_OF_MODELS, *FILES_OF_OTHERS)
    if not path.exists() and (looks_local or is_file):
        raise UserError(f"--model {name}: no such file or folder")
