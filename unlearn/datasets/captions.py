"""Images of a folder paired with their captions, which are lines or stand in an annotation file."""

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..runtime.printing import shorten
from ..storage.reading import check_name, list_visible, resolve_inside
from .annotations import READERS, read_entries, read_lines

IMAGE_SUFFIXES = {
    ".png",
    ".apng",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
}  # pictures.FORMATS
UNREAD_SUFFIXES = {
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".tga",
    ".ico",
    ".ppm",
    ".pgm",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
}
PAIRS_SHOWN = 3
NAME_IT = "and name that file as `captions` in dataset.json"
NAMED_LINE = re.compile(r"""["']?(.+?\.\w{3,5})["']?\s*[\s,;:#|]\s*(.+)""")  # b.png a dog
OTHERS = (  # the way on
    "take such out, or have a data root made of the folder, which leaves them out: python -m unlearn "
    "attribute --images FOLDER"
)
COCO_CAPTIONS = 5  # of each image; a few have six or seven. Source: [AbU] on MSCOCO
BEGINNINGS = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*", re.DOTALL
)  # of pictures' files


def check_pictures(folder: str | Path, names: Sequence[str]) -> None:
    """Raises UserError where files' names, relative to their folder, are not UTF-8, or are of
    pictures that are not read."""
    for name in names:
        check_name(f"{folder}", name)
    if unread := [name for name in names if PurePosixPath(name).suffix.lower() in UNREAD_SUFFIXES]:
        raise UserError(
            f"{folder}: {len(unread)} pictures of a kind that is not read, first {unread[0]}; "
            f"make them PNG or JPEG, or move "
            "them out of there"
        )


def list_folder(folder: str | Path) -> list[Path]:
    """Paths of a folder's images in the order of their names as text, [] where it is missing.
    Raises UserError: `check_pictures`."""
    paths = [
        path
        for path in list_visible(folder)
        if path.suffix.lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES
    ]
    check_pictures(folder, [path.name for path in paths])
    return paths


def plain_letters(text: str) -> str:
    """A text without accents and capitals, full-width letters as others: as people's programs
    compare names."""
    return "".join(
        character
        for character in unicodedata.normalize("NFKD", text.casefold())
        if not unicodedata.combining(character)
    )


def natural_order(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Key by which file browsers list files: numbers by their value, in any script; capitals and
    accents beside plain letters; the name before its suffix."""
    parts = re.findall(r"\d+|.", plain_letters(path.stem), re.DOTALL)
    return [
        ("0", int(part)) if part.isdecimal() else (part, 0) for part in parts
    ], path.suffix.casefold()


def spoken_order(path: Path) -> tuple[list[tuple[str, int]], str]:
    """Key by which `ls` and others list files in most languages: that of a browser, without spaces
    and punctuation."""
    return natural_order(path.with_name(re.sub(r"[\W_]+", "", path.stem) + path.suffix))


def entry_of(name: str, caption: str) -> str:
    """A line of a metadata.jsonl, for messages."""
    return json.dumps({"file_name": name, "text": shorten(caption, 30)}, ensure_ascii=False)


def check_unnamed(
    path: str | Path, paths: Sequence[Path], lines: Sequence[str], remedy: str
) -> None:
    """Raises UserError where captions that are told by their place begin with names of the images:
    they would be paired with others."""
    names = {image.name: image for image in paths}
    found = [
        (number, match)
        for number, line in enumerate(lines, 1)
        if (match := NAMED_LINE.match(line)) and PurePosixPath(match[1]).name in names
    ]
    if found:
        number, match = found[0]
        raise UserError(
            f"{path}: {len(found)} of {len(lines)} lines begin with an image's name, first line "
            f"{number}: {shorten(lines[number - 1])}; "
            "but a line belongs to the image in its place, and all of it would be the caption. "
            "Write a "
            f"{Path(path).with_name('metadata.jsonl')} instead, an object a line such as "
            f"{entry_of(PurePosixPath(match[1]).name, match[2])}, {remedy}"
        )


def check_order(
    path: str | Path, paths: list[Path], lines: Sequence[str], remedy: str = NAME_IT
) -> None:
    """Raises UserError where images that are told by their place alone stand in one order as text
    and in another in people's listings: line n (without `lines`, row n of the arrays) would be that
    of one image or of another. remedy: what is to be done with a metadata.jsonl, for messages."""
    check_unnamed(path, paths, lines, remedy)
    orders = {
        "a file browser": sorted(paths, key=natural_order),
        "`ls`": sorted(paths, key=spoken_order),
    }
    who, natural = next(
        ((who, order) for who, order in orders.items() if order != paths), (None, paths)
    )
    if who is None:
        return
    first = next(place for place, pair in enumerate(zip(paths, natural)) if pair[0] != pair[1])
    kind, ends = (
        ("line", [f": {shorten(line, 30)}" for line in lines])
        if lines
        else ("row", [""] * len(paths))
    )
    as_text, as_listed = (
        ", ".join(
            image.name + end for image, end in list(zip(order, ends))[first : first + PAIRS_SHOWN]
        )
        for order in (paths, natural)
    )
    name, number = natural[first].name, re.search("[0-9]+", natural[first].stem)
    filled = sorted(
        paths, key=lambda image: natural_order(image.with_name(re.sub(r"\d+", "0", image.name)))
    )
    renamed = (
        name.replace(number[0], number[0].zfill(6), 1) if number and filled == paths else None
    )  # only numbers are in the way
    raise UserError(
        f"{path}: which {kind} is whose? From {kind} {first + 1} the names' order as text gives "
        f"{as_text}; {who} lists them "
        f"{as_listed}. "
        + (
            f"Rename the images with leading zeros ({name} to {renamed}), or name"
            if renamed
            else "Name"
        )
        + f" each in a {Path(path).with_name('metadata.jsonl')}, an object a line such as "
        f"{entry_of(name, lines[first] if lines else '...')}, {remedy}"
    )


def label_images(folder: str | Path, path: str | Path) -> tuple[list[str], list[Path], list[str]]:
    """What is known of the rows of arrays that are there already: file names, paths and one caption
    each, every list [] where that is missing."""
    if Path(path).suffix not in READERS:
        paths, lines = list_folder(folder), read_lines(path)
        if len(lines) in (0, len(paths)):  # else open_arrays tells
            check_order(path, paths, lines)
        return [found.name for found in paths], paths, lines
    entries = read_entries(path)
    paths = [Path(folder) / name for name, _ in entries] if list_visible(folder) else []
    return (
        [name for name, _ in entries],
        paths,
        [captions[0] if captions else "" for _, captions in entries],
    )


def walk_visible(folder: str | Path) -> Iterator[Path]:
    """Paths of all files below a folder but for hidden ones and those of hidden folders."""
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield from (Path(where, name) for name in files if not name.startswith("."))


def find_overlooked(folder: str | Path, paths: Sequence[str | Path]) -> list[Path]:
    """Pictures below a folder, by their first bytes, that are not among these paths, for all that
    their names say: in a sub-folder of one whose captions are lines, or with another suffix than
    those that are listed."""
    listed = {os.path.normpath(path) for path in paths}

    def is_picture(path):
        try:
            with open(path, "rb") as file:
                return BEGINNINGS.match(file.read(16))
        except OSError:
            return False

    return sorted(
        path
        for path in walk_visible(folder)
        if os.path.normpath(path) not in listed and path.is_file() and is_picture(path)
    )


def match_files(
    folder: str | Path, path: str | Path, entries: Sequence[tuple[str, list[str]]]
) -> None:
    """Raises UserError where annotated images are not in the folder, or images in it are not
    annotated."""
    found = {path.relative_to(folder).as_posix() for path in walk_visible(folder)}
    for name, _ in entries:
        if name not in found:  # above the folder, or through a link to another
            resolve_inside(folder, name, f"{path}")
    missing = [
        name for name, _ in entries if name not in found and not (Path(folder) / name).is_file()
    ]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(entries)} captions without images: not in {folder}, "
            f"first {missing[0]}; names are relative to that folder, with /; {OTHERS}"
        )
    images = {
        name
        for name in found
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES | UNREAD_SUFFIXES
    }
    extra = sorted(images - {name for name, _ in entries})
    check_pictures(folder, extra)
    if extra:
        raise UserError(
            f"{folder}: {len(extra)} of {len(images)} images without captions in "
            f"{Path(path).name}, first {extra[0]}; {OTHERS}"
        )


def choose_captions(
    path: str | Path, entries: Sequence[tuple[str, list[str]]], count: int
) -> list[list[str]]:
    """The first `count` captions of each entry; 0: five of COCO's, elsewhere all, which must be as
    many for every image. Raises UserError where an image has fewer."""
    if empty := [name for name, captions in entries if not captions]:
        raise UserError(
            f"{path}: {len(empty)} of {len(entries)} images without captions, first {empty[0]}"
        )
    exact = not count and Path(path).suffix != ".json"
    count = count or (len(entries[0][1]) if exact else COCO_CAPTIONS)
    for name, captions in entries:
        if len(captions) < count or exact and len(captions) > count:
            fewest = min(len(captions) for _, captions in entries)
            raise UserError(
                f"{path}: {name} has {len(captions)} captions, expected {count} as of every "
                f"image; take the first {fewest} of "
                f'each: write "num_captions": {fewest} into the data root\'s dataset.json, or '
                f"encode with --num_captions {fewest}"
            )
    return [captions[:count] for _, captions in entries]


def pair_lines(
    folder: str | Path, path: str | Path, paths: list[Path], remedy: str = NAME_IT
) -> list[str]:
    """Lines of a text file that are captions of these images of a folder, each in its place. Raises
    UserError where their numbers differ, or whose is whose is not certain (`check_order`)."""
    lines = read_lines(path)
    if not paths or len(paths) != len(lines):
        raise UserError(
            f"{path}: expected a line for each image of {folder}, found {len(paths)} images, "
            f"{len(lines)} lines (blank ones at its end and hidden files do not count)"
        )
    check_order(path, paths, lines, remedy)
    return lines


def pair_images(
    folder: str | Path, path: str | Path, num_captions: int = 0
) -> tuple[list[Path], list[list[str]]]:
    """Paths of the images and the captions of each, of which all have as many, in the order of the
    rows: that of an annotation file, else that of the images' names. Raises UserError where some
    images or captions are alone."""
    if Path(path).suffix not in READERS:
        paths = list_folder(folder)
        lines = pair_lines(folder, path, paths)
        if num_captions > 1:
            raise UserError(f"--num_captions {num_captions}: {path} has one caption an image")
        return paths, [[line] for line in lines]
    entries = read_entries(path)
    if not entries:
        raise UserError(f"{path}: {'lists no image' if Path(path).exists() else 'no such file'}")
    match_files(folder, path, entries)
    return [Path(folder) / name for name, _ in entries], choose_captions(
        path, entries, num_captions
    )
