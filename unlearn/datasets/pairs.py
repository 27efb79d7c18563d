"""Images of a training set with their captions: which there are, which can be read, and what people should know
of them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

from ..errors import UserError
from ..runtime.printing import shorten
from ..runtime.programs import log, progress, say
from ..storage.records import record_path
from .captions import PAIRS_SHOWN, find_overlooked, pair_images
from .encoders import Encoder, count_tokens, find_unknown
from .originals import find_own_file
from .pictures import ODDITIES, list_notes, read_picture
from .settings import read_settings
from .training_sets import array_paths, read_identity

THREADS, AHEAD = 4, 1000  # that read images, and how many are read ahead


Given = TypeVar("Given")


Seen = TypeVar("Seen")


def map_files(
    function: Callable[[Given], Seen], paths: Sequence[Given], description: str
) -> Iterator[Seen]:
    """`function` of each path, in order, by several threads; of many, with progress."""
    bar = progress(len(paths), description, "images") if len(paths) > 10 * AHEAD else None
    with ThreadPoolExecutor(THREADS) as pool, nullcontext() if bar is None else bar:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(function, paths[start : start + AHEAD])
            if bar is not None:
                bar.update(len(paths[start : start + AHEAD]))


def find_unreadable(paths: Sequence[Path]) -> tuple[dict[Path, str], dict[str, list[Path]]]:
    """Why images cannot be read, {path: reason}, and what is odd about the others, {oddity: [path,
    ...]}: each is decoded once."""

    def look(path):
        try:
            return None, read_picture(path)[1]
        except UserError as error:
            return str(error), set()

    found = list(zip(paths, map_files(look, paths, "checking images")))
    return (
        {path: reason for path, (reason, _) in found if reason},
        {
            oddity: [path for path, (_, oddities) in found if oddity in oddities]
            for oddity in ODDITIES
        },
    )


def list_pairs(dataroot: str | Path, num_captions: int = 0) -> tuple[list[Path], list[list[str]]]:
    """Paths and captions (a list of each image's, all as long) from which latents and embeddings
    are made. The number of captions is the one given, else of dataset.json, else as they were made
    last. Raises UserError where images or captions are alone."""
    settings, (latents_path, embeddings_path) = read_settings(dataroot), array_paths(dataroot)
    recorded = (
        read_identity(latents_path).get("num_captions", 0)
        if record_path(latents_path).exists()
        else 0
    )
    folder = Path(dataroot) / settings["images"]
    captions_path = Path(dataroot) / settings["captions"]
    try:
        return pair_images(
            folder, captions_path, num_captions or settings["num_captions"] or recorded
        )
    except UserError as error:
        if latents_path.exists() and embeddings_path.exists():
            raise
        raise UserError(
            f"{dataroot}: has no {latents_path.name} and {embeddings_path.name}, nor "
            f"{settings['images']} with "
            f"{settings['captions']} to make them from: {error}"
        ) from None


def read_left_out(dataroot: str | Path) -> list[str]:
    """The images that were left out when latents were made last, by their record."""
    path = array_paths(dataroot)[0]
    return read_identity(path).get("left_out", []) if record_path(path).exists() else []


def list_left_out(dataroot: str | Path) -> list[str]:
    """Names of the images that `--skip_corrupt` left out when latents were made last; those that
    can be read by now are made again."""
    names = read_left_out(dataroot)
    folder = Path(dataroot) / read_settings(dataroot)["images"]
    unreadable = find_unreadable([folder / name for name in names])[0]
    return [name for name in names if folder / name in unreadable]


def count_pairs(dataroot: str | Path) -> int:
    """How many images latents and embeddings of a data root have, or will have when they are made.
    Raises as `list_pairs`."""
    folder = Path(dataroot) / read_settings(dataroot)["images"]
    left_out = set(list_left_out(dataroot))
    return sum(
        path.relative_to(folder).as_posix() not in left_out for path in list_pairs(dataroot)[0]
    )


def tell_overlooked(dataroot: str | Path, paths: Sequence[Path]) -> None:
    """Says which pictures of a training set's folder have no row."""
    folder = Path(dataroot) / read_settings(dataroot)["images"]
    if overlooked := find_overlooked(folder, paths):
        names = ", ".join(path.relative_to(folder).as_posix() for path in overlooked[:PAIRS_SHOWN])
        say(
            f"{folder}: {len(overlooked)} pictures there are no training images, first {names}: "
            f"by their suffix or folder they are not "
            "listed, and no caption names them"
        )


def tell_pairs(paths: Sequence[Path], captions: Sequence[Sequence[str]]) -> None:
    """Says which captions the first images have, for people to see that they are theirs."""
    for path, lines in list(zip(paths, captions))[:PAIRS_SHOWN]:
        say(
            f'{path.name} -> "{shorten(lines[0])}"'
            + (f" and {len(lines) - 1} more" if lines[1:] else "")
        )


def tell_odd_captions(model: Encoder, captions: Sequence[Sequence[str]]) -> None:
    """Says how many captions are empty, of how many the text encoder does not see the end, and how
    many the tokenizer does not know."""
    lines = [line for few in captions for line in few]
    tokenizer, limit = model.reader
    if empty := sum(not line.strip() for line in lines):
        log.warning(f"{empty} of {len(lines)} captions are empty")
    batches = [lines[start : start + AHEAD] for start in range(0, len(lines), AHEAD)]
    if cut := sum(count > limit for batch in batches for count in count_tokens(tokenizer, batch)):
        log.warning(
            f"{cut} of {len(lines)} captions are longer than the {limit} tokens of the model's "
            f"tokenizer; their ends are cut off"
        )
    unknown = [
        (line, is_all)
        for batch in batches
        for line, (is_unknown, is_all) in zip(batch, find_unknown(tokenizer, batch))
        if is_unknown
    ]
    if unknown:
        lost = sum(is_all for _, is_all in unknown)
        log.warning(
            f"{len(unknown)} of {len(lines)} captions have characters that the model's tokenizer "
            f"does not know, first "
            f'"{shorten(unknown[0][0])}"' + (f"; nothing of {lost} of them is read" if lost else "")
        )


def choose_readable(
    paths: Sequence[Path], dataroot: str | Path, skip_corrupt: bool, command: str
) -> list[int]:
    """Rows of the images that can be read. Raises UserError, by the names of the user's own files,
    where some cannot and are not to be left out."""
    unreadable, odd = find_unreadable(paths)
    if unreadable and (not skip_corrupt or len(unreadable) == len(paths)):
        first, *others = [find_own_file(dataroot, path) for path in list(unreadable)[:4]]
        names = ", ".join(path.name for path in others)
        path, reason = next(iter(unreadable.items()))
        raise UserError(
            f"{len(unreadable)} of {len(paths)} images cannot be read: "
            f"{reason.replace(str(path), str(first))}"
            + (f"; next {names}" if names else "")
            + f"; replace them, or leave them out: {command} --skip_corrupt"
        )
    for note in list_notes(
        "training images",
        len(paths),
        odd={oddity: [path.name for path in those] for oddity, those in odd.items()},
    ):
        say(note)
    return [row for row, path in enumerate(paths) if path not in unreadable]
