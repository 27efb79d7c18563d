"""Why an answer may mean little, as far as the picture, its prompt and the folder tell."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..datasets.captions import IMAGE_SUFFIXES, UNREAD_SUFFIXES
from ..datasets.entries import NAMES_SHOWN, Found
from ..datasets.folders import OVERLOOKED
from ..datasets.pictures import read_header
from ..datasets.roots import IMAGES, file_name
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..runtime.printing import shorten
from ..storage.hashes import hash_file
from .questions import Question

KNOWN_SUFFIXES = {*IMAGE_SUFFIXES, *UNREAD_SUFFIXES}
UNREADABLE = "cannot be read"
SAME_LATENT = 1e-3  # relative: what the same picture in another file differs by
TRIVIAL = (
    "the picture is a training image itself ({}): that it is its own most influential image says "
    "nothing of the model"
)
COMMON = 0.9  # of the captions: a word in so many may be what calls the model's subject
MOST = 0.5  # of the images: where more are cropped, all scores are in doubt
# A word, or one character of a script that is written without spaces.
WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[<\\w][\\w'>-]*")
FREQUENT_WORDS = {
    *("a", "an", "and", "at", "by", "for", "from", "image", "in", "is", "it", "its", "of", "on"),
    *("or", "photo", "picture", "the", "this", "to", "with"),
}


def find_words(text: str) -> set[str]:
    """The words of a text that tell something."""
    return set(WORD.findall(text.lower())) - FREQUENT_WORDS


def find_missing_words(prompt: str, captions: Sequence[str]) -> list[str]:
    """Words that nearly all captions have and a prompt has not: one of them may be what calls the
    subject that a model was trained on."""
    counts = Counter(word for caption in captions for word in find_words(caption))
    common = [word for word, count in counts.items() if count >= COMMON * len(captions)]
    return sorted(set(common) - find_words(prompt))


def is_foreign(prompt: str, captions: Sequence[str]) -> bool:
    """Whether no caption has a word of a prompt, in singular or plural."""
    words = {word.rstrip("s") for word in find_words(prompt)}
    return bool(words) and not any(
        word.rstrip("s") in words for caption in captions for word in find_words(caption)
    )


def check_prompt(prompt: str, captions: Sequence[str]) -> list[str]:
    """A caution where the prompt lacks words that nearly all captions have, or has none that any
    caption has; else []."""
    if missing := find_missing_words(prompt, captions):
        listed = ", ".join(f'"{shorten(word)}"' for word in missing[:3])
        return [
            f"nearly all captions have {listed} and the prompt has not: if that is what calls the "
            f"model's subject, these images had little to do with the picture"
        ]
    if is_foreign(prompt, captions):
        return [
            "no caption has a word of the prompt: another prompt may have made the picture, or "
            "other images taught the model what it says"
        ]
    return []


def check_copy(found: Found, question: Question) -> list[str]:
    """A caution where the picture is a training image itself, byte for byte; else []."""
    size, content = os.path.getsize(question.picture), hash_file(question.picture)
    for entry in found.entries:
        if os.path.getsize(entry.path) == size and hash_file(entry.path) == content:
            return [TRIVIAL.format(entry.name)]
    return []


def find_same(query: TrainingSet, images: TrainingSet, names: list[str]) -> list[str]:
    """A caution where a training image has the query's latent: the same picture in another file."""
    latent = query.latents[0, 0].astype(np.float64)
    for index, name in enumerate(names):
        difference = np.linalg.norm(images.latents[0, index] - latent)
        if difference <= SAME_LATENT * np.linalg.norm(latent):
            return [TRIVIAL.format(name)]
    return []


def check_crops(found: Found) -> tuple[list[str], list[str]]:
    """(cautions, remarks) where training images lose a third or more, because only the square in
    their centre is used: in doubt is the answer where most of them do."""
    cropped = [entry.name for entry in found.entries if read_header(entry.path)[1]]
    if not cropped:
        return [], []
    said = (
        f"{len(cropped)} of {len(found.entries)} training images ({', '.join(cropped[:3])}"
        f"{', ...' if cropped[3:] else ''}) are long or tall: only the square in their centre is "
        f"compared, a third or more of them is not"
    )
    is_most = len(cropped) > MOST * len(found.entries)
    return ([said], []) if is_most else ([], [f"{said}."])


def check_crop(question: Question) -> list[str]:
    """A caution where the picture itself loses a third or more; else []. One that the model made
    here has its own latent."""
    if question.latents or not read_header(question.picture)[1]:
        return []
    return ["the picture is long or tall: only the square in its centre is looked at"]


def is_image(name: str) -> bool:
    """Whether what a folder's reader skipped is an image of it, by its name: no file that a system
    keeps for itself, no text; a data set's rows have numbers alone."""
    path = PurePosixPath(name)
    is_hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return name.startswith("row ") or not is_hidden and path.suffix.lower() in KNOWN_SUFFIXES


def list_left_out(found: Found, images: TrainingSet, root: Path) -> dict[str, list[str]]:
    """{why: names} of the images that are not ranked: those that the folder's reader left out, and
    those that encoding did. root: the data root of the images."""
    left: dict[str, list[str]] = {}
    known = {entry.name for entry in found.entries}
    for why, names in found.skipped.items():
        chosen = [name for name in names if name not in known]
        left[why] = [name for name in chosen if is_image(name) or why == OVERLOOKED]
        known.update(left[why])
    kept = {os.path.abspath(path) for path in images.paths if path}
    left[UNREADABLE] = [
        entry.name
        for entry in found.entries
        if kept and os.path.abspath(root / IMAGES / file_name(entry.name)) not in kept
    ]
    return {why: names for why, names in left.items() if names}


def describe_left_out(left: dict[str, list[str]], num_ranked: int) -> list[str]:
    """A remark where images were left out; else []."""
    if not left:
        return []
    count = sum(map(len, left.values()))
    parts = [
        f"{', '.join(shorten(name, 80) for name in names[:NAMES_SHOWN])}"
        f"{', ...' if names[NAMES_SHOWN:] else ''} ({why})"
        for why, names in left.items()
    ]
    was = "was" if count == 1 else "were"
    return [
        f"{count} of {num_ranked + count} images {was} left out and cannot appear in the ranking: "
        f"{'; '.join(parts)}."
    ]


def find_cautions(
    found: Found,
    images: TrainingSet,
    tasks: list[Task],
    questions: list[Question],
    queries: list[TrainingSet],
    root: Path,
) -> tuple[dict[str, list[str]], list[str]]:
    """({path of a picture: cautions}, remarks that hold for all pictures). root: of the images."""
    names = [entry.name for entry in found.entries] if len(found.entries) == len(images) else []
    instances = [entry for entry in found.entries if not entry.is_class]
    captions = [caption for entry in instances for caption in entry.captions]
    of_folder, remarks = check_crops(found)
    cautions = {}
    for task, question, query in zip(tasks, questions, queries):
        copied = check_copy(found, question) or find_same(query, images, names or images.ids)
        cautions[task.synth_image_path] = [
            *check_prompt(question.prompt, captions),
            *copied,
            *check_crop(question),
            *of_folder,
        ]
    left_out = describe_left_out(list_left_out(found, images, root), len(images))
    return cautions, [*left_out, *remarks]
