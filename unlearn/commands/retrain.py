"""Trains models from scratch and measures queries under them: in full, without images, on random
subsets.

    python -m unlearn retrain full --dataroot data/emoji_small --seeds 0 1 2
    python -m unlearn retrain subsets --count 64 --dataroot data/emoji_small --task_json tasks/emoji_small.json
    python -m unlearn retrain without --top_k 6 12 --influence results/influence --num_queries 5 --task_json ... --dataroot ...
    python -m unlearn retrain without --top_k 3 --scores results/evidence/emoji_shared/scores --methods removal --task_json ...
    python -m unlearn retrain without --together 4 --top_k 3 --num_queries 32 --influence ... --task_json ... --dataroot ...
    python -m unlearn retrain sets --sets_json sets.json --dataroot data/emoji_small
    python -m unlearn retrain random --top_k 6 12 --count 2 --dataroot ... --task_json ...

Writes RESULT_DIR/retrain/<model>/model.safetensors and, where task files are given, one small file
of measures a model to --output: each query's loss under it and how far the picture that it makes
from the query's prompt and seed has moved. The data root says which UNet and which recipe. Killed
and run again, the same command goes on where it was; under `accelerate launch` every process trains
its share of the models.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from ..baselines.similarity import Encode, feature_encoder
from ..datasets.queries import encode_query
from ..datasets.repeats import read_repeats
from ..datasets.tasks import Task, load_tasks
from ..datasets.training_sets import TrainingSet
from ..evaluation.retrained import query_digests
from ..models.pipelines import Model, load_model
from ..retraining.lora import with_fresh_lora
from ..retraining.measures import MeasureSettings, Questions, join_sets, load_pictures
from ..retraining.models import (
    finish,
    measure_identity,
    model_identity,
    train_stack,
    weights_path,
)
from ..retraining.plans import PLANS, Plan, make_stacks
from ..retraining.recipes import Recipe
from ..runtime.programs import log, process_share
from .flags import add_flags, make_parser, resolve
from .inputs import prepare_training_set
from .retrain_checks import check_inputs, check_measures
from .retrain_flags import add_measure_flags, add_plan_flags, add_recipe_flags
from .retrain_plans import find_unfinished, measures_path, plan_models


def recipe_of(args: Namespace, settings: dict, num_images: int) -> Recipe:
    """The recipe by the flags, which the data root's settings have filled, and by these settings;
    its seed is the first one."""
    return Recipe(
        args.train_epochs,
        args.train_lr,
        args.train_batch_size,
        args.train_schedule,
        args.seeds[0],
        args.mixed_precision,
        read_repeats(args.dataroot, num_images),
        settings["train_from"],
        args.train_lora_rank,
        float(args.train_lora_alpha or args.train_lora_rank),
        args.train_lora_targets,
    )


def open_model(args: Namespace) -> Model:
    """The model that is trained: the untrained one, or the base model with a fresh LoRA."""
    rank = args.train_lora_rank
    model = load_model(
        args.sd_version, args.device, args.unet, trained=bool(rank), weights=args.weights
    )
    if not rank:
        return model
    alpha = float(args.train_lora_alpha or rank)
    return with_fresh_lora(model, rank, alpha, args.train_lora_targets)


def print_cost(
    plans: Sequence[Plan],
    untrained: Sequence[Plan],
    unmeasured: Sequence[Plan],
    training_set: TrainingSet,
    tasks: Sequence[Task],
    recipe: Recipe,
) -> None:
    """Prints what there is to do: models, steps and size."""
    print(
        f"{len(plans)} models; {len(untrained)} to be trained, {len(unmeasured) if tasks else 0} "
        f"to be measured on {len(tasks)} queries"
    )
    print(
        f"{len(training_set)} images; {recipe.epochs} epochs of {recipe.batch_size} images a "
        f"step: {recipe.num_steps(len(training_set)):,} steps a model "
        f"at a learning rate of {recipe.rate:g} ({recipe.schedule})"
    )


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn retrain")
    parser.add_argument(
        "kind",
        choices=PLANS,
        help="all images | random subsets | without one, each in turn | without sets of your own | "
        "without K random ones | without a query's top K",
    )
    parser.add_argument(
        "--task_json",
        nargs="+",
        default=[],
        help="task files whose queries are measured under each model",
    )
    parser.add_argument(
        "--result_dir", default="results", help="where weights are written (default results)"
    )
    parser.add_argument("--output", help="folder of the measures (default RESULT_DIR/retrained)")
    parser.add_argument(
        "--stack", type=int, default=1, help="models trained at once, as one batch (default 1)"
    )
    add_plan_flags(parser)
    add_recipe_flags(parser)
    add_measure_flags(parser)
    add_flags(
        parser,
        "dataroot",
        "sd_version",
        "weights",
        "laion_subset_size",
        "vae_batch_size",
        "noise_seed",
        "precision",
        "device",
        "overwrite",
        "dry_run",
    )
    args = parser.parse_args(argv)
    settings = resolve(args, {"loss_batch_size": "batch_size"}, with_lora=False)
    args.output = Path(args.output or f"{args.result_dir}/retrained")
    return args, settings


def ask(
    model: Model,
    args: Namespace,
    settings: dict,
    tasks: list[Task],
    measuring: MeasureSettings,
    encode: Encode | None,
) -> Questions | None:
    """What every model is asked: the queries encoded, their pictures loaded. None without tasks."""
    if not tasks:
        return None
    queries = join_sets([encode_query(model, task, args.dataroot) for task in tasks])
    pictures = None
    if not args.no_pictures:
        pictures = load_pictures(
            args.dataroot, [task.synth_image_path for task in tasks], model.resolution(settings)
        )
    return Questions(
        tasks, queries, pictures, encode, measuring, args.loss_batch_size, args.vae_batch_size
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, plans, then trains and measures stack by stack."""
    args, settings = parse_arguments(argv)
    tasks = [task for path in args.task_json for task in load_tasks(path, args.dataroot)]
    check_inputs(args, tasks)
    encode = (
        feature_encoder(args.features, args.device, args.vae_batch_size) if args.features else None
    )
    model = open_model(args)
    measuring = check_measures(model, args, tasks)
    training_set = prepare_training_set(model, args)
    recipe = recipe_of(args, settings, len(training_set))
    index, num_processes = process_share()
    plans = plan_models(args, training_set, tasks)
    digests = query_digests(tasks, args.dataroot)
    trained = {
        plan.name: model_identity(model, training_set, plan, recipe, args.precision)
        for plan in plans
    }
    measured = {
        plan.name: measure_identity(trained[plan.name], training_set, plan, measuring, digests)
        for plan in plans
    }
    untrained, unmeasured = find_unfinished(plans, trained, measured, tasks, args)
    print_cost(plans, untrained, unmeasured, training_set, tasks, recipe)
    if args.dry_run:
        return
    questions = ask(model, args, settings, tasks, measuring, encode)
    # Stacks are runs of all plans, done or not, so that a stack which was killed while it was
    # written is the same again.
    for stack in make_stacks(plans, args.stack)[index::num_processes]:
        cost = {}
        if any(plan in untrained for plan in stack):
            seconds = train_stack(
                model, training_set, stack, recipe, args.precision, args.result_dir
            )
            cost = {
                "train_seconds": round(seconds / len(stack), 1),
                "stacked": len(stack),
                "threads": torch.get_num_threads(),
            }
            log.info(f"{len(stack)} models in {seconds:.0f} s, {seconds / len(stack):.1f} s each")
        for plan in stack:
            if questions and plan in unmeasured:
                weights, path = weights_path(args.result_dir, plan), measures_path(args, plan)
                finish(model, questions, plan, weights, path, measured[plan.name], cost)
