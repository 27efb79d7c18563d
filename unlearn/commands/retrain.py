"""Trains models from scratch and measures queries under them: in full, without images, on random
subsets.

    python -m unlearn retrain full --dataroot data/emoji_small --seeds 0 1 2
    python -m unlearn retrain subsets --count 64 --dataroot data/emoji_small --task_json tasks/emoji_small.json
    python -m unlearn retrain without --top_k 6 12 --influence results/influence --num_queries 5 --task_json ... --dataroot ...
    python -m unlearn retrain without --top_k 3 --scores results/evidence/emoji_shared/scores --methods removal --task_json ...
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
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from .. import noise
from ..attribution.names import NAMED
from ..baselines.similarity import Encode, feature_encoder
from ..datasets.queries import encode_query
from ..datasets.repeats import read_repeats
from ..datasets.tasks import Task, load_tasks
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..evaluation.retrained import query_digests
from ..evaluation.scores import OURS
from ..models.customization import check_customization, check_tokens
from ..models.generation import check_steps
from ..models.pipelines import Model, load_model
from ..retraining.lora import with_fresh_lora
from ..retraining.measures import (
    MeasureSettings,
    Questions,
    join_sets,
    load_pictures,
    sampling_of,
)
from ..retraining.models import (
    REMEDY,
    finish,
    is_measured,
    measure_identity,
    model_identity,
    train_stack,
    weights_path,
)
from ..retraining.plans import (
    PLANS,
    Plan,
    PlanSettings,
    make_plans,
    make_stacks,
    read_rankings,
    read_scored,
)
from ..retraining.recipes import Recipe
from ..retraining.sets import read_sets
from ..runtime.programs import log, process_share
from ..storage.records import keep_complete
from .advice import influence_command, write_command
from .flags import add_flags, make_parser, resolve
from .inputs import check_pictures, check_result_dir, check_training_files, prepare_training_set
from .retrain_flags import add_measure_flags, add_plan_flags, add_recipe_flags


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
    model = load_model(args.sd_version, args.device, args.unet, trained=bool(rank))
    if not rank:
        return model
    alpha = float(args.train_lora_alpha or rank)
    return with_fresh_lora(model, rank, alpha, args.train_lora_targets)


def plan_settings(args: Namespace) -> PlanSettings:
    """Which models are trained, by the flags."""
    return PlanSettings(
        args.kind,
        tuple(args.seeds),
        args.first,
        args.count,
        args.fraction,
        tuple(args.top_k),
        read_sets(args.sets_json) if args.kind == "sets" else (),
    )


def measure_settings(args: Namespace, tasks: Sequence[Task]) -> MeasureSettings:
    """How models are measured, by flags and task files. Raises UserError where these differ in how
    pictures are made."""
    return MeasureSettings(
        args.loss_time_samples, args.noise_seed, *sampling_of(tasks), args.features
    )


def ranking_command(args: Namespace, folder: Path, method: str) -> str:
    """What ranks the queries of `retrain`'s task files into `folder`."""
    if method == OURS or method in NAMED:
        scoring = {} if method == OURS else {"scoring": method}
        return influence_command(
            args, task_json=args.task_json[0], result_dir=folder.parent, top_k=None, **scoring
        )  # retrain's top_k is another
    return write_command(
        "baselines",
        args,
        task_json=args.task_json[0],
        result_dir=folder.parent.parent,
        methods=[method],
    )


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


def check_flags(args: Namespace, tasks: Sequence[Task]) -> None:
    """Raises UserError where flags that the kind needs are missing, or tasks cannot be measured."""
    needed = {
        "random": ["top_k"],
        "sets": ["sets_json"],
        "without": ["top_k", "task_json"],
    }.get(args.kind, [])
    for flag in needed:
        if not getattr(args, flag):
            raise UserError(f"retrain {args.kind}: needs --{flag}")
    if args.kind == "sets":
        read_sets(args.sets_json)  # here: before anything is loaded
    if args.kind == "without" and not (args.influence or args.scores):
        raise UserError("retrain without: needs --influence, folders of results, or --scores")
    if args.methods and not args.scores:
        raise UserError("--methods: means nothing without --scores")
    if args.kind != "full" and len(args.seeds) > 1:
        raise UserError(
            f"--seeds {' '.join(map(str, args.seeds))}: only full models are trained with "
            f"several; start it once a seed"
        )
    for flag in ("count", "stack", "num_queries"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    for folder in args.influence:
        if not Path(folder).is_dir():
            raise UserError(
                f"--influence {folder}: no such folder; make it: "
                f"{ranking_command(args, Path(folder), OURS)}"
            )
    for task in tasks:
        if task.model_path is not None:
            raise UserError(
                f"{task.synth_image_path}: was made by a customized model; only queries of the "
                f"base model are measured by retraining"
            )
        if task.seed is None and not args.no_pictures:
            raise UserError(
                f"{task.synth_image_path}: has no seed in its task file, so that it cannot be "
                f"made again; give --no_pictures"
            )


def check_full_model(plans: Sequence[Plan], args: Namespace) -> None:
    """Raises UserError where models without some images would be trained that no full model of
    their seed is there to compare with."""
    seeds = {plan.seed for plan in plans if plan.kind == "without"}
    for seed in sorted(seeds):
        if args.task_json and not any(
            path.exists()
            for path in (
                args.output / f"full-seed{seed}.json",
                Path(args.result_dir) / f"retrain/full-seed{seed}/model.safetensors",
            )
        ):
            command = write_command(
                "retrain", args, "full", "--seeds", str(seed), output=args.output
            )
            raise UserError(
                f"retrain {args.kind}: {args.output} has no full model of seed {seed} to compare "
                f"models of that seed with; train it "
                f"first: {command}"
            )


def check_inputs(args: Namespace, tasks: list[Task]) -> None:
    """Raises UserError where flags, folders, pictures or prompts are not as they must be. Cheap."""
    check_flags(args, tasks)
    for folder in args.result_dir, args.output:
        check_result_dir(folder)
    check_training_files(args)
    check_pictures(tasks, args.dataroot)
    check_tokens(None, tasks, args.sd_version)


def check_measures(model: Model, args: Namespace, tasks: list[Task]) -> MeasureSettings:
    """How models are measured. Raises UserError where this model cannot be measured so."""
    check_customization(model, None, tasks)
    noise.timestep_grid(args.loss_time_samples, model.num_train_timesteps, "--loss_time_samples")
    measuring = measure_settings(args, tasks)
    if tasks and not args.no_pictures:
        check_steps(model, measuring.num_inference_steps)
    return measuring


def plan_models(args: Namespace, training_set: TrainingSet, tasks: list[Task]) -> list[Plan]:
    """The models of the kind that is asked for."""
    settings = plan_settings(args)
    asked = tasks[: args.num_queries]
    rankings = read_rankings(
        [Path(folder) for folder in args.influence],
        asked,
        training_set,
        args.dataroot,
        partial(ranking_command, args),
    )
    if args.scores:
        scored = read_scored(args.scores, args.methods, asked, training_set, args.dataroot)
        rankings = chain(rankings, scored)
    plans = make_plans(settings, training_set, rankings)
    check_full_model(plans, args)
    return plans


def find_unfinished(
    plans: Sequence[Plan],
    trained: dict[str, dict],
    measured: dict[str, dict],
    tasks: Sequence[Task],
    args: Namespace,
) -> tuple[list[Plan], list[Plan]]:
    """Those of the plans whose models are to be trained, and to be measured. trained, measured: the
    identities by name. Raises UserError where files of other models are in the way."""
    unmeasured = [
        plan
        for plan in plans
        if not tasks
        or not is_measured(
            measures_path(args, plan), measured[plan.name], not args.no_pictures, args.overwrite
        )
    ]
    untrained = [
        plan
        for plan in unmeasured
        if not keep_complete(
            weights_path(args.result_dir, plan), trained[plan.name], args.overwrite, REMEDY
        )
    ]
    return untrained, unmeasured


def measures_path(args: Namespace, plan: Plan) -> Path:
    """Where the measures of a model are written."""
    return args.output / f"{plan.name}.json"


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
