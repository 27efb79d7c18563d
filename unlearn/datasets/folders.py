"""People's folders of training images, read as they are: each picture with its captions, its group
and how often it was seen, whatever convention says so."""

import difflib
import os
import shlex
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..runtime.printing import shorten
from .annotations import check_unicode
from .captions import IMAGE_SUFFIXES, find_overlooked
from .conventions import (
    METADATA,
    SIDECARS,
    Candidate,
    Source,
    Tree,
    list_candidates,
    list_tree,
    read_folder_name,
)
from .entries import NAMES_SHOWN, Entry, Found, group_name
from .hub import is_dataset, read_dataset
from .presence import check_images

OVERLOOKED = "a picture by its first bytes, not by its suffix; rename it"
FOLDER = "folder"  # as captions: the folders' names; as groups: a group for each folder


@dataclass(frozen=True)
class Taken:
    """What all conventions together say of pictures, by their names."""

    captions: dict[str, list[str]]
    origins: dict[str, str]  # which convention gave them, in words


def read_folder(
    folder: str | Path,
    caption: str | None = None,
    captions: str | None = None,
    groups: str | None = None,
    pictures: str | Path | None = None,
) -> Found:
    """Reads a folder of training images by whatever convention its captions follow, or a Hugging
    Face data set (hf:NAME, or a folder that save_to_disk wrote).

    caption: of the pictures that have none, so of all where the folder says nothing (DreamBooth).
    captions: which convention counts where several disagree: metadata.jsonl, metadata.csv,
    captions.txt, .json (COCO), .txt or .caption (beside the pictures), a file's path, or "folder"
    (the folders' names). groups: "folder", or a column of the metadata file (artist, licence).
    pictures: where a data set's pictures are written; its captions and groups are columns.
    Raises UserError where the folder has no pictures, no captions, or captions that disagree.
    """
    check_unicode("--caption", [caption or ""])
    if is_dataset(folder):
        if pictures is None:
            raise UserError(f"{folder}: a data set, and no folder is given for its pictures")
        return read_dataset(folder, pictures, caption, captions, groups)
    folder = Path(folder)
    check_images(folder)
    tree = list_tree(folder)
    sources = [] if captions == FOLDER else read_sources(tree, captions)
    taken = merge_sources(tree, sources)
    entries, origins = pair_pictures(tree, taken, caption, captions == FOLDER)
    check_found(tree, entries, sources)
    skipped = list_skipped(tree, sources, origins.pop("", []))
    notes = [note for source in sources for note in source.notes]
    if groups:
        entries, more = group_entries(tree, entries, groups)
        notes += more
    words = " and ".join(
        label if len(origins) == 1 else f"{label} ({len(names)})"
        for label, names in origins.items()
    )
    return Found(os.fspath(folder), entries, words, skipped, notes)


def list_skipped(tree: Tree, sources: list[Source], alone: list[str]) -> dict[str, list[str]]:
    """{why: names} of all that is no training image, or names none; alone: pictures without a
    caption."""
    skipped = defaultdict(list)
    for part in (tree.skipped, *(source.skipped for source in sources)):
        for why, names in part.items():
            skipped[why].extend(names)
    listed = [tree.folder / name for name in tree.pictures + tree.unread]
    found = [path.relative_to(tree.folder) for path in find_overlooked(tree.folder, listed)]
    overlooked = {path.as_posix() for path in found}.intersection(tree.others)
    if overlooked:
        skipped[OVERLOOKED] += sorted(overlooked)
    if alone:
        skipped["without a caption; --caption gives them one"].extend(alone)
    return dict(skipped)


def read_sources(tree: Tree, choice: str | None) -> list[Source]:
    """Captions of every convention that the folder follows, or of the chosen one alone. Raises
    UserError where that is not there."""
    candidates = list_candidates(tree)
    if choice is None:
        return [read_candidate(candidate, candidates) for candidate in candidates]
    chosen = [found for found in candidates if choice in (found.kind, found.choice)]
    if not chosen:
        there = ", ".join(dict.fromkeys(found.choice for found in candidates)) or "none"
        raise UserError(
            f"--captions {choice}: {tree.folder} has no such captions; there: {there}; "
            f'"{FOLDER}" takes the names of the folders'
        )
    return [candidate.read() for candidate in chosen]


def read_candidate(candidate: Candidate, candidates: list[Candidate]) -> Source:
    """Captions of one of several conventions. Raises UserError, with the others as ways on, where
    they cannot be read."""
    try:
        return candidate.read()
    except UserError as error:
        others = [other.choice for other in candidates if other is not candidate]
        ways = " or ".join(f"--captions {shlex.quote(choice)}" for choice in others)
        raise UserError(f"{error}{f'; or take other captions: {ways}' if ways else ''}") from None


def merge_sources(tree: Tree, sources: list[Source]) -> Taken:
    """All conventions' captions as one. Raises UserError where two of them disagree on a picture:
    nothing says which of them the model was trained with."""
    taken, first = Taken({}, {}), {}
    for source in sources:
        for name, lines in source.captions.items():
            if not lines:
                continue
            there = taken.captions.setdefault(name, lines)
            if [line.strip() for line in there] != [line.strip() for line in lines]:
                refuse_disagreement(
                    tree, name, [(first[name], taken.captions[name]), (source, lines)]
                )
            first.setdefault(name, source)
            taken.origins.setdefault(name, source.label)
    return taken


def refuse_disagreement(tree: Tree, name: str, pair: list[tuple[Source, list[str]]]) -> None:
    """Raises UserError: two conventions give a picture other captions."""
    ways = " or ".join(f"--captions {shlex.quote(source.choice)}" for source, _ in pair)
    texts = " and ".join(
        f'"{shorten(lines[0])}"' + (f" and {len(lines) - 1} more" if lines[1:] else "")
        for _, lines in pair
    )
    raise UserError(
        f"{tree.folder}: {' and '.join(source.label for source, _ in pair)} disagree, first on "
        f"{name}: {texts}; say which the model was trained with: {ways}"
    )


def pair_pictures(
    tree: Tree, taken: Taken, caption: str | None, by_folder: bool
) -> tuple[list[Entry], dict[str, list[str]]]:
    """Entries of the pictures that have captions, and {where these stood: names}; under "" those
    that have none."""
    entries, origins = [], defaultdict(list)
    for name in tree.pictures:
        repeats, words = read_folder_name(tree.folder, name) or (1, "")
        if by_folder and not words:
            words = (Path(os.path.abspath(tree.folder)) / name).parent.name
        if name in taken.captions:
            origin, lines = taken.origins[name], taken.captions[name]
        elif caption is not None and not by_folder:
            origin, lines = "one caption for all", [caption]
        else:
            origin, lines = ("the names of their folders", [words]) if words else ("", [])
        origins[origin].append(name)
        if lines:
            entries.append(Entry(tree.folder / name, name, list(lines), None, repeats))
    if "one caption for all" in origins and len(origins) > 1:
        origins["one caption for the others"] = origins.pop("one caption for all")
    return entries, dict(origins)


def check_found(tree: Tree, entries: list[Entry], sources: list[Source]) -> None:
    """Raises UserError where a folder has no pictures, or no captions."""
    reasons = "".join(f"; {len(names)} {why}" for why, names in tree.skipped.items())
    if not tree.pictures:
        raise UserError(
            f"{tree.folder}: no pictures ({', '.join(sorted(IMAGE_SUFFIXES))}){reasons}"
        )
    if not entries:
        strange = [name for name in tree.others if name.endswith(".json")]
        hints = [f"{names[0]}: {why}" for part in sources for why, names in part.skipped.items()]
        hints += [f"{strange[0]} is no such annotations"] if strange else []
        raise UserError(
            f"{tree.folder}: {len(tree.pictures)} pictures, none with a caption; looked for "
            f"{', '.join(METADATA)}, captions.txt, COCO's caption annotations (.json), "
            f"{' and '.join(SIDECARS)} beside the pictures and folders such as 10_name"
            f"{''.join(f'; {hint}' for hint in hints[:NAMES_SHOWN])}; if all were trained with "
            f'one, give it: --caption "a photo of sks dog"'
        )


def group_entries(tree: Tree, entries: list[Entry], groups: str) -> tuple[list[Entry], list[str]]:
    """The entries with their groups, and notes. Raises UserError where no metadata file has the
    column."""
    if groups == FOLDER:
        folders = [PurePosixPath(entry.name).parent.as_posix() for entry in entries]
        return [replace(entry, group=name) for entry, name in zip(entries, folders)], []
    files = [found for found in list_candidates(tree) if found.kind in METADATA]
    columns = defaultdict(dict)
    for name, row in (item for file in files for item in file.read().columns.items()):
        columns[name] = {**row, **columns[name]}
    known = sorted({key for row in columns.values() for key in row})
    if groups not in known:
        like = difflib.get_close_matches(groups, known, 1)
        raise UserError(
            f"--groups {groups}: {tree.folder} has no such column; "
            f"{f'did you mean {like[0]}? ' if like else ''}there: {', '.join(known) or 'none'}; "
            f'"{FOLDER}" makes a group of each folder'
        )
    values = [group_name(columns[entry.name].get(groups)) for entry in entries]
    alone = values.count(None)
    return (
        [replace(entry, group=value) for entry, value in zip(entries, values)],
        [f"{alone} of {len(entries)} pictures have no {groups}"] if alone else [],
    )
