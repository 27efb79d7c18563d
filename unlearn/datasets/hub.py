"""Training images of Hugging Face data sets: a folder that `save_to_disk` wrote, or hf:NAME."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runtime.printing import shorten
from ..storage.artifacts import write_bytes
from .annotations import CAPTION_KEYS
from .captions import BEGINNINGS, IMAGE_SUFFIXES
from .entries import Entry, Found, group_name
from .presence import HUB

SAVED = (
    ("dataset_dict.json",),
    ("state.json", "dataset_info.json"),
)  # by save_to_disk: splits, one
SPLIT = "train"
SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp"}
SUFFIXES |= {b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}


def is_dataset(source: str | Path) -> bool:
    """Whether a source of training images is a Hugging Face data set."""
    return str(source).startswith(HUB) or any(
        all((Path(source) / name).is_file() for name in names) for names in SAVED
    )


def import_datasets() -> Any:
    """The library. Raises UserError where it is missing, or would run a data set's own code."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Hugging Face data sets need the library datasets: pip install 'datasets>=4.0'"
        ) from None
    library: Any = datasets
    if int(library.__version__.split(".")[0]) < 4:
        raise UserError(
            f"datasets {library.__version__} can run code of data sets; "
            f"pip install 'datasets>=4.0', which never does"
        )
    return library


def load_split(source: str) -> tuple[Any, str]:
    """One split of a data set, its pictures not decoded. Raises UserError where it cannot be
    loaded, or it is not clear which split is meant."""
    datasets = import_datasets()
    try:
        if source.startswith(HUB):
            loaded = datasets.load_dataset(source.removeprefix(HUB))
        else:
            loaded = datasets.load_from_disk(source)
    except Exception as error:  # the library raises many kinds, its own and others'
        raise UserError(
            f"{source}: cannot be loaded as a data set ({shorten(error, 200)})"
        ) from None
    if isinstance(loaded, dict):
        if SPLIT not in loaded and len(loaded) != 1:
            raise UserError(
                f"{source}: which split was trained on? It has {', '.join(loaded)}, no {SPLIT}; "
                f"save the one that was with save_to_disk and give that folder"
            )
        loaded = loaded[SPLIT if SPLIT in loaded else next(iter(loaded))]
    for column, kind in loaded.features.items():
        if isinstance(kind, datasets.Image):
            return loaded.cast_column(column, datasets.Image(decode=False)), column
    raise UserError(f"{source}: no column of pictures (Image), found {', '.join(loaded.features)}")


def read_dataset(
    source: str | Path,
    pictures: str | Path,
    caption: str | None = None,
    captions: str | None = None,
    groups: str | None = None,
) -> Found:
    """Reads a data set and writes its pictures' own bytes into the folder `pictures`.

    captions: the column of them, else the first of `CAPTION_KEYS`; caption: of rows that have none;
    groups: a column. Raises UserError where columns are missing or no row is usable.
    """
    source = os.fspath(source)
    split, image = load_split(source)
    column = captions or next((key for key in CAPTION_KEYS if key in split.features), None)
    for flag, name in ("--captions", captions), ("--groups", groups):
        if name is not None and name not in split.features:
            raise UserError(
                f"{flag} {name}: {source} has no such column; there: {', '.join(split.features)}"
            )
    if column is None and caption is None:
        raise UserError(
            f"{source}: no column {', '.join(CAPTION_KEYS)}; there: {', '.join(split.features)}; "
            f'name it with --captions, or give one caption for all: --caption "..."'
        )
    entries, skipped, taken = [], {}, set()
    for number, row in enumerate(split):
        content, lines = read_bytes(row[image]), list(list_captions(row.get(column), caption))
        if content is None or not lines:
            why = "a row without a caption" if content else "a row without a picture that is read"
            skipped.setdefault(why, []).append(f"row {number}")
            continue
        name = choose_name(row[image].get("path"), content, number, taken)
        path = Path(pictures) / name
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)
        entries.append(Entry(path, name, lines, group_name(row[groups]) if groups else None))
    if not entries:
        raise UserError(f"{source}: none of {len(split)} rows has a picture and a caption")
    entries.sort(key=lambda entry: entry.name)
    where = f"the column {column} of a data set" if column else "one caption for all"
    return Found(os.fspath(pictures), entries, where, skipped)


def read_bytes(image: dict | None) -> bytes | None:
    """The bytes of a picture's file, which a data set holds or names; None where there are none, or
    they are of no kind that is read."""
    content, path = (image or {}).get("bytes"), (image or {}).get("path")
    if content is None and path and os.path.isfile(path):
        content = Path(path).read_bytes()
    return content if content and BEGINNINGS.match(content[:16]) else None


def list_captions(value: object, caption: str | None) -> Iterator[str]:
    """The captions of a row: a text or a list of them, else the one for all."""
    texts = value if isinstance(value, list) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    yield from texts or ([] if caption is None else [caption])


def choose_name(path: str | None, content: bytes, number: int, taken: set[str]) -> str:
    """A picture's file name: its own, where it has one that no other row has; else the row's
    number."""
    name = (path or "").replace("\\", "/").rpartition("/")[2]
    is_usable = os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
    if not is_usable or name in taken or len(name.encode(errors="replace")) > 200:
        suffix = next(suffix for start, suffix in SUFFIXES.items() if content.startswith(start))
        name = f"{number:06d}{suffix}"
    taken.add(name)
    return name
