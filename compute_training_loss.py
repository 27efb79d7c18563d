"""Caches every training image's loss under the model of each task, with fixed noise and timesteps.

    python compute_training_loss.py --task_json tasks/emoji_demo.json --dataroot data/emoji
    python compute_training_loss.py --task_json tasks/demo_task.json            # the AbC benchmark, in data/abc

Writes RESULT_DIR/orig_loss/<model>/{exemplar,laion}_loss.npy, float32 [2n]: n images as is, then n
mirrored, each with a record of what it was made with; of the base model, whose tasks name no other,
orig_loss/base/laion_loss.npy alone. Killed and run again, the same command goes on where it was;
several processes of it, by `accelerate launch` or on several machines, share the images. --shard
I/N takes the I-th of N parts of the models.
"""

import argparse
from pathlib import Path

from unlearn.advice import loss_command
from unlearn.attribution.losses import loss_identity
from unlearn.attribution.sweeps import Sweep, adopt_losses, cache_losses
from unlearn.commands.inputs import (
    add_flags,
    check_pictures,
    check_result_dir,
    check_training_files,
    encode_exemplars,
    prepare_training_set,
    print_plan,
    resolve,
)
from unlearn.datasets.queries import read_stored
from unlearn.datasets.tasks import group_by_model, load_tasks
from unlearn.models.customization import check_customization, check_tokens, customized
from unlearn.models.pipelines import load_model
from unlearn.noise import timestep_grid
from unlearn.runtime.programs import log, part_of, run
from unlearn.storage.records import record_path


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task_json", required=True, help="task file: which synthesized images, of which models"
    )
    parser.add_argument(
        "--result_dir", default="results", help="where results are written (default results)"
    )
    add_flags(
        parser,
        "sd_version",
        "dataroot",
        "laion_subset_size",
        "vae_batch_size",
        "batch_size",
        "time_samples",
        "noise_seed",
        "precision",
        "device",
        "compat",
        "overwrite",
        "dry_run",
        "shard",
    )
    args = parser.parse_args(argv)
    return args, resolve(args)


def cache_model(model, tasks, training_set, grid, args, settings):
    """Caches the losses of the exemplars, where there are any, and of the training set under one
    model."""
    with customized(model, tasks[0].model_dir(args.dataroot)) as custom:
        for name in tasks[0].image_sets:
            images = (
                training_set
                if name == "laion"
                else encode_exemplars(custom, tasks[0], args, settings)
            )
            identity = loss_identity(
                custom, images, grid, args.noise_seed, args.precision, args.compat, args.batch_size
            )
            path = Path(args.result_dir) / "orig_loss" / tasks[0].model_name / f"{name}_loss.npy"
            sweep = Sweep(images, grid, args.batch_size, args.noise_seed, args.compat)
            if (
                args.compat
                and path.exists()
                and not record_path(path).exists()
                and not args.overwrite
            ):
                adopt_losses(sweep, custom, path, identity, loss_command(args))
            cache_losses(sweep, custom, path, identity, args.overwrite)
            log.info(f"{path}: losses of {len(images)} images, as is and mirrored")


def main(argv=None):
    """Checks, loads, scores, saves."""
    args, settings = parse_arguments(argv)
    tasks = load_tasks(args.task_json, args.dataroot)
    groups = dict(part_of(group_by_model(tasks).items(), args.shard))
    tasks = [task for group in groups.values() for task in group]
    check_result_dir(args.result_dir)
    check_training_files(args)
    check_pictures(tasks, args.dataroot)
    for group in groups.values():
        check_tokens(group[0].model_dir(args.dataroot), group, args.sd_version)
    model = load_model(args.sd_version, args.device, args.unet)
    grid = timestep_grid(args.time_samples, len(model.alpha_bars))
    for group in groups.values():
        check_customization(model, group[0].model_dir(args.dataroot), group)
    for task in tasks:
        read_stored(
            task,
            args.dataroot,
            model.latent_shape(model.resolution(settings)),
            model.embedding_shape,
        )
    training_set = prepare_training_set(model, args, settings)
    if args.dry_run:
        return print_plan(args, groups, training_set, grid, len(groups), args.batch_size)
    for group in groups.values():
        cache_model(model, group, training_set, grid, args, settings)


if __name__ == "__main__":
    run(main)
