"""What kohya's trainer writes into the header of a LoRA (ss_...), and where the training images at
hand are not those that it tells of."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.printing import shorten
from .lora_files import read_object
from .model import Model

COMMON = 0.9  # of the images: a tag that so many have may be what calls the subject
MOST_SHOWN = 3


@dataclass(frozen=True)
class Header:
    """What a trainer says of its run; None or nothing where it does not."""

    resolution: tuple[int, int] | None = None  # width and height
    folders: dict[str, tuple[int, int]] = field(default_factory=dict)  # images, repeats
    tags: dict[str, int] = field(default_factory=dict)  # parts of captions between commas
    flips: bool | None = None
    buckets: bool | None = None  # pictures of several shapes, not cropped square
    clip_skip: int | None = None
    guidance: float | None = None  # that FLUX was told

    @property
    def num_images(self) -> int:
        """How many it was trained on, 0 where it does not say."""
        return sum(images for images, _ in self.folders.values())

    @property
    def side(self) -> int | None:
        """Pixels of a side of its pictures, None where it does not say or they were not square."""
        if self.resolution is None or self.resolution[0] != self.resolution[1]:
            return None
        return self.resolution[0]

    @property
    def trigger(self) -> str | None:
        """The caption of all images, where all had one and the same."""
        [most] = Counter(self.tags).most_common(1) or [("", 0)]
        is_only = len(self.tags) == 1 and 0 < self.num_images <= most[1]
        return most[0] if is_only else None


def read_pair(text: str | None) -> tuple[int, int] | None:
    """Width and height of a text such as (512, 768), 512,768 or 512."""
    found = re.fullmatch(r"\s*\(?\s*(\d{1,5})\s*(?:,\s*(\d{1,5})\s*)?\)?\s*", text or "")
    return (int(found[1]), int(found[2] or found[1])) if found else None


def read_bool(value: Any) -> bool | None:
    """True or False of what a header says, None where it says neither."""
    return {"true": True, "false": False}.get(str(value).lower())


def is_count(value: Any) -> bool:
    """Whether a value counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def parse_header(fields: dict[str, str]) -> Header:
    """The Header in a file's fields; what is not as kohya writes it is passed over."""
    folders = {
        name: (found["img_count"], found["n_repeats"])
        for name, found in read_object(fields.get("ss_dataset_dirs")).items()
        if isinstance(found, dict)
        and is_count(found.get("img_count"))
        and is_count(found.get("n_repeats"))
    }
    tags: Counter[str] = Counter()
    for counts in read_object(fields.get("ss_tag_frequency")).values():
        for tag, count in counts.items() if isinstance(counts, dict) else ():
            if tag.strip() and is_count(count):
                tags[tag.strip()] += count
    skip = re.fullmatch(r"\d", fields.get("ss_clip_skip", ""))
    guidance = re.fullmatch(r"\d{1,4}(\.\d{1,9})?", fields.get("ss_guidance_scale", ""))
    return Header(
        read_pair(fields.get("ss_resolution")),
        folders,
        dict(tags),
        read_flips(fields),
        read_bool(fields.get("ss_enable_bucket")),
        int(skip[0]) if skip else None,
        float(guidance[0]) if guidance else None,
    )


def read_flips(fields: dict[str, str]) -> bool | None:
    """Whether any image was mirrored, by the newer field of all data sets or the older one."""
    wrapped = read_object(f'{{"all": {fields["ss_datasets"]}}}') if "ss_datasets" in fields else {}
    datasets = wrapped.get("all")
    found = [
        read_bool(subset.get("flip_aug"))
        for dataset in (datasets if isinstance(datasets, list) else [])
        if isinstance(dataset, dict) and isinstance(dataset.get("subsets"), list)
        for subset in dataset["subsets"]
        if isinstance(subset, dict)
    ]
    if not found:
        return read_bool(fields.get("ss_flip_aug"))
    return True if True in found else (False if False in found else None)


def compare_header(
    header: Header,
    captions: Sequence[Sequence[str]],
    resolution: int | None = None,
    repeats: Sequence[int] | None = None,
    model: Model | None = None,
) -> list[str]:
    """Sentences on what a header says otherwise than the training images at hand: their captions,
    the pixels of a side that they are brought to, and how often an epoch shows each, where that is
    known; or than the model that they are shown to."""
    notes = []
    if header.num_images and header.num_images != len(captions):
        notes.append(
            f"the LoRA was trained on {header.num_images} images by its header, here are "
            f"{len(captions)}: influence of those that are missing cannot be seen"
        )
    if header.resolution and resolution and header.resolution != (resolution, resolution):
        width, height = header.resolution
        notes.append(
            f"the LoRA was trained at {width} x {height} pixels by its header, here are "
            f"{resolution} x {resolution}"
        )
    if header.buckets:
        notes.append(
            "the LoRA was trained on pictures of several shapes by its header (buckets), here all "
            "are cropped to squares"
        )
    told = model.identity.get("guidance") if model else None
    if header.guidance is not None and told is not None and header.guidance != told:
        notes.append(
            f"the LoRA was trained with a guidance of {header.guidance:g} by its header, here the "
            f"model is told {told:g}"
        )
    follows = model is None or model.family.follows_clip_skip
    if follows and header.clip_skip and header.clip_skip > 1:
        notes.append(
            f"the LoRA was trained with clip skip {header.clip_skip} by its header, here the text "
            f"encoder's last layer is read"
        )
    if header.flips is False:
        notes.append(
            "the LoRA saw no mirrored images by its header; here each counts by the larger of both "
            "views"
        )
    return [*notes, *compare_repeats(header, repeats), *compare_captions(header, captions)]


def compare_repeats(header: Header, repeats: Sequence[int] | None) -> list[str]:
    """`compare_header` of how often an epoch shows each image."""
    said = Counter({count: 0 for _, count in header.folders.values()})
    for images, count in header.folders.values():
        said[count] += images
    if repeats is None or len(said) < 2 or header.num_images != len(repeats):
        return []  # where all are repeated alike it does not matter how often
    if said == Counter(repeats):
        return []
    shown = ", ".join(f"{images} images {count} times" for count, images in sorted(said.items()))
    return [
        f"an epoch showed {shown} by the LoRA's header, the names of the folders here say otherwise; "
        f"name them as they were, such as {shorten(next(iter(header.folders)), 60)}"
    ]


def compare_captions(header: Header, captions: Sequence[Sequence[str]]) -> list[str]:
    """`compare_header` of captions: tags that most images had and none has here."""
    here = {part.strip() for few in captions for caption in few for part in caption.split(",")}
    whole = {caption.strip() for few in captions for caption in few}
    most = max(header.tags.values(), default=0)
    lost = [
        tag
        for tag, count in header.tags.items()
        if count >= COMMON * most and tag not in here and tag not in whole
    ]
    if not lost:
        return []
    shown = ", ".join(f'"{shorten(tag, 60)}"' for tag in lost[:MOST_SHOWN])
    return [
        f"captions that the LoRA was trained with by its header are none of those here: {shown}"
        + (f" and {len(lost) - MOST_SHOWN} more" if lost[MOST_SHOWN:] else "")
    ]
