"""Moves a file or folder to its place by renaming; what stands there already must be the same.

    python place.py ROOT SOURCE TARGET [STEM WRAPPER...]

For the content of an archive: STEM is the archive's name, WRAPPERs are the folders on the way to
it.
"""

import filecmp
import os
import sys
from pathlib import Path

root, source, target = map(Path, sys.argv[1:4])
stem, wrappers = "".join(sys.argv[4:5]), {"dataset", "data", "abc", *sys.argv[5:]}


def same(source, target):
    if source.is_symlink() or target.is_symlink():
        return (
            source.is_symlink()
            and target.is_symlink()
            and os.readlink(source) == os.readlink(target)
        )
    return source.is_file() and target.is_file() and filecmp.cmp(source, target, shallow=False)


def merge(source, target):
    if not os.path.lexists(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
    elif source.is_dir() and not source.is_symlink() and target.is_dir():
        for child in sorted(source.iterdir()):
            merge(child, target / child.name)
        source.rmdir()
    elif same(source, target):
        source.unlink()
    else:
        sys.exit(
            f"error: {target}: is there and is not the benchmark's; move it away and run the "
            f"same command again"
        )


def inner_folder(folder):
    """The one folder inside that only repeats a name of the way to it, as synth_test in
    synth_test/imagenet/..."""
    children = list(folder.iterdir())
    wrapped = len(children) == 1 and children[0].name in wrappers and children[0].is_dir()
    return children[0] if wrapped and not children[0].is_symlink() else None


def names_a_folder(stem):
    """Whether an archive's own name is a folder of the layout (images.7z, imagenet.7z)."""
    lists = [*root.glob("json/test_*.json"), *root.glob(".download/*/json/test_*.json")]
    return stem in ("images", "sample") or any(f"/{stem}/" in path.read_text() for path in lists)


if stem:
    while inner := inner_folder(source):
        source = inner
    if stem not in wrappers and names_a_folder(stem) and not (source / stem).exists():
        target = target / stem
try:
    merge(source, target)
except OSError as error:
    sys.exit(
        f"error: {error.filename2 or error.filename or target}: cannot be written "
        f"({error.strerror})"
    )
