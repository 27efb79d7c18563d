"""What a query by removal costs of many images: made-up features on disk, read as those of a model are.

    python tests/removal_scale.py --images 100000 --folder /tmp/features

Prints seconds, bytes on disk and the process's highest memory: of the Solution (made once for a model,
on --solved images, for its cost grows with their number), of a query, and of the ten images that are
chosen together.
"""

import argparse
import resource
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from unlearn.attribution.draws import CHUNK_IMAGES
from unlearn.attribution.removal import USUAL
from unlearn.attribution.removal_index import pack_images, unpack
from unlearn.attribution.removal_scores import (
    RIDGE,
    Solution,
    at_timestep,
    invert,
    score_draws,
    solve,
)
from unlearn.attribution.removal_sets import choose_sets
from unlearn.storage.chunks import make_folder, read_array_chunk, write_array_chunk

GENERATOR = np.random.default_rng(0)


def make_shards(folder, num_images, shape):
    """Shards of so many images, each of its own numbers."""
    make_folder(folder)
    paths = []
    numbers = GENERATOR.normal(size=(CHUNK_IMAGES, *shape)).astype(np.float32)
    for start in range(0, num_images, CHUNK_IMAGES):
        paths.append(folder / f"{start:08d}.npy")
        count = min(CHUNK_IMAGES, num_images - start)
        # Rolled and mixed: no shard is another's, and each takes no new random numbers.
        features = np.roll(numbers, start // CHUNK_IMAGES, axis=-1)[:count]
        features = features * GENERATOR.choice([-1, 1], size=(count, 1, 1, 1)).astype(np.float32)
        if not paths[-1].exists():
            write_array_chunk(paths[-1], pack_images(features, np.ones(count, np.float32)))
    return paths


def blocks_of(paths):
    """The features shard by shard, each checked as it is read."""
    for path in paths:
        yield unpack(read_array_chunk(path)["rows"])


def take(paths, timestep, rows):
    """The features of some images at a timestep, by the shards that hold them."""
    rows = np.asarray(rows)
    for number in np.unique(rows // CHUNK_IMAGES).tolist():
        own = rows[rows // CHUNK_IMAGES == number] - number * CHUNK_IMAGES
        packed = read_array_chunk(paths[number])["rows"]
        yield unpack(packed[own, timestep]).astype(np.float64)


def tell(what, start, more=""):
    """Prints seconds since a start, and memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{what}: {time.monotonic() - start:.1f} s, at most {peak:.2f} GB of memory{more}")


def main():
    """Makes features, solves a timestep of some, and scores a query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--solved", type=int, default=8192)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    if not USUAL.sketch_size // USUAL.probes <= args.solved <= args.images:
        parser.error("--solved: as many images as make a whole matrix, or more, at most --images")
    shape = len(USUAL.timesteps), USUAL.probes, USUAL.sketch_size
    paths = make_shards(args.folder, args.images, shape)
    size = sum(path.stat().st_size for path in paths)
    print(f"{args.images} images: {size / 1e9:.2f} GB on disk, {size / args.images:.0f} bytes each")
    start = time.monotonic()
    some = partial(blocks_of, paths[: args.solved // CHUNK_IMAGES])
    found = solve(partial(at_timestep, some, 0, None), shape[-1], RIDGE)
    tell(f"Solution of {len(found.own)} images at one timestep", start)
    # That of all images has a matrix of this size too, and so costs a query the same.
    own = np.broadcast_to(np.eye(shape[1]), (args.images, shape[1], shape[1]))
    known = Solution(found.matrix, found.mean_square, own)
    query = GENERATOR.normal(size=(1, *shape))
    start = time.monotonic()
    scores, _ = score_draws(
        partial(blocks_of, paths), query, solution_of=lambda number, blocks: known
    )
    assert scores.shape == (shape[0], 1, args.images) and np.isfinite(scores).all()
    tell(f"a query of {args.images} images", start)
    start = time.monotonic()
    inverse = invert(known.matrix, some, RIDGE * known.mean_square)
    [chosen] = choose_sets(
        scores.sum(axis=0), query, 10, partial(take, paths), lambda number: inverse
    )
    assert len(chosen.rows) == 10 and np.isfinite(chosen.rises).all()
    tell("ten images that are chosen together", start)
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
