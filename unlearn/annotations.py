"""Images of a folder paired with their captions: lines of text, Hugging Face's metadata.jsonl, COCO's annotations."""

import json
import os
from pathlib import Path, PurePosixPath

from . import UserError
from .reading import MOST_TEXT, check_text, read_json, read_text, resolve_inside

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
COCO_CAPTIONS = 5  # of each image; a few have six or seven. Source: [AbU] on MSCOCO


def list_folder(folder):
    """Paths of a folder's images in the order of their names, [] where it is missing."""
    folder = Path(folder)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []


def read_lines(path):
    """Lines of a UTF-8 text file, [] where it is missing."""
    text = read_text(path) if Path(path).exists() else ""
    return text.removesuffix("\n").split("\n") if text else []  # captions from the web hold other line separators


def read_metadata(path):
    """Entries (file name, [caption, ...]) of a metadata.jsonl of Hugging Face's image folders, in its order: an object a
    line with `file_name` and `text`, a caption or a list of them. Raises UserError where a line is no such object."""
    entries = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
        name, text = (value.get("file_name"), value.get("text")) if isinstance(value, dict) else (None, None)
        captions = [text] if isinstance(text, str) else [] if text is None else text
        if not isinstance(name, str) or not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f"{path}, line {number}: expected an object with a string `file_name` and `text`, a caption or a list of "
                            f"captions, found {line:.80}")
        check_unicode(f"{path}, line {number}", [name, *captions])
        entries.append((name, captions))
    return entries


def check_unicode(item, texts):
    """Raises UserError where a text holds half a character, as captions cut off in an emoji do."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{item}: expected Unicode text, found {text!a:.80}") from None


def check_objects(path, content, key, kinds):
    """The list `key` of a COCO file, whose objects have these fields of these types and an id of their own, or UserError."""
    objects = content.get(key) if isinstance(content, dict) else None
    if not isinstance(objects, list):
        raise UserError(f"{path}: expected COCO's caption annotations, an object with a list `{key}`, found {type(objects).__name__}")
    seen = set()
    for number, entry in enumerate(objects):
        for field, kind in kinds.items():
            value = entry.get(field) if isinstance(entry, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{path}: {key}, entry {number}: {field}: expected {kind.__name__}, found {value!r:.80}")
            if kind is str:
                check_unicode(f"{path}: {key}, entry {number}: {field}", [value])
        if entry["id"] in seen:
            raise UserError(f"{path}: {key}, entry {number}: id {entry['id']} stands there twice")
        seen.add(entry["id"])
    return objects


def read_coco(path):
    """Entries (file name, [caption, ...]) of COCO's caption annotations: `images` in their order, each one's captions in the
    order of their ids. Raises UserError where the file is none, or annotates images that it does not list."""
    content = read_json(path, "annotations", MOST_TEXT)
    images = check_objects(path, content, "images", {"id": int, "file_name": str})
    annotations = check_objects(path, content, "annotations", {"id": int, "image_id": int, "caption": str})
    captions = {image["id"]: [] for image in images}
    if strange := [annotation for annotation in annotations if annotation["image_id"] not in captions]:
        raise UserError(f"{path}: {len(strange)} captions without images, first annotation {strange[0]['id']} of image "
                        f"{strange[0]['image_id']}, which `images` does not list")
    for annotation in sorted(annotations, key=lambda annotation: annotation["id"]):
        captions[annotation["image_id"]].append(annotation["caption"])
    return [(image["file_name"], captions[image["id"]]) for image in images]


READERS = {".jsonl": read_metadata, ".json": read_coco}  # other files are lines, one an image of the folder


def read_entries(path):
    """Entries (file name, [caption, ...]) of an annotation file, [] where it is missing. Raises UserError where a name
    leads out of the folder of images or stands there twice."""
    entries, seen = READERS[Path(path).suffix](path) if Path(path).exists() else [], set()
    for name, _ in entries:
        plain = PurePosixPath(name)
        check_text(f"{path}", name, is_path=True)
        if plain.is_absolute() or ".." in plain.parts or not plain.parts or len(name) > 1000:
            raise UserError(f"{path}: expected names of files below the folder of images, found {name!a:.80}")
        if plain in seen:
            raise UserError(f"{path}: {name} stands there twice")
        seen.add(plain)
    return [(PurePosixPath(name).as_posix(), captions) for name, captions in entries]


def label_images(folder, path):
    """What is known of the rows of arrays that are there already: file names, paths and one caption each, every list [] where
    that is missing."""
    if Path(path).suffix not in READERS:
        paths = list_folder(folder)
        return [found.name for found in paths], paths, read_lines(path)
    entries = read_entries(path)
    paths = [Path(folder) / name for name, _ in entries] if Path(folder).is_dir() and any(Path(folder).iterdir()) else []
    return [name for name, _ in entries], paths, [captions[0] if captions else "" for _, captions in entries]


def match_files(folder, path, entries):
    """Raises UserError where annotated images are not in the folder, or images in it are not annotated."""
    found = {Path(where, file).relative_to(folder).as_posix() for where, _, files in os.walk(folder) for file in files}
    for name, _ in entries:
        if name not in found or os.path.islink(Path(folder) / name):  # through a link
            resolve_inside(folder, name, f"{path}")
    missing = [name for name, _ in entries if name not in found and not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(entries)} captions without images: not in {folder}, first {missing[0]}")
    images = {name for name in found if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES}
    if extra := sorted(images - {name for name, _ in entries}):
        raise UserError(f"{folder}: {len(extra)} of {len(images)} images without captions in {Path(path).name}, first {extra[0]}")


def choose_captions(path, entries, count):
    """The first `count` captions of each entry; 0: five of COCO's, elsewhere all, which must be as many for every image.
    Raises UserError where an image has fewer."""
    if empty := [name for name, captions in entries if not captions]:
        raise UserError(f"{path}: {len(empty)} of {len(entries)} images without captions, first {empty[0]}")
    exact = not count and Path(path).suffix != ".json"
    count = count or (len(entries[0][1]) if exact else COCO_CAPTIONS)
    for name, captions in entries:
        if len(captions) < count or exact and len(captions) > count:
            fewest = min(len(captions) for _, captions in entries)
            raise UserError(f"{path}: {name} has {len(captions)} captions, expected {count} as of every image; take the first n of "
                            f"each (at most {fewest}): python -m unlearn encode --num_captions n")
    return [captions[:count] for _, captions in entries]


def pair_images(folder, path, num_captions=0):
    """Paths of the images and the captions of each, of which all have as many, in the order of the rows: that of an
    annotation file, else that of the images' names. Raises UserError where some images or captions are alone."""
    if Path(path).suffix not in READERS:
        paths, lines = list_folder(folder), read_lines(path)
        if not paths or len(paths) != len(lines):
            raise UserError(f"{path}: expected a line for each image of {folder}, found {len(paths)} images, {len(lines)} lines")
        if num_captions > 1:
            raise UserError(f"--num_captions {num_captions}: {path} has one caption an image")
        return paths, [[line] for line in lines]
    entries = read_entries(path)
    if not entries:
        raise UserError(f"{path}: {'lists no image' if Path(path).exists() else 'no such file'}")
    match_files(folder, path, entries)
    return [Path(folder) / name for name, _ in entries], choose_captions(path, entries, num_captions)
