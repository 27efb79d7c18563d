"""A data root made of a folder of training images: every command works on it.

OUT/dataset.json      settings
OUT/images/...        the pictures under their own paths: hard links, copies where none can be
OUT/metadata.jsonl    captions; written last, so that its existence means that the root is whole
OUT/originals.json    which of the user's files each picture is (`originals`)
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..runtime.printing import printable, shorten
from ..storage.artifacts import check_writable, own_part, whole_file, write_bytes, write_json
from ..storage.hashes import digest, hash_file
from ..storage.reading import LONGEST_NAME, read_json
from ..storage.sharing import do_once, forget_claim
from .captions import IMAGE_SUFFIXES, UNREAD_SUFFIXES, walk_visible
from .entries import NAMES_SHOWN, Found
from .originals import ORIGINALS, Original, Plan, compare_plans, read_plan, write_plan
from .pairs import map_files
from .settings import FOLDERS, PUBLISHED, check_files, check_settings

IMAGES, CAPTIONS, SETTINGS = "images", "metadata.jsonl", "dataset.json"
LONGEST_PATH = 900  # characters; an annotation file's names may have 1,000
CLAIM = "originals"
PICTURES = {*IMAGE_SUFFIXES, *UNREAD_SUFFIXES, ".part"}


@dataclass(frozen=True)
class Made:
    """A data root, and what of its folder is new since it was made last."""

    root: Path
    count: int
    is_new: bool
    changes: dict[str, list[str]]  # `compare_plans`; {} where nothing is different, or all is new

    def describe(self) -> str:
        """One line for people."""
        said = "; ".join(
            f"{len(names)} {what} ({', '.join(shorten(name, 80) for name in names[:NAMES_SHOWN])}"
            f"{', ...' if names[NAMES_SHOWN:] else ''})"
            for what, names in self.changes.items()
        )
        state = "made" if self.is_new else f"changed: {said}" if said else "unchanged"
        return printable(f"{self.root}: data root of {self.count} pictures, {state}")


def make_data_root(found: Found, out: str | Path, settings: dict) -> Made:
    """Makes OUT a data root of a folder's pictures and captions, or brings it to the folder's
    present state. Nothing is decoded: the pictures are the user's own bytes. Killed at any moment,
    the same call goes on; of several at once one works and the others wait.

    settings: of dataset.json (`settings.PUBLISHED`); `name` decides with an image's place the noise
    of its losses. Raises UserError, before anything is written, where OUT is another data root or
    was made of another folder that is different.
    """
    out = Path(out)
    plan = make_plan(found, settings)
    check_place(Path(plan.folder), out)
    before, changes = compare_root(out, plan)
    made = Made(out, len(plan.pictures), before is None, changes)
    if is_current(out, plan):
        forget_claim(out, CLAIM)
        return made
    check_strangers(out, plan)
    check_writable(out, "give another --out")
    do_once(out, CLAIM, lambda: is_current(out, plan), lambda: build_root(out, plan))
    return made


def compare_root(out: Path, plan: Plan) -> tuple[Plan | None, dict[str, list[str]]]:
    """(the plan that OUT was made by, what became different since). Raises UserError where it was
    made of another folder that is different."""
    before = read_plan(out)
    if before is None:
        return None, {}
    changes = compare_plans(before[0], plan)
    if changes and before[0].folder != plan.folder:
        what, names = next(iter(changes.items()))
        raise UserError(
            f"{out}: was made of {before[0].folder}, and {plan.folder} is different: {len(names)} "
            f"{what}, first {shorten(names[0], 80)}; give another --out"
        )
    return before[0], changes


def make_plan(found: Found, settings: dict) -> Plan:
    """What the data root of a folder is made of; each picture is read once. Raises UserError for
    settings that no data root has."""
    fewest = min(len(entry.captions) for entry in found.entries)
    settings = {"name": "own", "num_captions": fewest, **check_settings("settings", settings)}
    settings |= {"images": IMAGES, "captions": CAPTIONS}
    check_files("settings", {**PUBLISHED, **settings})
    for key in FOLDERS:  # the root is another place to start from
        if settings.get(key) and Path(settings[key]).exists():
            settings[key] = os.path.abspath(settings[key])
    contents = list(map_files(hash_file, [entry.path for entry in found.entries], "hashing images"))
    pictures = [
        Original(
            file_name(entry.name),
            entry.name,
            content,
            entry.captions,
            entry.group,
            entry.repeats,
            os.path.realpath(entry.path) if entry.is_class else None,
        )
        for entry, content in zip(found.entries, contents)
    ]
    return Plan(os.path.realpath(found.folder), settings, pictures)


def file_name(name: str) -> str:
    """Where a picture stands below the root's images: under its own path, so that this is what
    people see; parts that are too long for what is written beside them are cut, and told apart by a
    hash."""

    def cut(part):
        stem, suffix = os.path.splitext(part)
        kept = stem.encode()[: LONGEST_NAME - 20].decode(errors="ignore")
        is_long = len(part.encode()) > LONGEST_NAME
        return f"{kept}~{digest(part)[:8]}{suffix[:10]}" if is_long else part

    short = PurePosixPath(*map(cut, PurePosixPath(name).parts)).as_posix()
    suffix = PurePosixPath(short).suffix
    return short if len(short) <= LONGEST_PATH else f"{digest(name)}{suffix}"


def check_place(folder: Path, out: Path) -> None:
    """Raises UserError where OUT would mix with the pictures that it is made of, or is a data root
    that was not made of a folder."""
    images = Path(os.path.realpath(out / IMAGES))
    if os.path.realpath(out) == str(folder) or folder.is_relative_to(images):
        raise UserError(f"{out}: holds the pictures {folder} themselves; give another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder, or none yet, found a file; give another --out")
    if (out / IMAGES).is_symlink():
        raise UserError(f"{out / IMAGES}: a link, through which nothing is written; remove it")
    there = [name for name in (SETTINGS, CAPTIONS, IMAGES) if (out / name).exists()]
    if there and not (out / ORIGINALS).exists():  # in this order: it is written first
        raise UserError(
            f"{out}: has {there[0]}, which was not made of a folder of pictures; give another --out"
        )


def list_pictures(folder: Path) -> set[str]:
    """Paths of the pictures below a folder, relative to it, and of parts of such."""
    return {
        path.relative_to(folder).as_posix()
        for path in walk_visible(folder)
        if path.suffix.lower() in PICTURES
    }


def check_strangers(out: Path, plan: Plan) -> None:
    """Raises UserError where the root's images hold a file that no plan made: it would be a
    training image without a caption, and is not this program's to remove."""
    before = read_plan(out)
    names = {picture.file for picture in plan.pictures} | (before[1] if before else set())
    strangers = sorted(list_pictures(out / IMAGES) - names)
    if strange := [name for name in strangers if not name.endswith(".part")]:
        raise UserError(
            f"{out / IMAGES}: {len(strange)} pictures did not come from {plan.folder}, first "
            f"{shorten(strange[0], 80)}; move them there, or away"
        )


def is_current(out: Path, plan: Plan) -> bool:
    """Whether a data root is whole and of this plan."""
    before = read_plan(out)
    if not before or before[0] != plan or not (out / CAPTIONS).exists():
        return False
    written = own_settings(out, plan)
    files = {picture.file for picture in plan.pictures}
    return (
        (out / SETTINGS).exists()
        and read_json(out / SETTINGS, "data set") == written
        and list_pictures(out / IMAGES) == files
        and all(is_placed(out, plan, picture) for picture in plan.pictures)
    )


def find_source(plan: Plan, picture: Original) -> Path:
    """The user's file of a picture."""
    return Path(picture.path) if picture.path else Path(plan.folder) / picture.name


def is_placed(out: Path, plan: Plan, picture: Original) -> bool:
    """Whether a picture stands in the root, as a link to the user's file or with its bytes."""
    source, target = find_source(plan, picture), out / IMAGES / picture.file
    try:
        return os.path.samefile(source, target) or hash_file(target) == picture.content
    except OSError:
        return False


def own_settings(out: Path, plan: Plan) -> dict:
    """What dataset.json is to hold: the given settings, and what people added to it."""
    before = read_plan(out)
    given = before[0].settings if before else {}
    there = read_json(out / SETTINGS, "data set") if (out / SETTINGS).exists() else {}
    added = [key for key, value in there.items() if key not in given or value != given[key]]
    return {**{key: there[key] for key in added}, **plan.settings}


def build_root(out: Path, plan: Plan) -> None:
    """Makes the root, or brings it to the plan. While it is not whole it has no captions, so that
    nothing can be made of a mixture of two states. Raises as `make_data_root`, where another
    process has been here since."""
    compare_root(out, plan)
    check_strangers(out, plan)
    before = read_plan(out)
    settings = own_settings(out, plan)
    (out / CAPTIONS).unlink(missing_ok=True)
    names = {picture.file for picture in plan.pictures}
    stale = (before[1] if before else set()) - names
    write_plan(out, plan, stale)
    write_json(out / SETTINGS, settings)
    for name in list_pictures(out / IMAGES) - names:
        if name in stale or name.endswith(".part"):
            remove_file(out / IMAGES, name)
    for _ in map_files(lambda picture: place(out, plan, picture), plan.pictures, "linking images"):
        pass
    lines = [
        json.dumps({"file_name": picture.file, "text": picture.captions}, ensure_ascii=False)
        for picture in plan.pictures
    ]
    write_bytes(out / CAPTIONS, ("\n".join(lines) + "\n").encode())


def place(out: Path, plan: Plan, picture: Original) -> None:
    """Puts a picture into the root: a hard link, which takes no room and outlives the user's
    folder; a copy where the file system gives none."""
    source = os.path.realpath(find_source(plan, picture))
    target = out / IMAGES / picture.file
    if is_placed(out, plan, picture):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = own_part(target)
    try:
        part.unlink(missing_ok=True)
        os.link(source, part)
        os.replace(part, target)
    except OSError:  # another file system, another's file, or too many links
        part.unlink(missing_ok=True)
        with open(source, "rb") as read, whole_file(target) as written:
            shutil.copyfileobj(read, written, 1 << 20)


def remove_file(folder: Path, name: str) -> None:
    """Removes a file below a folder, and the folders that it leaves empty."""
    (folder / name).unlink(missing_ok=True)
    for parent in (folder / name).parents:
        if parent == folder:
            break
        with suppress(OSError):
            parent.rmdir()
