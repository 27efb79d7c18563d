"""One TrainingSet for every benchmark."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..storage.hashes import digest
from ..storage.reading import read_array, read_json
from ..storage.records import record_path
from .captions import label_images
from .conditioning import TEXT
from .settings import read_settings
from .texts import Texts, Told, choose_images, index_path, is_packed, open_packed


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
    embeddings: Told = field(repr=False)  # [N, captions, tokens, features]
    source: str = ""  # digest of what latents and embeddings were made from
    settings: dict = field(default_factory=dict, repr=False, compare=False)  # its data root's
    # What else the denoiser is told of an image, as its family says: {name: [N, captions, ...]}.
    extras: Mapping[str, Told] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def conditioning(self) -> dict[str, Told]:
        """What the denoiser is told of each image, {name: [N, captions, ...]}."""
        return {TEXT: self.embeddings, **self.extras}

    def texts(self, images: Any, captions: Any = slice(None)) -> dict[str, np.ndarray]:
        """The conditioning of some images and captions, {name: [...]}."""
        return {name: array[images, captions] for name, array in self.conditioning.items()}

    def image_tensors(
        self, view: int, image: int, device: torch.device | str
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """An image's latent [C, h, w] and the conditioning of its captions {name: [captions, ...]},
        float32 on a device. Raises UserError where they are not finite."""
        arrays = {"latents": self.latents[view, image], **self.texts(image)}
        tensors = {
            name: torch.from_numpy(np.array(array, np.float32)).to(device)
            for name, array in arrays.items()
        }
        sums = [float(tensor.sum()) for tensor in tensors.values()]
        check_pixels(f"{' or '.join(arrays)} of {self.ids[image]}", sums)
        return tensors.pop("latents"), tensors

    def query_tensors(
        self, device: torch.device | str
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of a training set of one image and view, as queries are: its latent [C, h, w] and its
        conditioning {name: [1, ...]}, float32 on a device."""

        def put(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(np.array(array, np.float32)).to(device)

        texts = {name: put(array) for name, array in self.texts(0, slice(1)).items()}
        return put(self.latents[0, 0]), texts

    def take(self, indices: Sequence[int]) -> "TrainingSet":
        """The training set of these rows, in this order; latents are copied."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            captions=[self.captions[i] for i in indices],
            paths=[self.paths[i] for i in indices],
            latents=self.latents[:, indices],
            embeddings=choose_images(self.embeddings, indices),
            extras={name: choose_images(each, indices) for name, each in self.extras.items()},
        )

    def first(self, count: int) -> "TrainingSet":
        """The training set of the first `count` images; nothing is copied."""
        return replace(
            self,
            ids=self.ids[:count],
            captions=self.captions[:count],
            paths=self.paths[:count],
            latents=self.latents[:, :count],
            embeddings=choose_images(self.embeddings, slice(count)),
            extras={name: choose_images(each, slice(count)) for name, each in self.extras.items()},
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


def probe(array: Told) -> str:
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


def source_of(path: str | Path, array: Told) -> str:
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


def extra_paths(dataroot: str | Path, names: Iterable[str]) -> dict[str, Path]:
    """Where conditioning other than embeddings stands, by its name: beside them."""
    path = array_paths(dataroot)[1]
    return {
        name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in names if name != TEXT
    }


def open_extras(
    dataroot: str | Path, shapes: Mapping[str, tuple[int, ...]], embeddings: Told
) -> dict[str, Told]:
    """Conditioning other than embeddings [N, captions, ...], memory-mapped, as [N, captions, ...] by
    its name: what belongs to an image is the same for all of its captions, and what belongs to a text
    for all images that have it. shapes: of a text's, by name. Raises UserError where one is missing
    or of another shape."""
    count, found = embeddings.shape[:2], {}
    for name, path in extra_paths(dataroot, shapes).items():
        array, shape = read_array(path, name), shapes[name]
        if array.dtype.kind not in "fiub":
            raise UserError(f"{path}: expected numbers, found {array.dtype}; encode it again")
        if isinstance(embeddings, Texts) and array.shape == (embeddings.num_texts, *shape):
            found[name] = Texts(array, embeddings.index, shape)
            continue
        if array.shape not in ((*count, *shape), (count[0], *shape)):
            raise UserError(
                f"{path}: expected [{count[0]}, {', '.join(map(str, shape))}] for this model, found "
                f"{list(array.shape)}; encode the training set again"
            )
        array = array.reshape(count[0], -1, *shape)
        found[name] = np.broadcast_to(array, (*count, *shape))
    return found


def find_extras(dataroot: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the conditioning that stands beside a data root's embeddings and was made with them,
    by name: what a model would say, where there is none."""
    path, shapes = array_paths(dataroot)[1], {}
    beside = set(path.parent.glob(f"{path.stem}_*{path.suffix}")) - {index_path(path)}
    for other in sorted(beside):
        made = [read_identity(one) if record_path(one).exists() else None for one in (path, other)]
        if made[0] == made[1]:
            shapes[other.stem.removeprefix(f"{path.stem}_")] = read_array(other).shape[1:]
    return shapes


def open_arrays(
    dataroot: str | Path,
) -> tuple[np.ndarray, Told, Sequence[int], list[Path], list[str]]:
    """Latents and embeddings (memory-mapped), images' indices, pictures and captions of a data
    root. Raises UserError where they are missing or their numbers disagree: all that can be told
    without a model."""
    latents_path, embeddings_path = array_paths(dataroot)
    latents = read_array(latents_path, "latents")
    embeddings: Told = read_array(embeddings_path, "text embeddings")
    if is_packed(embeddings_path, embeddings):
        embeddings = open_packed(embeddings_path, embeddings)
    several = " (or, of several captions an image, [N, captions, tokens, features])"
    for path, array, axes, more in (
        (latents_path, latents, "[2N, C, h, w]", ""),
        (embeddings_path, embeddings, "[N, tokens, features]", several),
    ):
        if (
            array.ndim - axes.count(",") - 1 not in (0, bool(more))
            or not all(array.shape)
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
    checked = {
        **dict(zip(array_paths(dataroot), (training_set.latents, [training_set.embeddings]))),
        **{
            path: [training_set.extras[name]]
            for name, path in extra_paths(dataroot, training_set.extras).items()
        },
    }
    for path, views in checked.items():
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
    shapes: Mapping[str, tuple[int, ...]],
    subset_size: int | None = None,
) -> TrainingSet:
    """Opens the training set of a data root: latents [2N, C, h, w] (N as is, then N mirrored),
    embeddings [N, tokens, features] or [N, captions, tokens, features] and, where they are, images
    and captions.

    latent_shape: (C, h, w) of the model; shapes: of a text's conditioning, {name: shape}. Raises
    UserError where files are missing or of another shape.
    """
    latents_path, embeddings_path = array_paths(dataroot)
    latents, stored, indices, paths, captions = open_arrays(dataroot)
    embeddings, count = stored, len(stored)
    for path, array, shape in (
        (latents_path, latents, latent_shape),
        (embeddings_path, embeddings, shapes[TEXT]),
    ):
        if array.shape[array.ndim - len(shape) :] != tuple(shape):
            raise UserError(
                f"{path}: expected rows {list(shape)} of floats for this model, found "
                f"{list(array.shape)} {array.dtype}"
            )
    if not isinstance(embeddings, Texts):
        embeddings = embeddings.reshape(count, -1, *shapes[TEXT])
    extras = open_extras(dataroot, shapes, embeddings)
    made_from = {latents_path: latents, embeddings_path: stored}
    made_from |= {path: read_array(path) for path in extra_paths(dataroot, extras).values()}
    training_set = TrainingSet(
        name=name,
        ids=[f"laion/{index:06d}" for index in indices],
        captions=captions or [""] * count,
        paths=paths or [None] * count,
        latents=latents.reshape(2, count, *latents.shape[1:]),
        embeddings=embeddings,
        source=digest(*(source_of(path, array) for path, array in made_from.items())),
        settings=read_settings(dataroot),
        extras=extras,
    )
    return training_set.first(
        choose_subset_size(count, subset_size, read_settings(dataroot)["largest_subset"])
    )
