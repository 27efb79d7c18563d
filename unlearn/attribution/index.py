"""An index of a model's training images: the compressed gradient of every view, from which all are
ranked without the model.

A folder: compression.safetensors (how gradients were compressed), shards of 32 images,
memory-mapped, and shards.txt with the hash of each, which with its record is written last. Killed
and run again, building goes on.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..datasets.conditioning import count_texts
from ..errors import UserError
from ..models.pipelines import Model
from ..runtime.programs import progress
from ..storage.artifacts import write_bytes, write_tensors
from ..storage.chunks import read_chunk
from ..storage.hashes import digest, hash_file
from ..storage.reading import read_array, read_tensors, read_text
from ..storage.records import check_record, keep_complete, record_path, write_record
from ..storage.sharing import do_once, forget_claim
from .compression import Compression, fit, multiply, pack, row_type
from .curvature import DiagonalFisher
from .derivatives import text_gradients
from .draws import rows_of
from .ekfac import EkFac
from .losses import score_rows
from .sweeps import Sweep

SHARD = re.compile(r"([0-9a-f]{32})  (shards-[0-9a-f]{16}/\d{6}-of-\d{6}\.npy)")
FIT_IMAGES = 256  # spread over the training set; to their gradients the bases are fitted


def check_diagonal(fisher: DiagonalFisher) -> None:
    """Raises UserError where a curvature is no diagonal, by which an index weighs its gradients."""
    if isinstance(fisher, EkFac):
        raise UserError("--index: weighs gradients by the diagonal Fisher, found EK-FAC; give that")


def index_identity(custom: Model, sweep: Sweep, fisher: DiagonalFisher) -> dict:
    """Identity of an index: what must be the same where it is used. Its precision is recorded but
    never refused."""
    check_diagonal(fisher)
    images = sweep.training_set
    return {
        **custom.identity,
        "dataset": images.name,
        "num_images": len(images),
        "training_set": images.identity,
        **sweep.noise.identity(custom.device),
        "timesteps": sweep.grid,
        "fisher": fisher.identity,
        "fit_images": FIT_IMAGES,
    }


def fit_compression(
    custom: Model, sweep: Sweep, fisher: DiagonalFisher, autocast: torch.dtype | None
) -> Compression:
    """The Compression fitted to the gradients of images spread over the training set. In one
    thread: sums then do not depend on which batch comes first."""
    images = sweep.training_set
    spread = np.unique(np.linspace(0, len(images) - 1, min(FIT_IMAGES, len(images))).astype(int))
    batch_size = max(
        sweep.pass_size, len(sweep.grid)
    )  # all timesteps of a text together: their sum is what is compressed

    def visit_gradients(visit):
        def measure(model, *samples):
            for name, gradients in text_gradients(model, *samples, autocast=autocast):
                visit(name, gradients)
            return torch.zeros(count_texts(samples[-1]))

        for part in np.array_split(spread, -(-len(spread) // 16)):
            rows = rows_of(part, len(images), images.latents.shape[0])
            score_rows(
                custom,
                images,
                rows,
                sweep.grid,
                sweep.draw(rows, custom.device, pool),
                batch_size,
                measure,
            )
            bar.update(len(part))

    with (
        ThreadPoolExecutor(4) as pool,
        progress(2 * len(spread), "fitting the index's bases", "images") as bar,
    ):
        return fit(
            visit_gradients,
            {
                name: value.sqrt().float().to(custom.device)
                for name, value in fisher.denominators.items()
            },
        )


def read_listing(path: str | Path) -> list[tuple[str, str]]:
    """(hash, name below the index's folder) of each shard of a complete index. Raises UserError
    where the file is no such list."""
    shards = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not (found := SHARD.fullmatch(line)):
            raise UserError(
                f"{path}: line {number}: expected a hash and the name of a shard; build the "
                f"index again"
            )
        shards.append((found[1], found[2]))
    return shards


def build_index(
    custom: Model,
    sweep: Sweep,
    fisher: DiagonalFisher,
    folder: Path,
    precision: str,
    autocast: torch.dtype | None,
    overwrite: bool = False,
) -> None:
    """Builds the index of a sweep's training set in `folder`, or keeps what is there. Raises
    UserError where another one is."""
    identity = {
        **index_identity(custom, sweep, fisher),
        "precision": precision,
    }
    listing, compression_path = folder / "shards.txt", folder / "compression.safetensors"
    remedy = "give --overwrite to replace it, or another --output"
    if all(
        [keep_complete(path, identity, overwrite, remedy) for path in (compression_path, listing)]
    ):
        if all((folder / name).exists() for _, name in read_listing(listing)):
            for name in "compression", "shards":
                forget_claim(folder, name)
            return
        record_path(listing).unlink(
            missing_ok=True
        )  # a damaged shard was deleted: it and the listing are made anew

    def write_compression():
        record_path(compression_path).unlink(missing_ok=True)
        content = write_tensors(
            compression_path, fit_compression(custom, sweep, fisher, autocast).tensors
        )
        write_record(compression_path, identity, custom.device, content)

    do_once(
        folder,
        "compression",
        lambda: keep_complete(compression_path, identity, overwrite, remedy),
        write_compression,
    )
    compression = Compression(read_tensors(compression_path)).to(custom.device)
    shards = folder / f"shards-{digest(identity, hash_file(compression_path))[:16]}"
    shards.mkdir(exist_ok=True)
    paths = sweep.fill(custom, shards, f"index {folder.name}", compression.measure(autocast), pack)

    def write_listing():
        record_path(listing).unlink(missing_ok=True)
        for path in paths:
            read_chunk(path)  # tells whether it is still what was written
        text = "".join(f"{hash_file(path)}  {shards.name}/{path.name}\n" for path in paths)
        write_record(listing, identity, custom.device, write_bytes(listing, text.encode()))

    do_once(
        folder, "shards", lambda: keep_complete(listing, identity, overwrite, remedy), write_listing
    )
    for other in folder.glob("shards-*"):  # of what --overwrite replaced
        if other != shards:
            shutil.rmtree(other, ignore_errors=True)


def check_compression(
    path: str | Path, shapes: Mapping[str, Sequence[int]], remedy: str
) -> dict[str, torch.Tensor]:
    """The tensors of a Compression of weights of these shapes. Raises UserError, ending with
    `remedy`, where they are not."""
    tensors = read_tensors(path)
    for name, (height, width) in shapes.items():
        root, left, right, kept, deviation = (
            tensors.get(f"{name}.{kind}", torch.empty(0))
            for kind in ("root", "left", "right", "kept", "deviation")
        )
        if (
            root.shape != (height, width)
            or left.shape[1:] != (height,)
            or right.shape[1:] != (width,)
            or kept.ndim != 1
            or kept.dtype != torch.int64
            or deviation.shape != kept.shape
            or len(kept)
            and not 0 <= kept.min() <= kept.max() < len(left) * len(right)
        ):
            raise UserError(f"{path}: {name}: not as an index of this model has it; {remedy}")
    if extra := {name.rpartition(".")[0] for name in tensors} - shapes.keys():
        raise UserError(f"{path}: {min(extra)!a:.80}: is no weight of this model; {remedy}")
    return tensors


class Index:
    """An index that is complete and belongs to this model, training set, grid and Fisher."""

    def __init__(
        self, folder: Path, custom: Model, sweep: Sweep, fisher: DiagonalFisher, command: str
    ) -> None:
        """Raises UserError, naming the command that builds it, where the index is missing,
        incomplete or of something else; the shards are read by `estimate`."""
        self.folder, self.sweep, self.command = folder, sweep, command
        remedy = f"build it with the same flags: {command}"
        identity = index_identity(custom, sweep, fisher)
        for path in folder / "shards.txt", folder / "compression.safetensors":
            check_record(path, identity, remedy)
        shapes = {name: value.shape for name, value in fisher.denominators.items()}
        self.compression = Compression(
            check_compression(folder / "compression.safetensors", shapes, remedy)
        )
        self.shards = read_listing(folder / "shards.txt")
        if len(self.shards) != len(sweep.chunks):
            raise UserError(
                f"{folder}: expected {len(sweep.chunks)} shards, found {len(self.shards)}; {remedy}"
            )

    def estimate(self, changes: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
        """First order of every view's loss change for each weight change: [changes, views * N]
        float32, in one pass over the shards. Raises UserError where a shard is not the one that was
        built."""
        queries = np.stack(
            [self.compression.read_change(change).numpy() for change in changes], axis=1
        )
        estimates = np.empty((len(changes), sum(map(len, self.sweep.chunks))), np.float32)
        for rows, (content, name) in zip(self.sweep.chunks, self.shards):
            path = self.folder / name
            shard = read_array(path, "shard of the index")
            if (
                hash_file(path) != content
                or shard.ndim != 1
                or shard.dtype != row_type(self.compression.size)
                or len(shard) != len(rows)
            ):
                raise UserError(
                    f"{path}: is not the shard that was built (damaged or replaced); delete it "
                    f"and run: {self.command}"
                )
            estimates[:, rows] = multiply(shard, queries).T
        return estimates
