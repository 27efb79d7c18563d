"""Where people's folders keep the captions of their pictures, one function a convention."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import UserError
from ..storage.reading import MOST_TEXT, read_json, read_text
from .annotations import read_coco, read_rows
from .captions import IMAGE_SUFFIXES, UNREAD_SUFFIXES, pair_lines
from .originals import ORIGINALS

SIDECARS = (".txt", ".caption")  # kohya's trainers take either, by a setting
METADATA = ("metadata.jsonl", "metadata.csv")
LINES = "captions.txt"
MOST_CAPTION = 1 << 20  # bytes of a caption's own file
REPEATED = re.compile(r"([1-9]\d{0,2})_(.+)")  # 10_sks dog: ten times an epoch; 2024_trip is a year
ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


@dataclass
class Tree:
    """What stands below a folder, as paths relative to it with /, in the order of their names."""

    folder: Path
    pictures: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # pictures of a kind that is not read
    others: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # why: names


class Source(NamedTuple):
    """Captions that one convention gives to pictures."""

    choice: str  # by which people choose it: the file, or the suffix of many
    captions: dict[str, list[str]]  # of pictures, by their paths in the tree
    columns: dict[str, dict]  # what else a metadata file says of them
    skipped: dict[str, list[str]]  # why: names
    notes: list[str]

    @property
    def label(self) -> str:
        """What it is, in words."""
        beside = f"{self.choice} files beside the pictures"
        return beside if self.choice in SIDECARS else self.choice


class Candidate(NamedTuple):
    """A convention that a folder follows, before its captions are read."""

    kind: str  # file name or suffix of the convention
    choice: str
    read: Callable[[], Source]


def is_hidden(name: str) -> bool:
    """Whether systems put a file or folder of this name there for themselves."""
    return name.startswith(".") or name == "__MACOSX"


def list_tree(folder: Path) -> Tree:
    """All that is below a folder. Raises UserError where some of it cannot be listed."""

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    tree = Tree(Path(folder))
    for where, folders, files in os.walk(folder, onerror=refuse):
        inside = Path(where).relative_to(folder)
        for name in [name for name in folders if (Path(where) / name / ORIGINALS).exists()]:
            folders.remove(name)
            tree.skipped["a data root that was made of a folder"].append((inside / name).as_posix())
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                tree.skipped[
                    "a link to a folder, which is not followed; give the folder it leads to"
                ].append((inside / name).as_posix())
        for name in sorted(files):
            sort_file(tree, (inside / name).as_posix())
    for names in tree.pictures, tree.unread, tree.others:
        names.sort()
    return tree


def sort_file(tree: Tree, name: str) -> None:
    """Puts a file where it belongs in the tree."""
    suffix = PurePosixPath(name).suffix.lower()
    is_picture = suffix in IMAGE_SUFFIXES | UNREAD_SUFFIXES
    if any(map(is_hidden, PurePosixPath(name).parts)):
        if is_picture:
            tree.skipped["hidden, as systems make them (.ipynb_checkpoints, __MACOSX, ._*)"].append(
                name
            )
    elif not name.isascii() and not is_text(name):
        if is_picture:
            tree.skipped["its name is not UTF-8; rename it"].append(name)
    elif is_picture and not (tree.folder / name).is_file():
        tree.skipped["a broken link, pipe or device"].append(name)
    elif suffix in UNREAD_SUFFIXES:
        tree.unread.append(name)
        tree.skipped["of a kind that is not read; make it PNG or JPEG"].append(name)
    else:
        (tree.pictures if is_picture else tree.others).append(name)


def is_text(name: str) -> bool:
    """Whether a name that a system gave is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def plain_name(name: str) -> str:
    """A file's name as other systems write it: accents composed (NFC; macOS decomposes them), /
    for Windows' backslash."""
    return PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/"))).as_posix()


class Index:
    """Finds the picture that an annotation file means."""

    def __init__(self, tree: Tree):
        self.names = set(tree.pictures) | set(tree.unread)
        self.plain, self.tails = defaultdict(list), defaultdict(list)
        for name in self.names:
            plain = plain_name(name)
            self.plain[plain].append(name)
            self.tails[PurePosixPath(plain).name].append((plain, name))

    def find(self, name: str, base: str) -> list[str]:
        """Pictures that `name` may mean in a file of the folder `base`: one, if all is well. Names
        are relative to that folder, or to that of the pictures, which may lie deeper or have moved
        as a whole."""
        for root in dict.fromkeys((base, ".")):
            exact = (PurePosixPath(root) / name).as_posix()
            if exact in self.names:
                return [exact]
            if found := self.plain.get(plain_name(exact)):
                return found
        plain = plain_name(name)
        moved = ABSOLUTE.match(plain)
        return [
            picture
            for other, picture in self.tails.get(PurePosixPath(plain).name, [])
            if f"/{other}".endswith(f"/{plain}") or moved and plain.endswith(f"/{other}")
        ]


def match_entries(tree: Tree, file: str, entries: list, columns: dict | None = None) -> Source:
    """The Source of an annotation file's entries (name, captions); columns: {name: ...} of it."""
    index, base = Index(tree), PurePosixPath(file).parent.as_posix()
    captions, found_columns, skipped = {}, {}, defaultdict(list)
    for name, lines in entries:
        found = index.find(name, base)
        if len(found) != 1:
            why = "fits several pictures of the folder" if found else "is not in the folder"
            skipped[f"{file} names it, and it {why}"].append(name)
        else:
            captions.setdefault(found[0], []).extend(lines)
            found_columns.setdefault(found[0], (columns or {}).get(name, {}))
    return Source(file, captions, found_columns, dict(skipped), [])


def read_metadata_file(tree: Tree, file: str) -> Source:
    """Captions of a metadata.jsonl or metadata.csv, with its other columns. Source: Hugging Face's
    image folders."""
    rows = read_rows(tree.folder / file)
    columns = {}
    for row in rows:
        columns.setdefault(row.name, row.columns)
    return match_entries(tree, file, [(row.name, row.captions) for row in rows], columns)


def read_coco_file(tree: Tree, file: str) -> Source:
    """Captions of COCO's caption annotations."""
    return match_entries(tree, file, read_coco(tree.folder / file))


def holds_captions(path: Path) -> bool:
    """Whether a JSON file is COCO's caption annotations, not those of objects, nor another's."""
    try:
        content = read_json(path, "annotations", MOST_TEXT)
    except UserError:
        return False
    annotations = content.get("annotations") if isinstance(content, dict) else None
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, dict) and "caption" in first and "images" in content


def read_lines_file(tree: Tree, file: str) -> Source:
    """Captions of a captions.txt, a line a picture: of those beside it, else of the one folder
    below it that has all pictures. Pictures of unread kinds have a line too."""
    base = PurePosixPath(file).parent
    names = sorted(
        name for name in tree.pictures + tree.unread if PurePosixPath(name).is_relative_to(base)
    )
    beside = [name for name in names if PurePosixPath(name).parent == base]
    folders = {PurePosixPath(name).parent for name in names}
    if not beside and len(folders) > 1:
        raise UserError(
            f"{tree.folder / file}: which line is whose? The pictures stand in {len(folders)} "
            f"folders; write a metadata.jsonl in its place, which names each"
        )
    names = beside or names
    paths = [tree.folder / name for name in names]
    lines = pair_lines(
        paths[0].parent if paths else tree.folder,
        tree.folder / file,
        paths,
        f"in place of {PurePosixPath(file).name}",
    )
    return Source(file, {name: [line] for name, line in zip(names, lines)}, {}, {}, [])


def stem_of(name: str) -> str:
    """A file's path without its suffix, by which a caption's own file finds its picture."""
    return plain_name(PurePosixPath(name).with_suffix("").as_posix())


def read_sidecars(tree: Tree, suffix: str) -> Source:
    """Captions that stand in a file of the picture's name beside it: its first line that is not
    blank, as kohya's trainers read it. Source: kohya-ss/sd-scripts, library/train_util.py."""
    stems, captions, several = defaultdict(list), {}, 0
    for name in tree.pictures + tree.unread:
        stems[stem_of(name)].append(name)
    files = [name for name in tree.others if PurePosixPath(name).suffix.lower() == suffix]
    alone = [name for name in files if stem_of(name) not in stems and not is_own(name)]
    for file in files:
        for name in stems.get(stem_of(file), []):
            text = read_text(tree.folder / file, "caption", MOST_CAPTION)
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            captions[name] = lines[:1] or [""]
            several += len(lines) > 1
    notes = (
        [f"{several} {suffix} files have several lines, of which the first is the caption"]
        if several
        else []
    )
    skipped = {f"a {suffix} file without a picture": alone} if alone else {}
    return Source(suffix, captions, {}, skipped, notes)


def is_own(name: str) -> bool:
    """Whether a text file's name says that it is no picture's caption."""
    return PurePosixPath(name).name.lower() in (LINES, "readme.txt", "license.txt")


def list_candidates(tree: Tree) -> list[Candidate]:
    """The conventions that a folder follows, those that name pictures first."""
    stems = {stem_of(name) for name in tree.pictures + tree.unread}
    found = []
    for file in tree.others:
        name = PurePosixPath(file).name
        is_beside = stem_of(file) in stems
        if name in METADATA:
            found.append(Candidate(name, file, lambda file=file: read_metadata_file(tree, file)))
        elif name == LINES and not is_beside:
            found.append(Candidate(name, file, lambda file=file: read_lines_file(tree, file)))
        elif name.endswith(".json") and not is_beside and holds_captions(tree.folder / file):
            found.append(Candidate(".json", file, lambda file=file: read_coco_file(tree, file)))
    for suffix in SIDECARS:
        if any(
            PurePosixPath(file).suffix.lower() == suffix and stem_of(file) in stems
            for file in tree.others
        ):
            found.append(
                Candidate(suffix, suffix, lambda suffix=suffix: read_sidecars(tree, suffix))
            )
    order = [*METADATA, LINES, ".json", *SIDECARS]
    return sorted(found, key=lambda candidate: order.index(candidate.kind))


def read_folder_name(folder: Path, name: str) -> tuple[int, str] | None:
    """(repeats, class words) of the folder 10_name that a picture stands in, None where its folder
    has no such name. Source: kohya-ss/sd-scripts, library/config_util.py."""
    match = REPEATED.fullmatch((Path(os.path.abspath(folder)) / name).parent.name)
    return (int(match[1]), match[2].strip()) if match else None
