"""The features of `removal` on disk: made once for a model and a training set, they serve every
query.

A folder: shards of 32 images, float16 with a scale a row, each image with the loss that tells how
well the model explains it, and features.txt with the hash of each shard, which with its record is
written last; the losses once more together, in losses.npy. Killed and run again, building goes on; processes share it.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.pipelines import Model
from ..runtime.programs import progress
from ..runtime.signals import finishing
from ..storage.artifacts import write_array, write_bytes
from ..storage.chunks import make_folder, read_array_chunk, write_array_chunk
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_array, read_text
from ..storage.records import check_record, keep_complete, record_path, write_record
from ..storage.sharing import Share, do_once, forget_claim
from .draws import CHUNK_IMAGES
from .removal import FeatureMaker, RemovalSettings, feature_identity

LISTING, LOSSES = "features.txt", "losses.npy"
REMEDY = "give the flags that the features were made with, or --overwrite"
SHARD = re.compile(r"([0-9a-f]{32})  (shards-[0-9a-f]{16}/\d{8}\.npy)")


def row_type(size: int) -> np.dtype:
    """The stored form of a row of features: multiples of a scale."""
    return np.dtype([("scale", "<f4"), ("values", "<f2", (size,))])


def image_type(num_timesteps: int, num_rows: int, size: int) -> np.dtype:
    """The stored form of an image."""
    return np.dtype([("loss", "<f4"), ("rows", row_type(size), (num_timesteps, num_rows))])


def pack_images(features: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Features [images, timesteps, rows, size] and losses [images], both float32, as stored,
    [images] of `image_type`. Raises UserError where one is not finite."""
    packed = np.zeros(len(features), image_type(*features.shape[1:]))
    packed["loss"], packed["rows"] = losses, pack(features)
    if not np.isfinite(losses).all():
        raise UserError("losses of training images are NaN or infinite; the model is broken")
    return packed


def pack(features: np.ndarray) -> np.ndarray:
    """Features [..., size] float32 as stored, [...] of `row_type`. The scale is a power of two, so
    that only digits are lost. Raises UserError where one is not finite."""
    if not np.isfinite(features).all():
        raise UserError("gradients of training images are NaN or infinite; the model is broken")
    packed = np.zeros(features.shape[:-1], row_type(features.shape[-1]))
    packed["scale"] = np.exp2(np.ceil(np.log2(np.maximum(np.abs(features).max(axis=-1), 1e-30))))
    packed["values"] = features / packed["scale"][..., None]
    return packed


def unpack(packed: np.ndarray) -> np.ndarray:
    """Features [..., size] float32 of what is stored."""
    return packed["values"].astype(np.float32) * packed["scale"][..., None]


def build_features(
    maker: FeatureMaker, training_set: TrainingSet, folder: Path, overwrite: bool = False
) -> None:
    """Makes the features of a training set in `folder`, or keeps what is there. Raises UserError
    where those of something else are."""
    identity = feature_identity(maker.model, training_set, maker.settings)
    listing, remedy = folder / LISTING, "give --overwrite to replace it, or another --result_dir"

    def keep() -> bool:
        return keep_complete(listing, identity, overwrite, remedy) and keep_complete(
            folder / LOSSES, identity, True, remedy
        )

    shards = folder / f"shards-{digest(identity)[:16]}"
    paths = {
        shards / f"{start:08d}.npy": range(start, min(start + CHUNK_IMAGES, len(training_set)))
        for start in range(0, len(training_set), CHUNK_IMAGES)
    }
    if keep():
        if all(path.exists() for path in paths):
            return forget_claim(folder, "features")
        # A damaged shard was removed: it and the listing are made anew.
        record_path(listing).unlink(missing_ok=True)
    make_folder(shards)
    fill_shards(shards, paths, maker, training_set)

    def write_listing() -> None:
        # Reading tells whether each is still what was written.
        losses = np.concatenate([read_array_chunk(path)["loss"] for path in paths])
        write_record(
            folder / LOSSES, identity, maker.model.device, write_array(folder / LOSSES, losses)
        )
        lines = [f"{hash_file(path)}  {shards.name}/{path.name}\n" for path in paths]
        content = write_bytes(listing, "".join(lines).encode())
        write_record(listing, identity, maker.model.device, content)

    do_once(folder, "features", keep, write_listing)
    for other in folder.glob("shards-*"):  # of what --overwrite replaced
        if other != shards:
            shutil.rmtree(other, ignore_errors=True)


def fill_shards(
    folder: Path, paths: dict[Path, range], maker: FeatureMaker, images: TrainingSet
) -> None:
    """Writes the features of the images of every shard that is not there; those that other
    processes are at are theirs."""
    done = sum(len(rows) for path, rows in paths.items() if path.exists())
    with (
        progress(len(images), "features of the training set", "images", done) as bar,
        Share(folder, {path: path.stem for path in paths}, Path.exists) as share,
    ):
        for path in share:
            with finishing(), suppress(FileNotFoundError):
                rows = paths[path]
                packed = pack_images(maker.make(images, rows), maker.explain(images, rows))
                write_array_chunk(path, packed)
            share.release(path)
            bar.update(len(paths[path]))


class RemovalIndex:
    """Features that are complete and belong to this model, training set and settings."""

    def __init__(
        self,
        model: Model,
        training_set: TrainingSet,
        settings: RemovalSettings,
        folder: Path,
    ):
        """Raises UserError where the features are missing, incomplete or of something else."""
        self.model, self.settings, self.folder = model, settings, Path(folder)
        self.num_images = len(training_set)
        num_rows = training_set.embeddings.shape[1] * settings.probes
        self.dtype = image_type(len(settings.timesteps), num_rows, settings.sketch_size)
        identity = feature_identity(model, training_set, settings)
        check_record(self.folder / LISTING, identity, REMEDY)
        found = map(SHARD.fullmatch, read_text(self.folder / LISTING).splitlines())
        lines = list(found)
        expected = -(-self.num_images // CHUNK_IMAGES)
        names = [line.group(2) for line in lines if line]
        if len(names) != len(lines) or len(lines) != expected:
            raise UserError(
                f"{self.folder / LISTING}: expected a hash and the name of a shard on each of "
                f"{expected} lines; remove the folder, and they are made again"
            )
        self.paths = [self.folder / name for name in names]
        check_record(self.folder / LOSSES, identity, REMEDY)
        self.losses = read_array(self.folder / LOSSES, "losses", mmap=False)  # [N] float32

    def read(self, number: int) -> np.ndarray:
        """The rows of a shard as stored, [images] of `image_type`. Raises UserError where it is not
        of this index's shape, and as `read_chunk`."""
        path = self.paths[number]
        try:
            packed = read_array_chunk(path)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; remove the folder, and they are made again"
            ) from None
        length = min(CHUNK_IMAGES, self.num_images - number * CHUNK_IMAGES)
        if (packed.dtype, packed.shape) != (self.dtype, (length,)):
            raise UserError(
                f"{path}: is not the shard that was built; remove the folder, and they are made again"
            )
        return packed["rows"]

    def blocks(self) -> Iterator[np.ndarray]:
        """The features shard by shard, [images, timesteps, rows, size] float32. Raises UserError as
        `read`."""
        for number in range(len(self.paths)):
            yield unpack(self.read(number))

    def take(self, rows: np.ndarray, timestep: int) -> Iterator[np.ndarray]:
        """The features of some images at one timestep, [images, rows, size] float32, by the shards
        that hold them. rows: sorted. Raises UserError as `read`."""
        shards = rows // CHUNK_IMAGES
        for number in np.unique(shards).tolist():
            own = rows[shards == number] - number * CHUNK_IMAGES
            yield unpack(self.read(number)[own, timestep])
