"""The features of `removal` on disk: made once for a model and a training set, they serve every
query.

A folder: shards of 32 images, float16 with a scale a row, and features.txt with the hash of each,
which with its record is written last. Killed and run again, building goes on; processes share it.
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
from ..storage.artifacts import write_bytes
from ..storage.chunks import make_folder, read_array_chunk, write_array_chunk
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_text
from ..storage.records import check_record, keep_complete, record_path, write_record
from ..storage.sharing import Share, do_once, forget_claim
from .draws import CHUNK_IMAGES
from .removal import RIDGE, FeatureMaker, RemovalSettings, feature_identity, score_removal

LISTING = "features.txt"
SHARD = re.compile(r"([0-9a-f]{32})  (shards-[0-9a-f]{16}/\d{8}\.npy)")


def row_type(size: int) -> np.dtype:
    """The stored form of a row of features: multiples of a scale."""
    return np.dtype([("scale", "<f4"), ("values", "<f2", (size,))])


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
    model: Model,
    training_set: TrainingSet,
    settings: RemovalSettings,
    folder: Path,
    overwrite: bool = False,
) -> None:
    """Makes the features of a training set in `folder`, or keeps what is there. Raises UserError
    where those of something else are."""
    identity = feature_identity(model, training_set, settings)
    listing, remedy = folder / LISTING, "give --overwrite to replace it, or another --output"

    def keep() -> bool:
        return keep_complete(listing, identity, overwrite, remedy)

    maker = FeatureMaker(model, training_set.latents.shape[2:], settings)
    shards = folder / f"shards-{digest(identity)[:16]}"
    paths = {
        shards / f"{start:08d}.npy": range(start, min(start + CHUNK_IMAGES, len(training_set)))
        for start in range(0, len(training_set), CHUNK_IMAGES)
    }
    if keep() and all(path.exists() for path in paths):
        return forget_claim(folder, "features")
    # A damaged shard was removed: it and the listing are made anew.
    record_path(listing).unlink(missing_ok=True)
    make_folder(shards)
    fill_shards(shards, paths, maker, training_set)

    def write_listing() -> None:
        for path in paths:
            read_array_chunk(path)  # tells whether it is still what was written
        lines = [f"{hash_file(path)}  {shards.name}/{path.name}\n" for path in paths]
        content = write_bytes(listing, "".join(lines).encode())
        write_record(listing, identity, model.device, content)

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
                write_array_chunk(path, pack(maker.make(images, paths[path])))
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
        identity = feature_identity(model, training_set, settings)
        check_record(self.folder / LISTING, identity, "build the features with these settings")
        found = map(SHARD.fullmatch, read_text(self.folder / LISTING).splitlines())
        lines = list(found)
        expected = -(-self.num_images // CHUNK_IMAGES)
        names = [line.group(2) for line in lines if line]
        if len(names) != len(lines) or len(lines) != expected:
            raise UserError(
                f"{self.folder / LISTING}: expected a hash and the name of a shard on each of "
                f"{expected} lines; build the features again"
            )
        self.paths = [self.folder / name for name in names]

    def blocks(self) -> Iterator[np.ndarray]:
        """The features shard by shard, [images, timesteps, rows, size] float32. Raises UserError
        where one is not of this index's shape, and as `read_chunk`."""
        dtype = row_type(self.settings.sketch_size)
        for number, path in enumerate(self.paths):
            try:
                packed = read_array_chunk(path)
            except FileNotFoundError:
                raise UserError(f"{path}: no such file; build the features again") from None
            length = min(CHUNK_IMAGES, self.num_images - number * CHUNK_IMAGES)
            found = packed.dtype, packed.shape[:2]
            if found != (dtype, (length, len(self.settings.timesteps))):
                raise UserError(
                    f"{path}: is not the shard that was built; build the features again"
                )
            yield unpack(packed)

    def score(
        self,
        queries: list[TrainingSet],
        ridge: float = RIDGE,
        repeats: np.ndarray | None = None,
    ) -> np.ndarray:
        """Scores [queries, N] float64 of every training image for each query, a training set of one
        image. ridge, repeats: see `score_removal`. Raises UserError where repeats are of other
        images."""
        if repeats is not None and len(repeats) != self.num_images:
            raise UserError(
                f"repeats: expected {self.num_images} numbers, one an image, found {len(repeats)}"
            )
        shape = queries[0].latents.shape[2:]
        maker = FeatureMaker(self.model, shape, self.settings)
        features = np.stack([maker.make(query, [0])[0] for query in queries])
        return score_removal(self.blocks, features, ridge, repeats)
