"""Files that say which picture has which caption: Hugging Face's metadata.jsonl and metadata.csv,
COCO's annotations, lines of text."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import UserError
from ..storage.reading import MOST_TEXT, check_text, make_object, read_json, read_text

CAPTION_KEYS = ("text", "caption", "prompt")  # of a metadata file; the first that is there counts


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text file, [] where it is missing. Blank lines at its end are none."""
    lines = (
        read_text(path).split("\n") if Path(path).exists() else []
    )  # captions from the web hold other line separators
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


class Row(NamedTuple):
    """One line of a metadata file."""

    name: str  # of a picture's file, as it is written there
    captions: list[str]
    columns: dict  # everything that the line says of the picture


def read_objects(path: Path) -> list[tuple[str, object]]:
    """(place for messages, value) of each line of a metadata.jsonl that is not blank."""
    objects = []
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path}, line {number}"
        try:
            if line.strip():
                objects.append((where, json.loads(line, object_pairs_hook=make_object)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
    return objects


def read_table(path: Path) -> list[tuple[str, dict]]:
    """(place for messages, {column: text}) of each line of a CSV file with a header. Raises
    UserError where the header lacks file_name, or a line has another length."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    objects = []
    try:
        header = next(reader, [])
        if "file_name" not in header or len(set(header)) < len(header):
            raise UserError(
                f"{path}: expected a first line with the columns file_name and "
                f"{', '.join(CAPTION_KEYS[:-1])} or {CAPTION_KEYS[-1]}, each once and separated by "
                f"commas, found {','.join(header):.80}"
            )
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{where}: expected {len(header)} columns as in the first line, found "
                    f"{len(cells)}; put a caption that holds a comma in double quotes"
                )
            if cells:
                objects.append((where, dict(zip(header, cells))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from None
    return objects


def read_rows(path: Path) -> list[Row]:
    """Rows of a metadata.jsonl or metadata.csv of Hugging Face's image folders, in its order: a
    `file_name` and a caption, or in .jsonl a list of them. Raises UserError where a line is none.
    Source: https://huggingface.co/docs/datasets/image_dataset"""
    rows = []
    for where, value in read_table(path) if Path(path).suffix == ".csv" else read_objects(path):
        found = value if isinstance(value, dict) else {}
        name = found.get("file_name")
        text = next((found[key] for key in CAPTION_KEYS if found.get(key) is not None), None)
        captions = [text] if isinstance(text, str) else [] if text is None else text
        if (
            not isinstance(name, str)
            or not isinstance(captions, list)
            or not all(isinstance(caption, str) for caption in captions)
        ):
            raise UserError(
                f"{where}: expected an object with a string `file_name` and `text` (or `caption`, "
                f"`prompt`), a caption or a list of captions, found {value!s:.80}"
            )
        check_unicode(where, [name, *captions])
        rows.append(Row(name, captions, found))
    return rows


def read_metadata(path: Path) -> list[tuple[str, list[str]]]:
    """Entries (file name, [caption, ...]) of a metadata file, in its order; several lines of one
    name are its captions. Raises UserError: `read_rows`."""
    entries, rows = {}, read_rows(path)
    for name, captions, _ in rows:
        entries.setdefault(PurePosixPath(name), (name, []))[1].extend(captions)
    if rows and not any(key in row.columns for row in rows for key in CAPTION_KEYS):
        raise UserError(
            f"{path}: no captions; expected them as {', '.join(CAPTION_KEYS[:-1])} or "
            f"{CAPTION_KEYS[-1]}, found {', '.join(map(str, rows[0].columns)):.80}"
        )
    return list(entries.values())


def check_unicode(item: str, texts: Iterable[str]) -> None:
    """Raises UserError where a text holds half a character, as captions cut off in an emoji do."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{item}: expected Unicode text, found {text!a:.80}") from None


def check_objects(
    path: str | Path, content: object, key: str, kinds: dict[str, type]
) -> list[dict]:
    """The list `key` of a COCO file, whose objects have these fields of these types and an id of
    their own, or UserError."""
    objects = content.get(key) if isinstance(content, dict) else None
    if not isinstance(objects, list):
        raise UserError(
            f"{path}: expected COCO's caption annotations, an object with a list `{key}`, found "
            f"{type(objects).__name__}"
        )
    seen = set()
    for number, entry in enumerate(objects):
        for field, kind in kinds.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(
                    f"{path}: {key}, entry {number}: {field}: expected {kind.__name__}, found "
                    f"{value!r:.80}"
                )
            if isinstance(value, str):
                check_unicode(f"{path}: {key}, entry {number}: {field}", [value])
        if entry["id"] in seen:
            raise UserError(f"{path}: {key}, entry {number}: id {entry['id']} stands there twice")
        seen.add(entry["id"])
    return objects


def read_coco(path: str | Path) -> list[tuple[str, list[str]]]:
    """Entries (file name, [caption, ...]) of COCO's caption annotations: `images` in their order,
    each one's captions in the order of their ids. Raises UserError where the file is none, or
    annotates images that it does not list."""
    content = read_json(path, "annotations", MOST_TEXT)
    images = check_objects(path, content, "images", {"id": int, "file_name": str})
    annotations = check_objects(
        path, content, "annotations", {"id": int, "image_id": int, "caption": str}
    )
    captions = {image["id"]: [] for image in images}
    if strange := [
        annotation for annotation in annotations if annotation["image_id"] not in captions
    ]:
        raise UserError(
            f"{path}: {len(strange)} captions without images, first annotation "
            f"{strange[0]['id']} of image "
            f"{strange[0]['image_id']}, which `images` does not list"
        )
    for annotation in sorted(annotations, key=lambda annotation: annotation["id"]):
        captions[annotation["image_id"]].append(annotation["caption"])
    return [(image["file_name"], captions[image["id"]]) for image in images]


READERS = {
    ".jsonl": read_metadata,
    ".csv": read_metadata,
    ".json": read_coco,
}  # other files are lines, one an image of the folder


def read_entries(path: str | Path) -> list[tuple[str, list[str]]]:
    """Entries (file name, [caption, ...]) of an annotation file, [] where it is missing. Raises
    UserError where a name leads out of the folder of images or stands there twice."""
    entries, seen = READERS[Path(path).suffix](path) if Path(path).exists() else [], set()
    for name, _ in entries:
        plain = PurePosixPath(name)
        check_text(f"{path}", name, is_path=True)
        if plain.is_absolute() or ".." in plain.parts or not plain.parts or len(name) > 1000:
            raise UserError(
                f"{path}: expected names of files below the folder of images, found {name!a:.80}"
            )
        if plain in seen:
            raise UserError(f"{path}: {name} stands there twice")
        seen.add(plain)
    return [(PurePosixPath(name).as_posix(), captions) for name, captions in entries]
