"""Latents and embeddings of a training set, made from its images and captions, batch by batch: an
interrupted run goes on."""

import io
import math
import os
import shlex
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from ..errors import UserError
from ..runtime.printing import shorten
from ..runtime.programs import log, progress, say
from ..storage.artifacts import check_writable, whole_file
from ..storage.hashes import digest, digest_rows, hash_file, hash_tensors, named_weights
from ..storage.reading import read_array
from ..storage.records import check_content, is_complete, record_path, write_record
from ..storage.sharing import do_once, forget_claim
from .annotations import READERS
from .captions import PAIRS_SHOWN, find_overlooked, pair_images
from .encoders import Encoder, count_tokens, encode_images, encode_prompts, find_unknown
from .pictures import ODDITIES, inspect_picture, list_notes, read_picture
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


def list_left_out(dataroot: str | Path) -> list[str]:
    """Names of the images that `--skip_corrupt` left out when latents were made last; those that
    can be read by now are made again."""
    latents_path = array_paths(dataroot)[0]
    names = (
        read_identity(latents_path).get("left_out", [])
        if record_path(latents_path).exists()
        else []
    )
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
    tokenizer = model.pipeline.tokenizer
    limit = model.embedding_shape[0]
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
    parts = {
        "vae": named_weights(model.pipeline.vae),
        "text_encoder": named_weights(model.pipeline.text_encoder),
    }
    vae = model.pipeline.vae.config
    settings = read_settings(dataroot)
    lines = [line for few in captions for line in few]
    tokens = (
        row
        for start in range(0, len(lines), AHEAD)
        for row in model.pipeline.tokenizer(
            lines[start : start + AHEAD],
            padding="max_length",
            truncation=True,
            max_length=model.embedding_shape[0],
        ).input_ids
    )
    folder = Path(dataroot) / settings["images"]
    annotated = Path(settings["captions"]).suffix in READERS
    return {
        "scaling": [vae.scaling_factor, vae.get("shift_factor")],
        "tokens": digest_rows(tokens),
        "images": digest(
            [[path.relative_to(folder).as_posix(), content] for path, content in zip(paths, hashes)]
        ),
        "captions": digest(captions if len(captions[0]) > 1 else lines),
        "resolution": resolution,
        **({"num_captions": len(captions[0])} if annotated else {}),
        **{name: hash_tensors(weights) for name, weights in parts.items()},
    }


def count_rows(file: BinaryIO, start: int, row_bytes: int) -> int:
    """How many rows of a file that was begun before are whole: finite numbers. A node that lost its
    power leaves a size, and zeros from anywhere within a row."""

    def is_whole():
        row = np.frombuffer(file.read(row_bytes), np.float32)
        return row.any() and np.isfinite(row).all()

    size = max(0, os.fstat(file.fileno()).st_size - start) // row_bytes
    file.seek(start)
    return next((max(0, number - 1) for number in range(size) if not is_whole()), size)


def is_made(path: Path, identity: dict, shape: Sequence[int], thorough: bool = False) -> bool:
    """Whether an array of this shape, made under this identity, is there; with `thorough`, whether
    its bytes are also those that its record says. One that cannot be opened, or has another shape,
    is not: it is made again."""
    if not is_complete(path) or not read_identity(path).items() >= identity.items():
        return False
    try:
        if thorough:
            check_content(path, "")
        return read_array(path).shape == tuple(shape)
    except UserError:
        return False


def check_rows(path: Path, rows: np.ndarray, shape: Sequence[int], description: str) -> None:
    """Raises UserError where a batch of rows is not of this shape, or has NaN or infinite entries:
    of no such model is any kept."""
    if rows.shape != shape:
        raise UserError(
            f"{path}: the pipeline made {list(rows.shape)} of the {description}, expected "
            f"{list(shape)}; its parts do not fit each other"
        )
    if not np.isfinite(rows).all():
        raise UserError(
            f"{path}: the pipeline made NaN or infinite entries of the {description}; it is "
            f"damaged: download it again, or give "
            "another --sd_version"
        )


def write_rows(
    path: Path,
    shape: tuple[int, ...],
    starts: Sequence[int],
    encode: Callable[[int], torch.Tensor],
    identity: dict,
    description: str,
    thorough: bool = False,
) -> None:
    """Writes a float32 array batch by batch, so that memory does not grow with it, and its record.
    Ended early, the same call goes on with the batch it was at. starts: the first row of each
    batch; encode(number): the rows of a batch. Raises UserError where these are not of the array's
    shape or not finite. thorough: as of `is_made`."""
    if is_made(path, identity, shape, thorough):
        return
    path.unlink(
        missing_ok=True
        # from here to the end a record may stand without its array, never an array without its
        # record
    )
    header, row_bytes, ends = io.BytesIO(), 4 * math.prod(shape[1:]), [*starts[1:], shape[0]]
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with whole_file(path, digest(identity)[:16]) as file:
        if file.read(header.tell()) != header.getvalue():  # rows of another shape, or none yet
            file.truncate(0)
        done = count_rows(file, header.tell(), row_bytes)
        first = bisect_right(starts, done) - 1 if done < shape[0] else len(starts)
        file.seek(0)
        file.write(header.getvalue())
        with progress(
            shape[0], description, "rows", starts[first] if first < len(starts) else shape[0]
        ) as bar:
            for number in range(first, len(starts)):
                rows = np.ascontiguousarray(encode(number), np.float32)
                try:
                    check_rows(path, rows, (ends[number] - starts[number], *shape[1:]), description)
                except UserError:
                    Path(file.name).unlink(
                        missing_ok=True
                    )  # the model is broken: its other rows are worth nothing either
                    raise
                file.seek(header.tell() + starts[number] * row_bytes)
                file.write(rows.tobytes())
                bar.update(len(rows))
        file.flush()
        with suppress(FileNotFoundError):  # another process was first, and has written it
            write_record(path, identity, content=hash_file(file.name))


def array_shapes(
    model: Encoder, dataroot: str | Path, num_images: int, num_captions: int, resolution: int
) -> dict[Path, tuple[int, ...]]:
    """Shapes of latents (all images as is, then all mirrored) and embeddings of images with so many
    captions each, {path: shape}."""
    latents_path, embeddings_path = array_paths(dataroot)
    several = (num_captions,) if num_captions > 1 else ()
    return {
        latents_path: (2 * num_images, *model.latent_shape(resolution)),
        embeddings_path: (num_images, *several, *model.embedding_shape),
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
            model.pipeline, paths[start : start + batch_size], resolution, bool(view), batch_size
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


def write_embeddings(
    model: Encoder,
    path: Path,
    shape: tuple[int, ...],
    captions: Sequence[Sequence[str]],
    batch_size: int,
    identity: dict,
    thorough: bool = False,
) -> None:
    """Writes embeddings [N, tokens, features], or [N, captions, tokens, features] where images have
    several."""
    starts = range(0, len(captions), batch_size)

    def encode(number):
        few = captions[starts[number] : starts[number] + batch_size]
        embeddings = encode_prompts(model.pipeline, [line for lines in few for line in lines])
        return embeddings.reshape(len(few), *shape[1:-2], *embeddings.shape[1:])

    write_rows(path, shape, starts, encode, identity, "embeddings of the captions", thorough)


def check_disk(dataroot: str | Path, sizes: dict[Path, int]) -> None:
    """Raises UserError where the disk has no room for arrays of these sizes, {path: bytes}, less
    what is there of them."""
    present = sum(
        part.stat().st_size
        for path in sizes
        for part in [path, *path.parent.glob(f"{path.name}.*.part")]
        if part.exists()
    )
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


def choose_readable(paths: Sequence[Path], skip_corrupt: bool, command: str) -> list[int]:
    """Rows of the images that can be read. Raises UserError where some cannot and are not to be
    left out."""
    unreadable, odd = find_unreadable(paths)
    if unreadable and (not skip_corrupt or len(unreadable) == len(paths)):
        names = ", ".join(path.name for path in list(unreadable)[1:4])
        raise UserError(
            f"{len(unreadable)} of {len(paths)} images cannot be read: "
            f"{next(iter(unreadable.values()))}"
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


def is_encoded(identity: dict, shapes: dict[Path, tuple[int, ...]], thorough: bool = False) -> bool:
    """Whether latents and embeddings of these shapes, {path: shape}, are there (`is_made`)."""
    return all(
        is_made(path, identity, shape, how)
        for how in sorted({False, thorough})
        for path, shape in shapes.items()
    )


def own_root(dataroot: str | Path) -> str:
    """Commands that make a data root of one's own of one that cannot be written. Its pictures,
    pipeline and Fisher become links; what tasks and dataset.json name is copied, because those
    paths may not lead out of a data root; latents and embeddings are left out."""
    root, settings = Path(dataroot).absolute(), read_settings(dataroot)
    linked = {
        path.absolute()
        for key in ("images", "pipeline", "unet")
        if settings[key]
        for path in (Path(dataroot) / settings[key], Path(settings[key]))
    } | set(root.glob("sd_fisher.*"))
    if (root / settings["captions"]).is_relative_to(root / settings["images"]):
        linked.discard(root / settings["images"])
    left_out = {
        path.absolute() for array in array_paths(dataroot) for path in (array, record_path(array))
    }
    commands = []

    def visit(folder, own):
        found = {"ln -s": [], "cp -rL": []}
        commands.append(f"mkdir {shlex.quote(own)}")
        for path in sorted(folder.iterdir()):
            if path in linked:
                found["ln -s"].append(path)
            elif (
                any(other.is_relative_to(path) and other != path for other in linked | left_out)
                and path.is_dir()
            ):
                later.append((path, f"{own}/{path.name}"))
            elif path not in left_out and path.suffix not in (".part", ".claim"):
                found["cp -rL"].append(path)
        commands.extend(
            f"{how} {' '.join(shlex.quote(str(path)) for path in paths)} {shlex.quote(own)}/"
            for how, paths in found.items()
            if paths
        )

    later = [(root, f"{root.name}_own")]
    while later:
        visit(*later.pop(0))
    return " && ".join(commands)


def check_root_writable(dataroot: str | Path, what: str, folders: Iterable[str | Path]) -> None:
    """Raises UserError, with the commands that help, where folders of a data root, in which `what`
    is to be made, cannot be written."""
    for folder in dict.fromkeys(folders):
        check_writable(
            folder,
            f"{what} are to be made there: make a data root of your own beside it "
            f"({own_root(dataroot)}) and give that "
            "as --dataroot",
        )


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
    for note in list_notes(
        "training images",
        len(paths),
        [path.name for path, picture in zip(paths, pictures) if picture.is_cropped],
    ):
        say(note)
    identity = encoding_identity(
        model, dataroot, paths, captions, resolution, [picture.content for picture in pictures]
    )
    latents_path, embeddings_path = array_paths(dataroot)
    recorded = (
        read_identity(latents_path).get("left_out", [])
        if record_path(latents_path).exists()
        else []
    )
    if is_encoded(
        identity,
        array_shapes(model, dataroot, len(paths) - len(recorded), len(captions[0]), resolution),
        overwrite,
    ):
        forget_claim(dataroot, "laion_latents")
        return False
    check_root_writable(
        dataroot,
        "latents and embeddings",
        [Path(dataroot), *(path.parent for path in array_paths(dataroot))],
    )
    check_disk(dataroot, encoding_plan(model, dataroot, captions, resolution))
    tell_overlooked(dataroot, paths)
    rows = choose_readable(paths, skip_corrupt, command)
    if len(rows) < len(paths):
        folder, kept = Path(dataroot) / read_settings(dataroot)["images"], set(rows)
        identity["left_out"] = [
            path.relative_to(folder).as_posix() for row, path in enumerate(paths) if row not in kept
        ]
        names = identity["left_out"]
        say(
            f"{len(names)} of {len(paths)} training images cannot be read and are left out: "
            f"{', '.join(names[:10])}"
            + (
                f" and {len(names) - 10} more; {record_path(latents_path)} names all"
                if names[10:]
                else ""
            )
        )
        paths, captions = [paths[row] for row in rows], [captions[row] for row in rows]
    tell_pairs(paths, captions)
    shapes = array_shapes(model, dataroot, len(paths), len(captions[0]), resolution)

    def write():
        tell_odd_captions(model, captions)
        write_latents(
            model,
            latents_path,
            shapes[latents_path],
            paths,
            resolution,
            batch_size,
            identity,
            overwrite,
        )
        write_embeddings(
            model,
            embeddings_path,
            shapes[embeddings_path],
            captions,
            batch_size,
            identity,
            overwrite,
        )

    do_once(
        dataroot, "laion_latents", lambda: is_encoded(identity, shapes, overwrite), write
    )  # one process; others of a launch wait
    return True
