"""Latents and embeddings of a training set, made from its images and captions, batch by batch: an
interrupted run goes on."""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import UserError
from ..runtime.programs import say
from ..storage.hashes import digest, digest_rows
from ..storage.records import record_path
from ..storage.sharing import do_once, forget_claim
from .annotations import READERS
from .encoders import Encoder, encode_images
from .originals import ORIGINALS
from .own_root import check_root_writable
from .pairs import (
    AHEAD,
    choose_readable,
    list_pairs,
    map_files,
    read_left_out,
    tell_odd_captions,
    tell_overlooked,
    tell_pairs,
)
from .pictures import inspect_picture, list_notes
from .rows import is_made, write_rows
from .settings import read_settings
from .text_files import Captions
from .training_sets import array_paths


def has_given_arrays(dataroot: str | Path) -> bool:
    """Whether latents and embeddings came with the data root: ours have a record, or one of them
    has."""
    return all(path.exists() and not record_path(path).exists() for path in array_paths(dataroot))


def check_given(dataroot: str | Path, command: str) -> None:
    """Raises UserError where only one of latents and embeddings came with the data root: it would
    be replaced. command: that encodes it."""
    paths = array_paths(dataroot)
    for path, other in zip(paths, reversed(paths)):
        if path.exists() and not record_path(path).exists() and not has_given_arrays(dataroot):
            raise UserError(
                f"{path}: came without a record and without {other.name}; download that too, or "
                f"make both from the "
                f"images: {command} --overwrite"
            )


def encoding_identity(
    model: Encoder,
    dataroot: str | Path,
    paths: Sequence[Path],
    captions: Sequence[Sequence[str]],
    resolution: int,
    hashes: Sequence[str],
) -> dict:
    """Identity of latents and embeddings that are made from images (hashes: `hash_picture` of each)
    and captions."""
    settings = read_settings(dataroot)
    lines = [line for few in captions for line in few]

    def tokens(name: str) -> Iterator[list[int]]:
        for start in range(0, len(lines), AHEAD):
            yield from model.tokenize(lines[start : start + AHEAD])[name]

    folder = Path(dataroot) / settings["images"]
    annotated = Path(settings["captions"]).suffix in READERS
    return {
        **model.encoding_identity,
        **{name: digest_rows(tokens(name)) for name in model.tokenize([""])},
        "images": digest(
            [[path.relative_to(folder).as_posix(), content] for path, content in zip(paths, hashes)]
        ),
        "captions": digest(captions if len(captions[0]) > 1 else lines),
        "resolution": resolution,
        **({"num_captions": len(captions[0])} if annotated else {}),
    }


def array_shapes(
    captions: Captions, resolution: int, is_by_image: bool = False
) -> dict[Path, tuple[int, ...]]:
    """Shapes of latents (all images as is, then all mirrored), embeddings and other conditioning of
    images with these captions, {path: shape}. is_by_image: as earlier versions wrote all families'
    texts, each image its own."""
    model, path = captions.model, array_paths(captions.dataroot)[0]
    return {
        path: (2 * len(captions.of_images), *model.latent_shape(resolution)),
        **(captions.shapes_by_image() if is_by_image else captions.shapes()),
    }


def write_latents(
    model: Encoder,
    path: Path,
    shape: tuple[int, ...],
    paths: Sequence[Path],
    resolution: int,
    batch_size: int,
    identity: dict,
    thorough: bool = False,
) -> None:
    """Writes latents [2N, C, h, w]: all images as is, then all mirrored."""
    batches = [(view, start) for view in (0, 1) for start in range(0, len(paths), batch_size)]

    def encode(number):
        view, start = batches[number]
        return encode_images(
            model, paths[start : start + batch_size], resolution, bool(view), batch_size
        )

    write_rows(
        path,
        shape,
        [view * len(paths) + start for view, start in batches],
        encode,
        identity,
        "latents of the training set",
        thorough,
    )


def check_disk(dataroot: str | Path, sizes: dict[Path, int]) -> None:
    """Raises UserError where the disk has no room for arrays of these sizes, {path: bytes}, less
    what is there of them."""
    present = 0
    for path in sizes:
        for part in [path, *path.parent.glob(f"{path.name}.*.part")]:
            with suppress(FileNotFoundError):  # another process may just have given it its name
                present += part.stat().st_size
    needed, free = sum(sizes.values()) - present, shutil.disk_usage(dataroot).free
    if needed > free:
        raise UserError(
            f"{dataroot}: latents and embeddings need {needed / 1e9:.1f} GB more, "
            f"{free / 1e9:.1f} GB are free"
        )


def encoding_plan(
    model: Encoder, dataroot: str | Path, captions: Sequence[Sequence[str]], resolution: int
) -> dict[Path, int]:
    """Bytes of latents and embeddings of images with these captions, {path: bytes}."""
    told, path = Captions(model, dataroot, captions), array_paths(dataroot)[0]
    latents = array_shapes(told, resolution)[path]
    return {path: 4 * math.prod(latents), **told.num_bytes()}


def is_encoded(identity: dict, captions: Captions, resolution: int, thorough: bool = False) -> bool:
    """Whether latents and embeddings of images with these captions are there (`is_made`), as they
    are written or, unless `thorough`, as earlier versions wrote them."""
    ways = [False] if thorough or captions.model.is_stored_by_image else [False, True]
    return any(
        all(
            is_made(path, identity, shape, how or path == captions.index)
            for how in sorted({False, thorough})
            for path, shape in array_shapes(captions, resolution, is_by_image).items()
        )
        for is_by_image in ways
    )


def tell_left_out(dataroot: str | Path, names: Sequence[str], num_images: int) -> None:
    """Says which training images are left out because they cannot be read."""
    more = len(names) - 10
    record = record_path(array_paths(dataroot)[0])
    say(
        f"{len(names)} of {num_images} training images cannot be read and are left out: "
        f"{', '.join(names[:10])}" + (f" and {more} more; {record} names all" if more > 0 else "")
    )


def write_arrays(
    captions: Captions,
    paths: Sequence[Path],
    resolution: int,
    batch_size: int,
    identity: dict,
    overwrite: bool,
) -> None:
    """Writes latents and conditioning of images; one process of a launch does, the others wait."""
    model, dataroot = captions.model, captions.dataroot
    latents = array_paths(dataroot)[0]

    def write():
        tell_odd_captions(model, captions.of_images)
        how = resolution, batch_size, identity, overwrite
        write_latents(model, latents, array_shapes(captions, resolution)[latents], paths, *how)
        captions.write(paths, *how)

    def is_there():
        return is_encoded(identity, captions, resolution, overwrite)

    do_once(dataroot, "laion_latents", is_there, write)


def encode_training_set(
    model: Encoder,
    dataroot: str | Path,
    resolution: int,
    batch_size: int,
    num_captions: int = 0,
    skip_corrupt: bool = False,
    overwrite: bool = False,
    command: str = "",
) -> bool:
    """Makes latents and embeddings of a data root from its images and captions where it has none
    (the emoji world commits pictures, not latents), or has those of another model or of other
    pictures, or what cannot be opened; those that came with it stay, and what is whole is not made
    again, unless `overwrite`: then every byte is compared with its record, and texts that an earlier
    version wrote image by image are made again. command: that does the same, for messages. Returns whether there was anything to do."""
    if has_given_arrays(dataroot) and not overwrite:
        return False
    paths, captions = list_pairs(dataroot, num_captions)
    if not overwrite:
        check_given(dataroot, command)
    pictures = list(map_files(inspect_picture, paths, "hashing images"))
    cropped = [path.name for path, picture in zip(paths, pictures) if picture.is_cropped]
    for note in list_notes("training images", len(paths), cropped):
        say(note)
    hashes = [picture.content for picture in pictures]
    identity = encoding_identity(model, dataroot, paths, captions, resolution, hashes)
    folder, left_out = Path(dataroot) / read_settings(dataroot)["images"], read_left_out(dataroot)
    there = [
        few
        for path, few in zip(paths, captions)
        if path.relative_to(folder).as_posix() not in left_out
    ]
    if there and is_encoded(identity, Captions(model, dataroot, there), resolution, overwrite):
        forget_claim(dataroot, "laion_latents")
        return False
    folders = [Path(dataroot), *(path.parent for path in array_paths(dataroot))]
    check_root_writable(dataroot, "latents and embeddings", folders)
    check_disk(dataroot, encoding_plan(model, dataroot, captions, resolution))
    tell_overlooked(dataroot, paths)
    rows = choose_readable(paths, dataroot, skip_corrupt, command)
    if len(rows) < len(paths):
        kept = set(rows)
        identity["left_out"] = [
            path.relative_to(folder).as_posix() for row, path in enumerate(paths) if row not in kept
        ]
        tell_left_out(dataroot, identity["left_out"], len(paths))
        paths, captions = [paths[row] for row in rows], [captions[row] for row in rows]
    if not (Path(dataroot) / ORIGINALS).exists():  # of people's folders they were told
        tell_pairs(paths, captions)
    told = Captions(model, dataroot, captions)
    write_arrays(told, paths, resolution, batch_size, identity, overwrite)
    return True
