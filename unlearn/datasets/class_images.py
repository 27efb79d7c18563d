"""Class images of prior preservation (DreamBooth): pictures of the subject's class, often the base
model's own, that keep a fine-tuned model from forgetting it. They are trained on like the others, and
so they are candidates too."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..runtime.printing import shorten
from .entries import Entry, Found
from .folders import read_folder

PREFIX = "class_images"  # of their names, below which they stand in a data root
GROUPS = ("instance images", "class images")  # on the page, unless other groups are asked for


def check_apart(images: str | Path, class_images: str | Path) -> None:
    """Raises UserError where a picture would count as both."""
    first, second = (Path(os.path.realpath(folder)) for folder in (images, class_images))
    if first == second or second.is_relative_to(first) or first.is_relative_to(second):
        raise UserError(
            f"--class_images {class_images}: one folder with --images {images}, or inside it, so "
            f"that pictures would count twice; give two folders beside each other"
        )


def read_class_images(
    folder: str | Path, class_prompt: str | None, pictures: str | Path | None = None
) -> Found:
    """The class images in a folder, by any convention. class_prompt: the caption of those that have
    none, which is all of them where a trainer made them; pictures: where a data set's are written.
    Raises UserError as `read_folder`, by the names of these flags."""
    try:
        return read_folder(folder, class_prompt, pictures=pictures)
    except UserError as error:
        said = str(error).replace("--caption ", "--class_prompt ")
        raise UserError(said.replace("a photo of sks dog", "a photo of a dog")) from None


def add_class_images(found: Found, classes: Found, with_groups: bool) -> Found:
    """The training images of a folder with the class images beside them, whose names begin with
    PREFIX. with_groups: whether the page shows both as groups, because no others were asked for.
    Raises UserError where one of the others has such a name."""
    if taken := [each.name for each in found.entries if each.name.startswith(f"{PREFIX}/")]:
        raise UserError(
            f"{found.folder}: {shorten(taken[0], 80)}: this is where the class images will stand; "
            f"rename its folder: mv {shlex.quote(os.path.join(found.folder, PREFIX))} "
            f"{shlex.quote(os.path.join(found.folder, 'more_images'))}"
        )
    fewest = min(len(entry.captions) for entry in found.entries)
    own, other = GROUPS if with_groups else (None, GROUPS[1])
    entries = [replace(each, group=own) if with_groups else each for each in found.entries]
    for each in classes.entries:
        # As many captions as the others have at least: the fewest of all images count.
        captions = (each.captions * fewest)[: max(fewest, len(each.captions))]
        entries.append(Entry(each.path, f"{PREFIX}/{each.name}", captions, other, 1, True))
    skipped = {why: list(names) for why, names in found.skipped.items()}
    for why, names in classes.skipped.items():
        skipped.setdefault(why, []).extend(f"{PREFIX}/{name}" for name in names)
    return replace(
        found,
        entries=sorted(entries, key=lambda entry: entry.name),
        skipped=skipped,
        notes=[*found.notes, *classes.notes],
    )
