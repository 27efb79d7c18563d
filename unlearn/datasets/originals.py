"""Which of the user's files each picture of a made data root is: `originals.json`, beside its
dataset.json."""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError
from ..storage.artifacts import write_json
from ..storage.reading import MOST_TEXT, read_json
from .settings import read_settings

ORIGINALS = "originals.json"
LISTS = ("added", "removed", "replaced", "recaptioned", "regrouped")


@dataclass(frozen=True)
class Original:
    """A picture of a made data root."""

    file: str  # below the root's folder of images
    name: str  # below the user's folder: what people know it by
    content: str  # hash of its bytes
    captions: list[str]
    group: str | None = None
    repeats: int = 1  # how often an epoch showed it
    path: str | None = None  # of the user's file, absolute, where it is not below that folder


@dataclass(frozen=True)
class Plan:
    """What a data root is made of."""

    folder: str  # the user's, absolute
    settings: dict  # that were given for dataset.json
    pictures: list[Original]


def write_plan(root: Path, plan: Plan, stale: Collection[str] = ()) -> None:
    """Writes originals.json. stale: files in the images' folder that an earlier plan made."""
    write_json(root / ORIGINALS, {**asdict(plan), "stale": sorted(stale)})


def read_plan(root: Path) -> tuple[Plan, set[str]] | None:
    """The plan of a data root, and the files of its images' folder that earlier plans made; None
    where it was not made of a folder. Raises UserError where its file is damaged."""
    path = Path(root) / ORIGINALS
    if not path.exists():
        return None
    content = read_json(path, "originals", MOST_TEXT)
    try:
        pictures = [Original(**picture) for picture in content["pictures"]]
        plan = Plan(content["folder"], content["settings"], pictures)
        stale = content["stale"]
        texts = [plan.folder, *stale]
        for picture in pictures:
            texts += [picture.file, picture.name, picture.content, *picture.captions]
            texts += [text for text in (picture.group, picture.path) if text is not None]
        is_right = all(isinstance(text, str) for text in texts) and isinstance(plan.settings, dict)
    except (KeyError, TypeError):
        is_right = False
    if not is_right:
        raise UserError(
            f"originals {path}: not what this program writes; remove it with the data root, which "
            f"is made again"
        )
    return plan, {picture.file for picture in pictures} | set(stale)


def compare_plans(old: Plan, new: Plan) -> dict[str, list[str]]:
    """What became different, {one of LISTS: names of pictures}, {} where all is the same."""
    before = {picture.name: picture for picture in old.pictures}
    after = {picture.name: picture for picture in new.pictures}
    both = [(before[name], picture) for name, picture in after.items() if name in before]
    lists = (
        [name for name in after if name not in before],
        [name for name in before if name not in after],
        [new.name for old, new in both if old.content != new.content],
        [new.name for old, new in both if old.captions != new.captions],
        [new.name for old, new in both if (old.group, old.repeats) != (new.group, new.repeats)],
    )
    return {what: names for what, names in zip(LISTS, lists) if names}


def read_originals(dataroot: str | Path) -> dict[str, Original]:
    """What is known of the pictures of a made data root, by their paths below its folder of images;
    {} of another root."""
    found = read_plan(Path(dataroot))
    return {picture.file: picture for picture in found[0].pictures} if found else {}


def find_own_file(dataroot: str | Path, path: Path) -> Path:
    """The user's file that a picture of a data root is, `path` itself where the root was made of no
    folder."""
    found = read_plan(Path(dataroot))
    if found is None:
        return path
    images = Path(dataroot) / read_settings(dataroot)["images"]
    file, plan = os.path.relpath(path, images), found[0]
    own = next((picture for picture in plan.pictures if picture.file == file), None)
    return path if own is None else Path(own.path or os.path.join(plan.folder, own.name))


def list_names(dataroot: str | Path, paths: Sequence[Path | None]) -> list[str | None]:
    """The names by which people know pictures of a data root (`TrainingSet.paths`): those of their
    own folder where the root was made of one, else the paths below its folder of images; None where
    there is no picture."""
    folder, originals = Path(dataroot) / read_settings(dataroot)["images"], read_originals(dataroot)
    files = [None if path is None else os.path.relpath(path, folder) for path in paths]
    return [originals[file].name if file in originals else file for file in files]
