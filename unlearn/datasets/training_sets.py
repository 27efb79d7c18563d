"""One TrainingSet for every benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..storage.hashes import digest
from ..storage.reading import read_array, read_json
from ..storage.records import record_path
from .captions import label_images
from .settings import read_settings


@dataclass(frozen=True)
class TrainingSet:
    """Images with captions, as latents and embeddings. Nothing but ids, paths and captions is held
    in memory."""

    name: str  # with an image's id it keys the image's noise
    ids: list[str]
    captions: list[str]
    paths: Sequence[Path | None]  # None where there is no picture to show
    # [views, N, channels, height, width], scaled as the denoiser expects
    latents: np.ndarray = field(repr=False)
    embeddings: np.ndarray = field(repr=False)  # [N, captions, tokens, features]
    source: str = ""  # digest of what latents and embeddings were made from
    settings: dict = field(default_factory=dict, repr=False, compare=False)  # its data root's

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> "TrainingSet":
        """The training set of these rows, in this order; latents are copied."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            captions=[self.captions[i] for i in indices],
            paths=[self.paths[i] for i in indices],
            latents=self.latents[:, indices],
            embeddings=self.embeddings[indices],
        )

    def first(self, count: int) -> "TrainingSet":
        """The training set of the first `count` images; nothing is copied."""
        return replace(
            self,
            ids=self.ids[:count],
            captions=self.captions[:count],
            paths=self.paths[:count],
            latents=self.latents[:, :count],
            embeddings=self.embeddings[:count],
        )

    @property
    def identity(self) -> str:
        """Digest of name, ids, shapes and source. Captions are labels here: what was made of them
        is in the source."""
        return digest(
            self.name, self.ids, list(self.latents.shape), list(self.embeddings.shape), self.source
        )


def label_rows(dataroot: str | Path) -> tuple[list[int], list[Path], list[str]]:
    """Index, path and first caption of each row: (indices, paths, captions), each list [] where
    that is missing. Images that `python -m unlearn encode --skip_corrupt` left out have an index
    and no row."""
    settings = read_settings(dataroot)
    names, paths, captions = label_images(
        Path(dataroot) / settings["images"], Path(dataroot) / settings["captions"]
    )
    latents_path = Path(dataroot) / settings["latents"]
    left_out = set(
        read_identity(latents_path).get("left_out", [])
        if record_path(latents_path).exists()
        else []
    )
    kept = [index for index, name in enumerate(names) if name not in left_out]

    def keep(values):
        return [values[index] for index in kept] if len(values) == len(names) else values

    return kept, keep(paths), keep(captions)


def list_images(dataroot: str | Path) -> list[Path]:
    """Paths of the training images in the order of the rows, [] where their folder is missing."""
    return label_rows(dataroot)[1]


def probe(array: np.ndarray) -> str:
    """Digest of eight rows spread over an array, and of its shape: tells two files apart without
    reading them."""
    rows = np.linspace(0, len(array) - 1, 8).astype(int)
    return digest(list(array.shape), str(array.dtype), [array[row].tobytes().hex() for row in rows])


def read_identity(path: str | Path) -> dict:
    """Identity in the record of latents or embeddings that this project made. Raises UserError
    where it is no record."""
    record = read_json(record_path(path), "record")
    identity = record.get("identity") if isinstance(record, dict) else None
    if (
        not isinstance(identity, dict)
        or not isinstance(identity.get("num_captions", 0), int)
        or not isinstance(identity.get("left_out", []), list)
        or not all(isinstance(name, str) for name in identity.get("left_out", []))
    ):
        raise UserError(
            f"record {record_path(path)}: not a record; remove {path} and it, and both are made "
            f"again"
        )
    return identity


def source_of(path: str | Path, array: np.ndarray) -> str:
    """What an array was made from: its record's identity where this project made it, else a probe
    of its rows."""
    return digest(read_identity(path)) if record_path(path).exists() else probe(array)


def choose_subset_size(available: int, asked: int | None, largest: int) -> int:
    """How many images to use: all, at most `largest`; or as many as asked. Raises UserError where
    that is too many."""
    if asked is not None and not 1 <= asked <= available:
        raise UserError(f"--laion_subset_size {asked}: this data root has {available} images")
    return min(available, largest) if asked is None else asked


def check_pixels(item: str, values: object) -> None:
    """Raises UserError where an array has NaN or infinite entries."""
    if not np.isfinite(np.asarray(values)).all():
        raise UserError(f"{item}: has NaN or infinite entries; download or encode it again")


def array_paths(dataroot: str | Path) -> tuple[Path, Path]:
    """Where latents and embeddings of the training set stand."""
    settings = read_settings(dataroot)
    return Path(dataroot) / settings["latents"], Path(dataroot) / settings["embeddings"]


def open_arrays(
    dataroot: str | Path,
) -> tuple[np.ndarray, np.ndarray, Sequence[int], list[Path], list[str]]:
    """Latents and embeddings (memory-mapped), images' indices, pictures and captions of a data
    root. Raises UserError where they are missing or their numbers disagree: all that can be told
    without a model."""
    latents_path, embeddings_path = array_paths(dataroot)
    latents = read_array(latents_path, "latents")
    embeddings = read_array(embeddings_path, "text embeddings")
    several = " (or, of several captions an image, [N, captions, tokens, features])"
    for path, array, axes, more in (
        (latents_path, latents, "[2N, C, h, w]", ""),
        (embeddings_path, embeddings, "[N, tokens, features]", several),
    ):
        if (
            array.ndim - axes.count(",") - 1 not in (0, bool(more))
            or not array.size
            or not np.issubdtype(array.dtype, np.floating)
        ):
            raise UserError(
                f"{path}: expected {axes} of floats, found {list(array.shape)} {array.dtype}{more}"
            )
    count = len(embeddings)
    if len(latents) != 2 * count:
        raise UserError(
            f"{latents_path}: expected {2 * count} rows, two views of each of the {count} images "
            f"of "
            f"{embeddings_path.name}, found {len(latents)}"
        )
    settings, (indices, paths, captions) = read_settings(dataroot), label_rows(dataroot)
    for item, values in ("images", paths), ("captions", captions):
        if values and len(values) != count:
            folder = (Path(dataroot) / settings[item]).parent
            raise UserError(
                f"{folder}: {len(values)} {item} for {count} rows of {embeddings_path.name}"
            )
    return latents, embeddings, indices or range(count), paths, captions


def check_finite(dataroot: str | Path, training_set: TrainingSet) -> None:
    """Reads latents and embeddings that came with a data root once, so that no sweep stops in its
    last hour. Raises UserError, naming file and image, where an entry is NaN or infinite. What this
    project made was checked then."""
    for path, views in zip(
        array_paths(dataroot), (training_set.latents, [training_set.embeddings])
    ):
        for array in [] if record_path(path).exists() else views:
            step = max(1, (64 << 20) // array[0].nbytes)
            for start in range(0, len(array), step):
                if not np.isfinite(np.asarray(array[start : start + step])).all():
                    row = next(
                        row
                        for row in range(start, len(array))
                        if not np.isfinite(np.asarray(array[row])).all()
                    )
                    check_pixels(f"{path}, {training_set.ids[row]}", np.asarray(array[row]))


def open_training_set(
    dataroot: str | Path,
    name: str,
    latent_shape: Sequence[int],
    embedding_shape: Sequence[int],
    subset_size: int | None = None,
) -> TrainingSet:
    """Opens the training set of a data root: latents [2N, C, h, w] (N as is, then N mirrored),
    embeddings [N, tokens, features] or [N, captions, tokens, features] and, where they are, images
    and captions.

    latent_shape: (C, h, w) and embedding_shape: (tokens, features) of the model. Raises UserError
    where files are missing or of another shape.
    """
    latents_path, embeddings_path = array_paths(dataroot)
    latents, embeddings, indices, paths, captions = open_arrays(dataroot)
    count = len(embeddings)
    for path, array, shape in (
        (latents_path, latents, latent_shape),
        (embeddings_path, embeddings, embedding_shape),
    ):
        if array.shape[array.ndim - len(shape) :] != tuple(shape):
            raise UserError(
                f"{path}: expected rows {list(shape)} of floats for this model, found "
                f"{list(array.shape)} {array.dtype}"
            )
    training_set = TrainingSet(
        name=name,
        ids=[f"laion/{index:06d}" for index in indices],
        captions=captions or [""] * count,
        paths=paths or [None] * count,
        latents=latents.reshape(2, count, *latents.shape[1:]),
        embeddings=embeddings.reshape(count, -1, *embedding_shape),
        source=digest(source_of(latents_path, latents), source_of(embeddings_path, embeddings)),
        settings=read_settings(dataroot),
    )
    return training_set.first(
        choose_subset_size(count, subset_size, read_settings(dataroot)["largest_subset"])
    )
