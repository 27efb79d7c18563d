"""Measures what sharing a sweep costs: two processes of one thread at one sweep, against two that
each do one of their own.

    python tests/sharing.py --rounds 5

Prints images a second of both, round by round, and the median of their ratios; 1 is two independent
processes' throughput.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

torch.set_num_threads(1)  # before any work: a fork does not survive the threads of its parent

from unlearn.attribution.caches import cache_losses
from unlearn.attribution.settings import LossSettings
from unlearn.attribution.sweeps import Sweep
from unlearn.datasets.encoding import encode_training_set
from unlearn.datasets.settings import read_settings
from unlearn.datasets.training_sets import open_training_set
from unlearn.models.pipelines import load_model
from unlearn.noise import timestep_grid


def run_two(work):
    """Seconds that two forks take for work(0) and work(1)."""
    begun, children = time.monotonic(), []
    for number in range(2):
        if (child := os.fork()) == 0:
            work(number)
            os._exit(0)
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit("a process failed")
    return time.monotonic() - begun


def main():
    """Alternates the two, so that both see the same machine."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataroot", default="data/emoji_small")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings = read_settings(args.dataroot)
    model = load_model(settings["pipeline"], "cpu", settings["unet"])
    encode_training_set(
        model, args.dataroot, model.resolution(settings), settings["vae_batch_size"]
    )
    images = open_training_set(
        args.dataroot,
        settings["name"],
        model.latent_shape(model.resolution(settings)),
        model.conditioning_shapes,
    )
    grid, ratios = timestep_grid(settings["time_samples"], model.num_train_timesteps), []
    identity = LossSettings(grid).identity(model, images)
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:

            def sweep(name):
                cache_losses(
                    Sweep(images, grid, settings["batch_size"]),
                    model,
                    Path(folder) / name / "loss.npy",
                    identity,
                )

            apart = run_two(lambda number: sweep(str(number)))
            shared = run_two(lambda number: sweep("shared"))
        ratios.append(apart / (2 * shared))
        print(
            f"round {number + 1}: {2 * len(images) / apart:.1f} images/s apart, "
            f"{len(images) / shared:.1f} shared: {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.3f} of two independent processes")


if __name__ == "__main__":
    main()
