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
from .conditioning import TEXT
from .encoders import Encoder, encode_images, encode_prompts, encode_sizes
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
from .training_sets import array_paths, extra_paths


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
    model: Encoder, dataroot: str | Path, num_images: int, num_captions: int, resolution: int
) -> dict[Path, tuple[int, ...]]:
    """Shapes of latents (all images as is, then all mirrored), embeddings and other conditioning of
    images with so many captions each, {path: shape}."""
    several = (num_captions,) if num_captions > 1 else ()
    latents_path, _ = array_paths(dataroot)
    return {
        latents_path: (2 * num_images, *model.latent_shape(resolution)),
        **{
            path: (num_images, *several, *model.conditioning_shapes[name])
            for name, path in text_paths(model, dataroot).items()
        },
    }


def text_paths(model: Encoder, dataroot: str | Path) -> dict[str, Path]:
    """Where embeddings and other conditioning stand, by name."""
    return {
        TEXT: array_paths(dataroot)[1],
        **extra_paths(dataroot, model.conditioning_shapes),
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


def write_texts(
    model: Encoder,
    name: str,
    path: Path,
    shape: tuple[int, ...],
    paths: Sequence[Path],
    captions: Sequence[Sequence[str]],
    resolution: int,
    batch_size: int,
    identity: dict,
    thorough: bool = False,
) -> None:
    """Writes one kind of conditioning, embeddings [N, tokens, features] say; or [N, captions, ...]
    where images have several."""
    starts = range(0, len(captions), batch_size)

    def encode(number):
        rows = slice(starts[number], starts[number] + batch_size)
        few = captions[rows]
        if name in model.of_sizes:
            pictures = [path for path, lines in zip(paths[rows], few) for _ in lines]
            texts = encode_sizes(model, pictures, resolution)[name]
        else:
            texts = encode_prompts(model, [line for lines in few for line in lines])[name]
        several = shape[1 : len(shape) - texts.ndim + 1]
        return texts.reshape(len(few), *several, *texts.shape[1:])

    write_rows(path, shape, starts, encode, identity, f"{name} of the captions", thorough)


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
    shapes = array_shapes(model, dataroot, len(captions), len(captions[0]), resolution)
    return {path: 4 * math.prod(shape) for path, shape in shapes.items()}


def is_encoded(identity: dict, shapes: dict[Path, tuple[int, ...]], thorough: bool = False) -> bool:
    """Whether latents and embeddings of these shapes, {path: shape}, are there (`is_made`)."""
    return all(
        is_made(path, identity, shape, how)
        for how in sorted({False, thorough})
        for path, shape in shapes.items()
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
    model: Encoder,
    dataroot: str | Path,
    pairs: tuple[Sequence[Path], Sequence[Sequence[str]]],
    resolution: int,
    batch_size: int,
    identity: dict,
    overwrite: bool,
) -> None:
    """Writes latents and conditioning of images and captions, `pairs`; one process of a launch does,
    the others wait."""
    paths, captions = pairs
    shapes = array_shapes(model, dataroot, len(paths), len(captions[0]), resolution)
    latents = array_paths(dataroot)[0]

    def write():
        tell_odd_captions(model, captions)
        how = resolution, batch_size, identity, overwrite
        write_latents(model, latents, shapes[latents], paths, *how)
        for name, path in text_paths(model, dataroot).items():
            write_texts(model, name, path, shapes[path], paths, captions, *how)

    do_once(dataroot, "laion_latents", lambda: is_encoded(identity, shapes, overwrite), write)


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
    again, unless `overwrite`: then every byte is compared with its record. command: that does the
    same, for messages. Returns whether there was anything to do."""
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
    count = len(paths) - len(read_left_out(dataroot))
    shapes = array_shapes(model, dataroot, count, len(captions[0]), resolution)
    if is_encoded(identity, shapes, overwrite):
        forget_claim(dataroot, "laion_latents")
        return False
    folders = [Path(dataroot), *(path.parent for path in array_paths(dataroot))]
    check_root_writable(dataroot, "latents and embeddings", folders)
    check_disk(dataroot, encoding_plan(model, dataroot, captions, resolution))
    tell_overlooked(dataroot, paths)
    rows = choose_readable(paths, dataroot, skip_corrupt, command)
    if len(rows) < len(paths):
        folder, kept = Path(dataroot) / read_settings(dataroot)["images"], set(rows)
        identity["left_out"] = [
            path.relative_to(folder).as_posix() for row, path in enumerate(paths) if row not in kept
        ]
        tell_left_out(dataroot, identity["left_out"], len(paths))
        paths, captions = [paths[row] for row in rows], [captions[row] for row in rows]
    if not (Path(dataroot) / ORIGINALS).exists():  # of people's folders they were told
        tell_pairs(paths, captions)
    write_arrays(model, dataroot, (paths, captions), resolution, batch_size, identity, overwrite)
    return True
