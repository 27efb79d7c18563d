"""What `retrain` is given, checked before anything is trained."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from .. import noise
from ..datasets.tasks import Task
from ..errors import UserError
from ..evaluation.scores import OURS
from ..models.customization import check_customization, check_tokens
from ..models.generation import check_steps
from ..models.pipelines import Model
from ..retraining.measures import MeasureSettings, sampling_of
from ..retraining.sets import read_sets
from .inputs import check_pictures, check_result_dir, check_training_files
from .retrain_plans import ranking_command


def measure_settings(args: Namespace, tasks: Sequence[Task]) -> MeasureSettings:
    """How models are measured, by flags and task files. Raises UserError where these differ in how
    pictures are made."""
    return MeasureSettings(
        args.loss_time_samples, args.noise_seed, *sampling_of(tasks), args.features
    )


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
    if args.chosen_sets and (args.scores or not args.influence):
        raise UserError(
            "--chosen_sets: needs --influence, the results of removal, whose files hold the sets, and "
            "no --scores"
        )
    if args.methods and not args.scores:
        raise UserError("--methods: means nothing without --scores")
    if args.kind != "full" and len(args.seeds) > 1:
        raise UserError(
            f"--seeds {' '.join(map(str, args.seeds))}: only full models are trained with "
            f"several; start it once a seed"
        )
    if args.together > 1 and args.kind != "without":
        raise UserError(f"--together {args.together}: only of retrain without")
    if args.weights != "fp32" and not args.train_lora_rank:
        raise UserError(
            f"--weights {args.weights}, or dataset.json's: without --train_lora_rank all weights are "
            f"trained, and what is trained is float32; give --weights fp32 (and --mixed_precision "
            f"bf16 for passes in bfloat16)"
        )
    for flag in ("count", "stack", "num_queries", "together"):
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
