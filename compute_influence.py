"""Ranks the training images of each task's query: unlearns the query, scores every loss again,
sorts by how much it rose.

    python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji
    python compute_influence.py --task_json tasks/demo_task.json            # the AbC benchmark, in data/abc
    python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji --scoring gradient

Exact scoring needs the losses that compute_training_loss.py caches, --index what `python -m unlearn
index` built. Writes RESULT_DIR/influence/<query>/: weight_change.safetensors, losses after
unlearning or their changes, influence.{npz,csv,pkl} and visualization.jpg. Killed and run again,
the same command goes on; several processes of it, by `accelerate launch` or on several machines,
share the work. --shard I/N takes the I-th of N parts of the queries.
"""

import argparse
from pathlib import Path

from unlearn import UserError, noise
from unlearn.advice import index_command
from unlearn.attribution.index import Index
from unlearn.attribution.newton import relative_change
from unlearn.attribution.scoring import (
    AUDIT,
    AUTOCAST,
    MANY,
    SCORINGS,
    SHORTLIST,
    TOGETHER,
    check_scoring,
    load_losses,
    make_sweep,
    own_losses,
    score_queries,
    score_shortlists,
    scoring_settings,
)
from unlearn.attribution.unlearning import (
    check_step,
    read_step,
    unlearn_queries,
    unlearning_settings,
)
from unlearn.commands.inputs import (
    add_flags,
    check_pictures,
    check_result_dir,
    check_training_files,
    compare_images,
    encode_exemplars,
    encode_query,
    find_fisher,
    load_fisher,
    prepare_training_set,
    print_plan,
    resolve,
    step_size,
)
from unlearn.datasets.queries import read_stored
from unlearn.datasets.settings import AUTO_CHANGE
from unlearn.datasets.tasks import group_by_model, load_tasks
from unlearn.models.customization import check_customization, check_tokens, customized
from unlearn.models.pipelines import SELECTIONS, load_model, select_parameters
from unlearn.report import results
from unlearn.runtime.programs import part_of, process_share, run
from unlearn.storage.hashes import hash_file
from unlearn.storage.reading import read_tensors
from unlearn.storage.records import keep_complete
from unlearn.storage.sharing import do_once, forget_claim


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task_json", required=True, help="task file: which synthesized images, of which models"
    )
    parser.add_argument(
        "--result_dir",
        default="results",
        help="where losses are read and results are written (default results)",
    )
    add_flags(
        parser,
        "sd_version",
        "dataroot",
        "laion_subset_size",
        "vae_batch_size",
        "noise_seed",
        "device",
        "compat",
        "overwrite",
        "dry_run",
        "shard",
    )
    parser.add_argument(
        "--precision",
        choices=AUTOCAST,
        help="fp32 (default), tf32, or bf16, which exact scoring does not survive",
    )
    parser.add_argument(
        "--scoring",
        choices=SCORINGS,
        default="exact",
        help="exact: difference of two losses (default); midpoint: "
        "derivative half way along the weight change; gradient: first and second order, all "
        "queries of a model at once",
    )
    parser.add_argument(
        "--index",
        help="folder of indices: rank all images from the model's, score only the best of them",
    )
    parser.add_argument(
        "--shortlist", type=int, help=f"with --index: how many of the best (default {SHORTLIST})"
    )
    parser.add_argument(
        "--audit",
        type=int,
        help=f"with --index: how many others, at random, to tell what it misses (default {AUDIT})",
    )
    parser.add_argument(
        "--fisher_path", help="diagonal Fisher (default sd_fisher.* of the data root)"
    )
    parser.add_argument(
        "--weight_selection",
        choices=SELECTIONS,
        default="cross-attn-kv",
        help="weights that are unlearned",
    )
    parser.add_argument(
        "--damping",
        type=float,
        help="added to the Fisher, as a multiple of each parameter's mean entry (default "
        "dataset.json's, of AbC 0, else 0.1)",
    )
    parser.add_argument(
        "--num_train",
        type=int,
        help="N of the Newton update: images the model was trained on (default dataset.json's, "
        "of AbC 400,000,000, else all training images of the data root)",
    )
    parser.add_argument(
        "--unlearn_lr",
        type=step_size,
        help="alpha of the Newton update, or auto: one step, scaled so that the selected "
        f"weights move by {100 * AUTO_CHANGE:g} %%, in relative norm (default dataset.json's, of "
        f"AbC 0.1, else auto)",
    )
    parser.add_argument(
        "--unlearn_steps",
        type=int,
        help="Newton steps (default dataset.json's, of AbC 100, else 1)",
    )
    parser.add_argument(
        "--unlearn_batch_size",
        type=int,
        help="noise draws of a Newton step: this number times the next",
    )
    parser.add_argument(
        "--unlearn_grad_accum_steps",
        type=int,
        help="... times this one; only --compat abu tells the two apart",
    )
    parser.add_argument(
        "--loss_batch_size",
        type=int,
        help="noisy samples in one pass of scoring or unlearning; memory only",
    )
    parser.add_argument(
        "--loss_time_samples",
        type=int,
        help="timesteps of the loss's grid, as in compute_training_loss.py",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of unlearning's noise and timesteps (default 0)"
    )
    parser.add_argument(
        "--top_k", type=int, help="images in the table and the picture (default 10)"
    )
    args = parser.parse_args(argv)
    settings = resolve(args, {"loss_batch_size": "batch_size", "loss_time_samples": "time_samples"})
    check_scoring(args)
    check_step(args)
    return args, settings


def loss_path(args, task, name):
    """Where compute_training_loss.py caches the losses (`exemplar` or `laion`) of a task's
    model."""
    return Path(args.result_dir) / "orig_loss" / task.model_name / f"{name}_loss.npy"


def index_folder(args, task):
    """Where `python -m unlearn index` builds the index of a task's model."""
    return Path(args.index) / task.model_name


def find_inputs(args, groups):
    """Raises UserError, before a model is loaded, where the losses that this run compares with were
    never made, or an index."""
    for tasks in groups.values():
        if args.index and not index_folder(args, tasks[0]).is_dir():
            raise UserError(
                f"--index {args.index}: has no index of {tasks[0].model_name}; build it: "
                f"{index_command(args)}"
            )
        for name in tasks[0].image_sets if args.scoring == "exact" else ():
            path = loss_path(args, tasks[0], name)
            if not path.exists():
                raise results.missing_losses(path, args)


def check_leftovers(args, tasks):
    """Raises UserError, before hours of unlearning, where a query's folder holds losses that are
    not this program's."""
    for task in tasks:
        folder = Path(args.result_dir) / "influence" / task.result_name
        for path in (folder / f"{name}_loss.npy" for name in task.image_sets):
            if (
                path.exists()
                and not (folder / "weight_change.safetensors").exists()
                and not args.overwrite
            ):
                raise UserError(
                    f"{path}: stands there without the weight_change.safetensors it was scored "
                    f"under; give --overwrite to "
                    "replace it, or another --result_dir"
                )


def load_model_inputs(custom, tasks, training_set, fisher, grid, args, settings):
    """What is ranked under one model, and what it is compared with: (image sets, losses before
    unlearning of exact scoring, index or None), all checked."""
    image_sets = {
        name: training_set
        if name == "laion"
        else encode_exemplars(custom, tasks[0], args, settings)
        for name in tasks[0].image_sets
    }
    losses = {
        name: load_losses(custom, loss_path(args, tasks[0], name), images, grid, args)
        for name, images in image_sets.items()
        if args.scoring == "exact"
    }
    sweep = make_sweep(custom, training_set, grid, args)[0]
    return (
        image_sets,
        losses,
        Index(index_folder(args, tasks[0]), custom, sweep, fisher, index_command(args))
        if args.index
        else None,
    )


def save_result(
    custom, task, query, image_sets, changes, before, grid, path, found, parameters, fisher, args
):
    """Writes one query's ranking; of several processes that a launcher started, one does."""
    change = read_tensors(path)
    identity = {
        "weight_change": hash_file(path),
        "settings": {**unlearning_settings(args), **scoring_settings(args)},
        "losses_before": {name: hash_file(loss_path(args, task, name)) for name in before},
        "candidates": [images.identity for images in image_sets.values()],
    }

    def save():
        query_losses = own_losses(custom, query, change, grid, args)
        (alpha, rate) = read_step(path, args)
        results.save(
            path.parent,
            task,
            image_sets,
            changes,
            args,
            {
                "query_loss_before": query_losses[0],
                "query_loss_after": query_losses[1],
                "relative_weight_change": relative_change(change, parameters),
                "alpha": alpha,
                "alpha_over_N": rate,
                **found,
            },
            identity,
            fisher.warnings,
        )

    # One process alone writes it anew, and prints it: with another --top_k there is another table.
    if process_share()[1] == 1:
        forget_claim(path.parent, "influence")  # of several processes, one of which was killed
        return save()
    do_once(
        path.parent,
        "influence",
        lambda: keep_complete(path.parent / "influence.npz", identity, True, ""),
        save,
    )


def attribute_queries(custom, tasks, image_sets, before, index, fisher, grid, args, settings):
    """Unlearns, scores, ranks and saves some queries of one model."""
    parameters = select_parameters(custom.denoiser, args.weight_selection)
    paths = [
        Path(args.result_dir) / "influence" / task.result_name / "weight_change.safetensors"
        for task in tasks
    ]
    queries = [encode_query(custom, task, args, settings) for task in tasks]
    unlearn_queries(custom, tasks, queries, parameters, fisher, paths, args)
    # Scoring only ever loads the changes: a second process or a restart never scores under slightly
    # different ones.
    size = len(tasks) if index or args.scoring == "gradient" else 1
    for start in range(0, len(tasks), size):
        some, later = slice(start, start + size), paths[start + size : start + TOGETHER]
        if index:
            scored = score_shortlists(
                custom,
                [task.result_name for task in tasks[some]],
                paths[some],
                image_sets,
                before,
                index,
                grid,
                args,
            )
        else:
            scored = [
                (changes, {})
                for changes in score_queries(
                    custom, paths[some], image_sets, before, grid, args, later
                )
            ]
        for task, query, path, (changes, found) in zip(
            tasks[some], queries[some], paths[some], scored
        ):
            save_result(
                custom,
                task,
                query,
                image_sets,
                changes,
                before,
                grid,
                path,
                found,
                parameters,
                fisher,
                args,
            )


def main(argv=None):
    """Checks, loads, then unlearns, scores and saves, a few queries at a time."""
    args, settings = parse_arguments(argv)
    groups = group_by_model(load_tasks(args.task_json, args.dataroot))
    tasks = part_of([task for group in groups.values() for task in group], args.shard)
    groups = group_by_model(tasks)
    check_result_dir(args.result_dir)
    check_training_files(args)
    fisher_path = args.fisher_path = find_fisher(args)
    if not args.dry_run:
        find_inputs(args, groups)
        check_leftovers(args, tasks)
    check_pictures(tasks, args.dataroot)
    for group in groups.values():
        check_tokens(group[0].model_dir(args.dataroot), group, args.sd_version)
    model = load_model(args.sd_version, args.device, args.unet)
    grid = noise.timestep_grid(args.loss_time_samples, len(model.alpha_bars), "--loss_time_samples")
    for group in groups.values():
        check_customization(model, group[0].model_dir(args.dataroot), group)
    for task in tasks:
        read_stored(
            task,
            args.dataroot,
            model.latent_shape(model.resolution(settings)),
            model.embedding_shape,
        )
    parameters = select_parameters(model.denoiser, args.weight_selection)
    fisher = load_fisher(fisher_path, model, parameters, args.damping, args)
    training_set = prepare_training_set(model, args, settings)
    fisher.warnings = compare_images(fisher_path, training_set, args)
    if args.dry_run:
        draws = args.unlearn_steps * args.unlearn_batch_size * args.unlearn_grad_accum_steps
        return print_plan(
            args,
            groups,
            training_set,
            grid,
            len(tasks),
            args.loss_batch_size,
            draws * len(tasks),
            4 * sum(value.numel() for value in parameters.values()),
        )
    inputs = {}
    for (
        model_path,
        group,
    ) in (
        groups.items()
    ):  # every model's inputs are checked before the first query, which takes hours
        with customized(model, group[0].model_dir(args.dataroot)) as custom:
            inputs[model_path] = load_model_inputs(
                custom, group, training_set, fisher, grid, args, settings
            )
    # Each process unlearns some, all score each.
    size = (
        MANY
        if args.index or args.scoring == "gradient"
        else max(process_share()[1], TOGETHER if args.scoring == "exact" else 1)
    )
    for model_path, group in groups.items():
        with customized(model, group[0].model_dir(args.dataroot)) as custom:
            for start in range(0, len(group), size):
                attribute_queries(
                    custom,
                    group[start : start + size],
                    *inputs[model_path],
                    fisher,
                    grid,
                    args,
                    settings,
                )


if __name__ == "__main__":
    run(main)
