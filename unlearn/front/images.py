"""The training images that are asked about: people's folders, with class images beside them."""

from pathlib import Path

from ..datasets.class_images import add_class_images, check_apart, read_class_images
from ..datasets.entries import Found
from ..datasets.folders import read_folder
from ..errors import UserError
from ..runtime.programs import say

FEWEST_IMAGES = 2


def check_images(found: Found) -> None:
    """Raises UserError where there is nothing to rank."""
    if len(found.entries) < FEWEST_IMAGES:
        raise UserError(
            f"{found.folder}: only {len(found.entries)} training image, which leaves nothing to "
            f"rank; give the folder of all images that the model was trained on"
        )


def read_images(
    images: str | Path,
    caption: str | None,
    captions: str | None,
    groups: str | None,
    class_images: str | Path | None,
    class_prompt: str | None,
    place: Path,
) -> Found:
    """The training images, and with them the class images where there are any; what was found is
    said. place: where pictures of data sets are written. Raises UserError as `read_folder`."""
    if class_images is None:
        if class_prompt is not None:
            raise UserError("--class_prompt: means nothing without --class_images FOLDER")
    else:
        check_apart(images, class_images)
    found = read_folder(images, caption, captions, groups, place / "pictures")
    for line in found.describe():
        say(line)
    if class_images is None:
        return found
    classes = read_class_images(class_images, class_prompt, place / "class_pictures")
    for line in classes.describe():
        say(line)
    return add_class_images(found, classes, groups is None)
