"""Ranks the training images of each task's query: unlearns the query, scores every loss again, sorts
by how much it rose.

    python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji
    python compute_influence.py --task_json tasks/demo_task.json    # AbC, in data/abc
    python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji \\
        --scoring gradient
    python compute_influence.py --task_json tasks/emoji_shared.json --dataroot data/emoji_shared \\
        --scoring removal

Exact scoring needs the losses that compute_training_loss.py caches, --index what `python -m unlearn
index` built; removal unlearns nothing and needs neither Fisher nor losses, but features of every
image, which it keeps in RESULT_DIR/removal. Writes RESULT_DIR/influence/<query>/: weight_change.safetensors, losses after
unlearning or their changes (none of the two by removal), influence.{npz,csv,pkl} and visualization.jpg. Killed and run again,
the same command goes on; several processes of it, by `accelerate launch` or on several machines,
share the work. --shard I/N takes the I-th of N parts of the queries.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unlearn import UserError
from unlearn.attribution.caches import load_losses
from unlearn.attribution.fishers import KV
from unlearn.attribution.index import Index
from unlearn.attribution.names import REMOVAL
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.attribution.settings import (
    LossSettings,
    ScoreSettings,
)
from unlearn.attribution.studies import Study
from unlearn.commands.advice import index_command, influence_command, loss_command
from unlearn.commands.flags import add_flags, make_parser, print_plan, resolve
from unlearn.commands.inputs import (
    check_boxes,
    check_result_dir,
    check_training_files,
    find_fisher,
    loss_noise,
    loss_path,
)
from unlearn.commands.preparation import Prepared, prepare
from unlearn.commands.removal_flags import (
    add_removal_flags,
    check_kept_results,
    check_removal_flags,
    open_removal,
    print_removal_plan,
)
from unlearn.commands.unlearning_flags import (
    add_scoring_flags,
    add_unlearning_flags,
    check_scoring,
    unlearn_settings,
)
from unlearn.datasets.boxes import check_box
from unlearn.datasets.queries import encode_exemplars
from unlearn.datasets.settings import AUTO
from unlearn.datasets.tasks import (
    Task,
    find_result,
    group_by_model,
    load_tasks,
    tell_older_results,
)
from unlearn.datasets.training_sets import TrainingSet
from unlearn.models.customization import customized
from unlearn.models.lora import choose_selection
from unlearn.models.pipelines import Model, select_parameters
from unlearn.running import Output, attribute_by_removal, attribute_queries, group_size
from unlearn.runtime.programs import part_of, run
from unlearn.storage.hashes import hash_file


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line, resolved against the data root's defaults."""
    parser = make_parser(__doc__)
    add_flags(
        parser,
        "sd_version",
        "lora",
        "weights",
        "task_json",
        "dataroot",
        "laion_subset_size",
        "noise_seed",
        "result_dir",
        "overwrite",
        "compat",
        "device",
        "vae_batch_size",
        "shard",
        "dry_run",
    )
    add_unlearning_flags(parser)
    add_scoring_flags(parser)
    add_removal_flags(parser)
    args = parser.parse_args(argv)
    check_removal_flags(args)
    args.box = check_box(args.box) if args.box else None
    resolve(args, {"loss_batch_size": "batch_size", "loss_time_samples": "time_samples"})
    args.weight_selection = choose_selection(
        args.weight_selection, args.lora, "all" if args.scoring == REMOVAL else KV
    )
    unlearn_settings(args)  # raises where they do not go together
    check_scoring(args)
    return args


def check_outputs(args: Namespace, groups: dict[str | None, list[Task]]) -> None:
    """Raises UserError, before a model is loaded, where the losses that this run compares with were
    never made, or an index; or where a query's folder holds losses that are not this program's, or
    the result of another way of scoring."""
    check_kept_results(args, Path(args.result_dir) / "influence", groups)
    if args.scoring == REMOVAL:
        return
    for tasks in groups.values():
        if args.index and not (Path(args.index) / tasks[0].model_name).is_dir():
            raise UserError(
                f"--index {args.index}: has no index of {tasks[0].model_name}; build it: "
                f"{index_command(args)}"
            )
        for name in tasks[0].image_sets if args.scoring == "exact" else ():
            path = loss_path(args, tasks[0], name)
            if not path.exists():
                raise UserError(f"{path}: no cached losses yet; make them: {loss_command(args)}")
        for task in tasks:
            folder = find_result(Path(args.result_dir) / "influence", task)
            for path in (folder / f"{name}_loss.npy" for name in task.image_sets):
                is_strange = path.exists() and not (folder / "weight_change.safetensors").exists()
                if is_strange and not args.overwrite:
                    raise UserError(
                        f"{path}: stands there without the weight_change.safetensors it was scored "
                        f"under; give --overwrite to replace it, or another --result_dir"
                    )


def open_images(
    args: Namespace, prepared: Prepared, model: Model, tasks: list[Task]
) -> dict[str, TrainingSet]:
    """The candidates of some tasks of one model, exemplars first."""
    if "exemplar" not in tasks[0].image_sets:
        return {"laion": prepared.training_set}
    exemplars = encode_exemplars(model, tasks[0], args.dataroot, args.vae_batch_size)
    return {"exemplar": exemplars, "laion": prepared.training_set}


def open_study(
    args: Namespace, prepared: Prepared, model: Model, tasks: list[Task]
) -> Study | RemovalStudy:
    """What ranks the candidates of some tasks under their model, all checked: losses before
    unlearning of exact scoring, and the index, where one is used."""
    image_sets = open_images(args, prepared, model, tasks)
    if args.scoring == REMOVAL:
        return open_removal(args, model, image_sets, tasks[0].model_name)
    if (fisher := prepared.fisher) is None:
        raise ValueError("unlearning needs a Fisher")
    study = Study(
        model,
        image_sets,
        fisher,
        unlearn_settings(args),
        LossSettings(prepared.grid, loss_noise(args, "loss_batch_size"), args.precision),
        ScoreSettings.of_index(args.scoring, args.shortlist, args.audit)
        if args.index
        else ScoreSettings(args.scoring),
        batch_size=args.loss_batch_size,
        overwrite=args.overwrite,
    )
    for name, images in image_sets.items() if args.scoring == "exact" else ():
        path, identity = loss_path(args, tasks[0], name), study.losses.identity(model, images)
        commands = loss_command(args), loss_command(args, overwrite=True)
        study.before[name] = load_losses(study.sweep(images), model, path, identity, *commands)
        study.before_hashes[name] = hash_file(path)
    if args.index:
        folder, sweep = Path(args.index) / tasks[0].model_name, study.sweep(prepared.training_set)
        study.index = Index(folder, model, sweep, fisher, index_command(args))
    return study


def describe_cost(
    args: Namespace, prepared: Prepared, groups: dict[str | None, list[Task]]
) -> None:
    """Prints the plan of a run: --dry_run."""
    if args.scoring == REMOVAL:
        return print_removal_plan(args, groups, prepared.training_set)
    num_queries = sum(map(len, groups.values()))
    draws = args.unlearn_steps * args.unlearn_batch_size * args.unlearn_grad_accum_steps
    weights = select_parameters(prepared.model.denoiser, args.weight_selection).values()
    print_plan(
        args,
        groups,
        prepared.training_set,
        prepared.grid,
        num_queries,
        args.loss_batch_size,
        draws * num_queries,
        4 * sum(value.numel() for value in weights),
    )


def describe_output(args: Namespace) -> Output:
    """Where results go, and what they say of themselves."""
    return Output(
        Path(args.result_dir) / "influence",
        str(args.dataroot),
        args.top_k,
        influence_command(args),
        influence_command(args, unlearn_lr=AUTO, unlearn_steps=1, overwrite=True),
        unscaled=bool(args.compat),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, loads, then unlearns, scores and saves, a few queries at a time."""
    args = parse_arguments(argv)
    groups = group_by_model(load_tasks(args.task_json, args.dataroot))
    groups = group_by_model(part_of([t for group in groups.values() for t in group], args.shard))
    check_result_dir(args.result_dir)
    check_training_files(args)
    check_boxes(args.box, [task for tasks in groups.values() for task in tasks], args.dataroot)
    args.fisher_path = None if args.scoring == REMOVAL else find_fisher(args)
    if not args.dry_run:
        check_outputs(args, groups)
    tell_older_results(
        Path(args.result_dir) / "influence", [task for tasks in groups.values() for task in tasks]
    )
    prepared = prepare(args, groups, "--loss_time_samples")
    if args.dry_run:
        return describe_cost(args, prepared, groups)
    studies, output = {}, describe_output(args)
    for path, tasks in groups.items():  # all inputs are checked before the first query: hours
        with customized(prepared.model, tasks[0].model_dir(args.dataroot)) as model:
            studies[path] = open_study(args, prepared, model, tasks)
    for path, tasks in groups.items():
        with customized(prepared.model, tasks[0].model_dir(args.dataroot)) as model:
            study = replace(studies[path], model=model)
            if isinstance(study, RemovalStudy):
                attribute_by_removal(study, tasks, output)
                continue
            size = group_size(study)
            for start in range(0, len(tasks), size):
                attribute_queries(study, tasks[start : start + size], output)


if __name__ == "__main__":
    run(main)
