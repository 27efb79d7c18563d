"""Caches every training image's loss under the model of each task, with fixed noise and timesteps.

    python compute_training_loss.py --task_json tasks/emoji_demo.json --dataroot data/emoji
    python compute_training_loss.py --task_json tasks/demo_task.json    # AbC, in data/abc

Writes RESULT_DIR/orig_loss/<model>/{exemplar,laion}_loss.npy, float32 [2n]: n images as is, then n
mirrored, each with a record of what it was made with; of the base model, whose tasks name no other,
orig_loss/base/laion_loss.npy alone. Killed and run again, the same command goes on where it was;
several processes of it, by `accelerate launch` or on several machines, share the images. --shard
I/N takes the I-th of N parts of the models.
"""

from argparse import Namespace
from collections.abc import Sequence

from unlearn.attribution.caches import adopt_losses, cache_losses
from unlearn.attribution.settings import LossSettings
from unlearn.attribution.sweeps import Sweep
from unlearn.commands.advice import loss_command
from unlearn.commands.flags import add_flags, make_parser, print_plan, resolve
from unlearn.commands.inputs import check_result_dir, check_training_files, loss_noise, loss_path
from unlearn.commands.preparation import Prepared, prepare
from unlearn.datasets.queries import encode_exemplars
from unlearn.datasets.tasks import Task, group_by_model, load_tasks
from unlearn.models.customization import customized
from unlearn.runtime.programs import log, part_of, run
from unlearn.storage.records import record_path


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line, resolved against the data root's defaults."""
    parser = make_parser(__doc__)
    add_flags(
        parser,
        "task_json",
        "result_dir",
        "sd_version",
        "lora",
        "weights",
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
    resolve(args)
    return args


def cache_model(prepared: Prepared, tasks: list[Task], args: Namespace) -> None:
    """Caches the losses of the exemplars, where there are any, and of the training set under the
    model of some tasks."""
    settings = LossSettings(prepared.grid, loss_noise(args), args.precision)
    with customized(prepared.model, tasks[0].model_dir(args.dataroot)) as model:
        for name in tasks[0].image_sets:
            images = prepared.training_set
            if name == "exemplar":
                images = encode_exemplars(model, tasks[0], args.dataroot, args.vae_batch_size)
            identity = settings.identity(model, images)
            path = loss_path(args, tasks[0], name)
            sweep = Sweep(images, settings.timesteps, args.batch_size, settings.noise)
            if args.compat and path.exists() and not record_path(path).exists():
                if not args.overwrite:
                    adopt_losses(sweep, model, path, identity, loss_command(args))
            cache_losses(sweep, model, path, identity, args.overwrite)
            log.info(f"{path}: losses of {len(images)} images, as is and mirrored")


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, scores, saves."""
    args = parse_arguments(argv)
    groups = group_by_model(load_tasks(args.task_json, args.dataroot))
    groups = dict(part_of(groups.items(), args.shard))
    check_result_dir(args.result_dir)
    check_training_files(args)
    prepared = prepare(args, groups, "--time_samples")
    if args.dry_run:
        images, grid = prepared.training_set, prepared.grid
        return print_plan(args, groups, images, grid, len(groups), args.batch_size)
    for tasks in groups.values():
        cache_model(prepared, tasks, args)


if __name__ == "__main__":
    run(main)
