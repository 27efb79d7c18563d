"""How often an epoch of training sees each image: kohya's repeats."""

from pathlib import Path

from ..errors import UserError
from .captions import label_images, read_lines
from .settings import read_settings
from .training_sets import label_rows

MOST_REPEATS = 10_000


def read_repeats(dataroot: str | Path, num_images: int) -> tuple[int, ...]:
    """Repeats of the first `num_images` training images, in the order of the rows; () where each is
    seen once.

    The file that `repeats` in `dataset.json` names has one whole number a line, in the order of the
    images' names. Raises UserError where it has another number of lines, or one is no number from 1
    to MOST_REPEATS.
    """
    settings = read_settings(dataroot)
    if not settings["repeats"]:
        return ()
    path, folder = Path(dataroot) / settings["repeats"], Path(dataroot) / settings["images"]
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it, or take repeats out of dataset.json")
    lines = read_lines(path)
    for number, line in enumerate(lines, 1):
        if not (line.isascii() and line.isdigit() and 1 <= int(line[:9]) <= MOST_REPEATS):
            raise UserError(
                f"{path}, line {number}: expected a whole number from 1 to {MOST_REPEATS:,}, found "
                f"{line!r:.40}"
            )
    num_names = len(label_images(folder, Path(dataroot) / settings["captions"])[0])
    if len(lines) != num_names:
        raise UserError(
            f"{path}: has {len(lines)} lines, expected {num_names}, one for each image of {folder}"
        )
    # Pictures that were left out have a line and no row.
    repeats = tuple(int(lines[row]) for row in label_rows(dataroot)[0][:num_images])
    return repeats if any(count != 1 for count in repeats) else ()
