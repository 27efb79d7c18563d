"""Builds an index of the training images' gradients, from which compute_influence.py --index ranks
them without the model.

    python -m unlearn index --task_json tasks/emoji_demo.json --dataroot data/emoji

Writes OUTPUT/<model>/ for the model of each task, 16 KB for every view of an image, in as much time
as gradient scoring takes. Killed and run again, the same command goes on.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..attribution.draws import ImageNoise
from ..attribution.index import build_index
from ..attribution.settings import AUTOCAST
from ..attribution.sweeps import Sweep
from ..datasets.tasks import group_by_model, load_tasks
from ..models.customization import check_customization, customized
from ..noise import timestep_grid
from ..runtime.programs import log
from .flags import add_flags, make_parser, resolve
from .inputs import (
    check_training_files,
    find_fisher,
    load_fisher,
    load_model,
    prepare_training_set,
    warn_of_fisher,
)


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line, resolved against the data root's defaults."""
    parser = make_parser(__doc__, "python -m unlearn index")
    parser.add_argument(
        "--task_json", required=True, help="task file: an index is built for each of its models"
    )
    parser.add_argument(
        "--output", default="results/index", help="where indices are built (default results/index)"
    )
    add_flags(
        parser,
        "dataroot",
        "sd_version",
        "lora",
        "weights",
        "laion_subset_size",
        "vae_batch_size",
        "batch_size",
        "time_samples",
        "noise_seed",
        "device",
        "overwrite",
    )
    parser.add_argument(
        "--precision",
        choices=AUTOCAST,
        help="fp32 (default), tf32 or bf16, which gradients survive",
    )
    parser.add_argument(
        "--fisher_path",
        help="diagonal Fisher that whitens gradients (default sd_fisher.* of the data root)",
    )
    parser.add_argument(
        "--damping",
        type=float,
        help="added to the Fisher, as a multiple of each parameter's mean entry",
    )
    args = parser.parse_args(argv)
    resolve(args)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, builds model by model."""
    args = parse_arguments(argv)
    groups = group_by_model(load_tasks(args.task_json, args.dataroot))
    check_training_files(args)
    find_fisher(args)
    model = load_model(args, fuse_lora=True)
    grid = timestep_grid(args.time_samples, model.num_train_timesteps)
    for tasks in groups.values():
        check_customization(model, tasks[0].model_dir(args.dataroot))
    fisher = load_fisher(model, args)
    training_set = prepare_training_set(model, args)
    warn_of_fisher(fisher, training_set, args)
    for tasks in groups.values():
        folder = Path(args.output) / tasks[0].model_name
        with customized(model, tasks[0].model_dir(args.dataroot)) as custom:
            sweep = Sweep(training_set, grid, args.batch_size, ImageNoise(args.noise_seed))
            build_index(
                custom,
                sweep,
                fisher,
                folder,
                args.precision,
                AUTOCAST[args.precision],
                args.overwrite,
            )
        log.info(f"{folder}: index of {len(training_set)} images, both views")
