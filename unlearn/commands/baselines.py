"""Scores the training images of each task's query by other methods: centred cosines, influence
functions, the TRAK family.

    python -m unlearn baselines --task_json tasks/emoji_small.json --dataroot data/emoji_small
    python -m unlearn baselines --task_json tasks/abc.json --methods pixel vae --features facebook/dinov2-base

Ends as compute_influence.py does: for each method and query with the table of the first images (where
there are more than 20 queries, with a line), and RESULT_DIR/baselines/<method>/<query>/influence.npz
with its record, influence.csv and visualization.jpg. Killed and run again, the same command goes on
where it was.
"""

import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from ..attribution.fishers import own_selection
from ..baselines.gradient_methods import VIEWS
from ..baselines.interface import Method, Run
from ..baselines.methods import COSTLY, METHODS
from ..baselines.saving import score_tasks
from ..baselines.similarity import feature_encoder
from ..baselines.similarity_methods import Features
from ..datasets.encoding import has_given_arrays
from ..datasets.pairs import map_files
from ..datasets.pictures import read_header
from ..datasets.queries import encode_query
from ..datasets.tasks import Task, load_tasks
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.customization import check_customization, check_tokens
from ..models.generation import NUM_INFERENCE_STEPS, check_steps
from ..models.lora import choose_selection, is_fused
from ..models.pipelines import SELECTIONS, Model
from ..noise import timestep_grid
from .flags import Parser, add_flags, make_parser, resolve
from .inputs import (
    check_pictures,
    check_result_dir,
    check_training_files,
    find_fisher,
    load_fisher,
    load_model,
    prepare_training_set,
    warn_of_fisher,
)


def describe_methods() -> str:
    """The first sentence on each method, for --help."""
    lines = ["methods:"]
    for name, method in METHODS.items():
        text = f"{name:<13}{' '.join(method.__doc__.split()).split('. ')[0].rstrip('.')}"
        lines += textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent=" " * 15)
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn baselines", describe_methods())
    add_flags(parser, "task_json", "result_dir")
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[name for name in METHODS if name not in COSTLY],
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default all but {', '.join(COSTLY)}); what they are stands below",
    )
    parser.add_argument(
        "--features",
        nargs="*",
        default=[],
        metavar="MODEL_NAME",
        help="CLIP or DINO models, folders or hub names",
    )
    add_flags(
        parser,
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
        "overwrite",
    )
    add_gradient_flags(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of random scores, projections and the query's draws (default 0)",
    )
    parser.add_argument(
        "--top_k", type=int, help="images in the table and the picture (default 10)"
    )
    args = parser.parse_args(argv)
    args.compat = None
    settings = resolve(args)
    args.weight_selection = choose_selection(args.weight_selection, args.lora, "all")
    return args, settings


def add_gradient_flags(parser: Parser) -> None:
    """Adds the flags of the influence function and of the TRAK family."""
    parser.add_argument(
        "--views",
        choices=VIEWS,
        default="max",
        help="gradients: an image's score from its two views' (default max)",
    )
    parser.add_argument(
        "--weight_selection",
        choices=SELECTIONS,
        help="TRAK family: whose gradients (default all, of a LoRA its own matrices: lora)",
    )
    parser.add_argument(
        "--projection_size",
        type=int,
        default=2048,
        help="TRAK family: numbers that a gradient is projected to (default 2048)",
    )
    parser.add_argument(
        "--trak_lambda",
        type=float,
        default=0.1,
        help="TRAK family: ridge, as a multiple of the kernel's mean diagonal (default 0.1)",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=int,
        default=NUM_INFERENCE_STEPS,
        help=f"journeytrak: steps of the sampling trajectory (default {NUM_INFERENCE_STEPS})",
    )
    parser.add_argument(
        "--patch_size",
        type=int,
        default=5,
        help="nda: cells of a patch's side, of the latents (default 5)",
    )
    parser.add_argument(
        "--patch_timestep", type=int, default=100, help="nda: timestep of the noise (default 100)"
    )
    parser.add_argument(
        "--mucs_rate",
        type=float,
        default=2e-4,
        help="mucs: learning rate, a tenth of training's (default 2e-4)",
    )
    parser.add_argument(
        "--mucs_steps", type=int, default=200, help="mucs: steps at most (default 200)"
    )
    parser.add_argument(
        "--mucs_batch",
        type=int,
        default=100,
        help="mucs: training images, and noisy copies of the query, a step (default 100)",
    )
    parser.add_argument(
        "--mucs_draws",
        type=int,
        default=100,
        help="mucs: draws of noise that images are scored by (default 100)",
    )
    parser.add_argument(
        "--fisher_path", help="influence: diagonal Fisher (default sd_fisher.* of the data root)"
    )
    parser.add_argument(
        "--damping",
        type=float,
        help="influence: added to the Fisher, as a multiple of each parameter's mean entry",
    )
    parser.add_argument(
        "--unlearn_batch_size", type=int, help="influence: noise draws of the query in one pass"
    )
    parser.add_argument(
        "--unlearn_grad_accum_steps",
        type=int,
        help="influence: passes that make the query's gradient",
    )


def name_features(names: Sequence[str]) -> list[str]:
    """Method names of the feature models: the last part of each. Raises UserError where one is
    another method's."""
    methods = [Path(name).resolve().name for name in names]
    if len({*METHODS, "ours", *methods}) != len(METHODS) + 1 + len(methods):
        raise UserError(
            f"--features {' '.join(names)}: names must differ from each other and from ours, "
            f"{', '.join(METHODS)}"
        )
    return methods


def check_methods(args: Namespace, tasks: Sequence[Task]) -> None:
    """Raises UserError where there is no method, one is unknown, or one cannot score a task."""
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown or not args.methods + args.features:
        raise UserError(
            f"--methods: expected some of {', '.join(METHODS)}, found "
            f"{', '.join(unknown) or 'none'}"
        )
    custom = next((task for task in tasks if task.model_path is not None), None)
    if custom and (refused := [name for name in args.methods if METHODS[name].needs_base_model]):
        others = [name for name, method in METHODS.items() if not method.needs_base_model]
        raise UserError(
            f"{args.task_json}: {custom.synth_image_path}: was made by the customized model "
            f"{custom.model_path}; "
            f"{', '.join(refused)} can only score queries of the base model; give --methods "
            f"{' '.join(others)}"
        )


def make_method(method: type[Method], args: Namespace) -> Method:
    """A method of METHODS with the flags that its fields are named after."""
    make: Callable[..., Method] = method
    return make(**{field.name: getattr(args, field.name) for field in fields(method) if field.init})


def list_readings(dataroot: str | Path, training_set: TrainingSet) -> dict:
    """How pictures that are not plain are read, {id: reading}, of a data root whose arrays, and so
    its identity, tell nothing of them."""
    if not has_given_arrays(dataroot):
        return {}
    readings = map_files(
        lambda path: read_header(path)[0] if path else [], training_set.paths, "looking at images"
    )
    return {id: reading for id, reading in zip(training_set.ids, readings) if reading}


def of_base_model(tasks: Sequence[Task]) -> list[Task]:
    """Those tasks whose pictures the base model made."""
    return [task for task in tasks if task.model_path is None]


def check_run(args: Namespace) -> tuple[list[Task], list[str]]:
    """The checks that need no model: (tasks, method names of the feature models)."""
    tasks, feature_names = load_tasks(args.task_json, args.dataroot), name_features(args.features)
    check_methods(args, tasks)
    check_result_dir(args.result_dir)
    check_training_files(args)
    if any(METHODS[name].needs_fisher for name in args.methods):
        find_fisher(args)
    check_pictures(tasks, args.dataroot)
    check_tokens(None, of_base_model(tasks), args.sd_version)
    return tasks, feature_names


def check_needs(
    methods: dict[str, Method], training_set: TrainingSet, dataroot: str | Path
) -> None:
    """Raises UserError where the training images lack what a method looks at."""
    for need, values in ("pictures", training_set.paths), ("captions", training_set.captions):
        names = [name for name, method in methods.items() if getattr(method, f"needs_{need}")]
        if names and not any(values):
            raise UserError(
                f"--methods {' '.join(names)}: need the training images' {need}, and "
                f"{dataroot} has none; leave them out"
            )


def make_run(
    model: Model, methods: dict[str, Method], tasks: list[Task], args: Namespace, settings: dict
) -> Run:
    """What the methods score from. The grid, the Fisher and the training set are checked before a
    query is encoded."""
    grid = timestep_grid(args.time_samples, model.num_train_timesteps)
    check_steps(model, args.num_inference_steps)
    needs_fisher = any(method.needs_fisher for method in methods.values())
    # Of the weights that influence looks at, whatever the TRAK family's are.
    weights = own_selection(model)
    fisher = load_fisher(model, args, weights) if needs_fisher else None
    training_set = prepare_training_set(model, args)
    if fisher:
        warn_of_fisher(fisher, training_set, args, weights)
    check_needs(methods, training_set, args.dataroot)
    needs_pictures = any(method.needs_pictures for method in methods.values())
    return Run(
        model,
        training_set,
        tasks,
        [encode_query(model, task, args.dataroot) for task in tasks],
        args.dataroot,
        model.resolution(settings),
        grid,
        Path(args.result_dir) / "baselines",
        fisher,
        list_readings(args.dataroot, training_set) if needs_pictures else {},
        args.batch_size,
        args.vae_batch_size,
        args.overwrite,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, then scores and saves method by method."""
    args, settings = parse_arguments(argv)
    tasks, feature_names = check_run(args)
    methods = {
        **{name: make_method(METHODS[name], args) for name in args.methods},
        **{
            name: Features(model, feature_encoder(model, args.device, args.vae_batch_size))
            for name, model in zip(feature_names, args.features)
        },
    }
    model = load_model(args, fuse_lora=is_fused(args.weight_selection))
    check_customization(model, None, of_base_model(tasks))
    run = make_run(model, methods, tasks, args, settings)
    for name, method in methods.items():
        score_tasks(run, name, method, args.top_k)
