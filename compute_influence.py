"""Ranks the training images of each task's query: unlearns the query, scores every loss again, sorts by how much it rose.

    python compute_influence.py --task_json tasks/emoji_demo.json --dataroot data/emoji
    python compute_influence.py --task_json tasks/demo_task.json            # the AbC benchmark, in data/abc

Needs the losses that compute_training_loss.py caches. Writes RESULT_DIR/influence/<query>/: weight_change.safetensors, the
losses after unlearning, influence.{npz,csv,pkl} and visualization.jpg. Killed and run again, the same command goes on.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from unlearn import UserError, noise, results
from unlearn.artifacts import check_record, keep_complete, read_array, read_tensors, record_path, write_record, write_tensors
from unlearn.curvature import DiagonalFisher, check_fisher
from unlearn.hashes import hash_file
from unlearn.inputs import (add_flags, check_fisher_record, check_pictures, check_result_dir, check_training_files, encode_exemplars,
                            encode_query, find_fisher, prepare_training_set, print_plan, resolve)
from unlearn.losses import Sweep, adopt_losses, cache_losses, chunk_noise, loss_identity, noise_identity, score_rows
from unlearn.models import SELECTIONS, changed_weights, check_customization, check_tokens, customized, load_model, select_parameters
from unlearn.newton import CompatDraws, QueryDraws, check_change, relative_change, remove_checkpoints, unlearn
from unlearn.queries import read_stored
from unlearn.runtime import progress, run
from unlearn.tasks import group_by_model, load_tasks


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task_json", required=True, help="task file: which synthesized images, of which models")
    parser.add_argument("--result_dir", default="results", help="where losses are read and results are written (default results)")
    add_flags(parser, "sd_version", "dataroot", "laion_subset_size", "vae_batch_size", "noise_seed", "precision", "device", "compat",
              "overwrite", "dry_run")
    parser.add_argument("--fisher_path", help="diagonal Fisher (default sd_fisher.* of the data root)")
    parser.add_argument("--weight_selection", choices=SELECTIONS, default="cross-attn-kv", help="weights that are unlearned")
    parser.add_argument("--damping", type=float, help="added to the Fisher, as a multiple of each parameter's mean entry")
    parser.add_argument("--num_train", type=int, help="N of the Newton update: images the model was trained on")
    parser.add_argument("--unlearn_lr", type=float, help="alpha of the Newton update")
    parser.add_argument("--unlearn_steps", type=int, help="Newton steps")
    parser.add_argument("--unlearn_batch_size", type=int, help="noise draws in one pass of unlearning")
    parser.add_argument("--unlearn_grad_accum_steps", type=int, help="passes whose gradients make one step")
    parser.add_argument("--loss_batch_size", type=int, help="noisy samples in one forward pass of scoring; memory only")
    parser.add_argument("--loss_time_samples", type=int, help="timesteps of the loss's grid, as in compute_training_loss.py")
    parser.add_argument("--seed", type=int, default=0, help="seed of unlearning's noise and timesteps (default 0)")
    parser.add_argument("--top_k", type=int, help="images in the table and the picture (default 10)")
    args = parser.parse_args(argv)
    return args, resolve(args, {"loss_batch_size": "batch_size", "loss_time_samples": "time_samples"})


def loss_path(args, task, name):
    """Where compute_training_loss.py caches the losses (`exemplar` or `laion`) of a task's model."""
    return Path(args.result_dir) / "orig_loss" / task.model_name / f"{name}_loss.npy"


def find_cached_losses(args, groups):
    """Raises UserError, before a model is loaded, where the losses that this run compares with were never made."""
    for tasks in groups.values():
        for name in tasks[0].image_sets:
            path = loss_path(args, tasks[0], name)
            if not path.exists():
                raise results.missing_losses(path, args)


def check_leftovers(args, tasks):
    """Raises UserError, before hours of unlearning, where a query's folder holds losses that are not this program's."""
    for task in tasks:
        folder = Path(args.result_dir) / "influence" / task.result_name
        for path in (folder / f"{name}_loss.npy" for name in task.image_sets):
            if path.exists() and not (folder / "weight_change.safetensors").exists() and not args.overwrite:
                raise UserError(f"{path}: stands there without the weight_change.safetensors it was scored under; give --overwrite to "
                                "replace it, or another --result_dir")


def load_losses(custom, tasks, image_sets, grid, args):
    """Losses before unlearning of each of `image_sets`, checked against their records."""
    losses = {}
    for name, images in image_sets.items():
        path = loss_path(args, tasks[0], name)
        sweep = Sweep(images, grid, args.loss_batch_size, args.noise_seed, args.compat)
        identity = loss_identity(custom, images, grid, args.noise_seed, args.precision, args.compat, args.loss_batch_size)
        if args.compat and not record_path(path).exists():
            adopt_losses(sweep, custom, path, identity)
        check_record(path, identity, f"give the flags it was made with, or run: {results.loss_command(args)} --overwrite")
        losses[name] = read_array(path, "losses", mmap=False)
    return losses


def score_query(custom, task, image_sets, grid, change_path, folder, args):
    """Losses after unlearning of each of `image_sets`, under the weight change of `change_path`."""
    losses = {}
    with changed_weights(custom.denoiser, read_tensors(change_path)):
        for name, images in image_sets.items():
            sweep = Sweep(images, grid, args.loss_batch_size, args.noise_seed, args.compat)
            identity = loss_identity(custom, images, grid, args.noise_seed, args.precision, args.compat, args.loss_batch_size)
            identity["weight_change"] = hash_file(change_path)
            losses[name] = cache_losses(sweep, custom, folder / f"{name}_loss.npy", identity, args.overwrite)
    return losses


def unlearning_settings(args):
    """Identity of how a query is unlearned, the same for all queries that may be compared."""
    names = ("weight_selection", "damping", "num_train", "unlearn_lr", "unlearn_steps", "unlearn_batch_size",
             "unlearn_grad_accum_steps", "seed", "precision", "compat")
    return {name: getattr(args, name) for name in names}


def unlearn_query(custom, query, parameters, fisher, path, args):
    """Writes the weight change that unlearns a query to `path` (safetensors) and its record, or keeps what is there."""
    identity = {**custom.identity, "query": query.identity, "fisher": fisher.identity, **unlearning_settings(args),
                **noise_identity(args.compat, custom.device)}
    if keep_complete(path, identity, args.overwrite, "give --overwrite to replace it, or another --result_dir"):
        return remove_checkpoints(path)
    latent, embedding = (torch.from_numpy(array).to(custom.device) for array in (query.latents[0, 0], query.embeddings[0, 0]))
    if args.compat and args.unlearn_batch_size > len(custom.alpha_bars):
        raise UserError(f"--unlearn_batch_size {args.unlearn_batch_size}: --compat abu allows at most {len(custom.alpha_bars)}")
    if args.compat:
        draws = CompatDraws(args.seed, len(custom.alpha_bars), custom.device)
    else:
        draws = QueryDraws(args.seed, query.name, query.ids[0], len(custom.alpha_bars))
    with progress(args.unlearn_steps, f"unlearning {query.ids[0]}", "steps") as bar:
        change = unlearn(custom, parameters, latent, embedding, draws, fisher, rate=args.unlearn_lr / args.num_train,
                         steps=args.unlearn_steps, batch_size=args.unlearn_batch_size, accum_steps=args.unlearn_grad_accum_steps,
                         checkpoint_path=None if args.compat else path, identity=identity, progress=bar.update)
    check_change(query.ids[0], change)
    record_path(path).unlink(missing_ok=True)
    write_tensors(path, change)
    write_record(path, identity, custom.device)
    remove_checkpoints(path)


def own_losses(custom, query, change, grid, args):
    """The query's own loss before and after unlearning: how far it was unlearned."""
    rows, shown = np.arange(1), []
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        normals = chunk_noise(query, rows, grid, args.noise_seed, pool)
        for weights in {}, change:
            with changed_weights(custom.denoiser, weights):
                shown.append(float(score_rows(custom, query, rows, grid, normals, args.loss_batch_size)[0]))
    return shown


def attribute_query(custom, task, image_sets, before, fisher, grid, args, settings):
    """Unlearns, scores, ranks and saves one query."""
    folder = Path(args.result_dir) / "influence" / task.result_name
    query, change_path = encode_query(custom, task, args, settings), folder / "weight_change.safetensors"
    parameters = select_parameters(custom.denoiser, args.weight_selection)
    unlearn_query(custom, query, parameters, fisher, change_path, args)
    # Scoring only ever loads the change: a second process or a restart never scores under a slightly different one.
    change = read_tensors(change_path)
    after = score_query(custom, task, image_sets, grid, change_path, folder, args)
    query_losses = own_losses(custom, query, change, grid, args)
    results.save(folder, task, image_sets, before, after, args, {
        "query_loss_before": query_losses[0], "query_loss_after": query_losses[1],
        "relative_weight_change": relative_change(change, parameters)}, {
            "weight_change": hash_file(change_path), "settings": unlearning_settings(args),
            "losses_before": {name: hash_file(loss_path(args, task, name)) for name in image_sets}})


def main(argv=None):
    """Checks, loads, then unlearns, scores and saves query by query."""
    args, settings = parse_arguments(argv)
    tasks = load_tasks(args.task_json, args.dataroot)
    groups = group_by_model(tasks)
    check_result_dir(args.result_dir)
    check_training_files(args)
    fisher_path = args.fisher_path = find_fisher(args)
    if not args.dry_run:
        find_cached_losses(args, groups)
        check_leftovers(args, tasks)
    check_pictures(tasks, args.dataroot)
    for group in groups.values():
        check_tokens(group[0].model_dir(args.dataroot), group)
    model = load_model(args.sd_version, args.device, args.unet)
    grid = noise.timestep_grid(args.loss_time_samples, len(model.alpha_bars), "--loss_time_samples")
    for group in groups.values():
        check_customization(model, group[0].model_dir(args.dataroot))
    for task in tasks:
        read_stored(task, args.dataroot, model.latent_shape(settings["resolution"]), model.embedding_shape)
    parameters = select_parameters(model.denoiser, args.weight_selection)
    check_fisher_record(fisher_path, model)
    diagonal = read_tensors(fisher_path, "--fisher_path", set(parameters))
    check_fisher(fisher_path, diagonal, parameters, args.damping)
    fisher = DiagonalFisher(diagonal, args.damping)
    training_set = prepare_training_set(model, args, settings)
    if args.dry_run:
        draws = args.unlearn_steps * args.unlearn_batch_size * args.unlearn_grad_accum_steps
        return print_plan(args, groups, training_set, grid, len(tasks), args.loss_batch_size, draws * len(tasks),
                          4 * sum(value.numel() for value in parameters.values()))
    before = {}
    for model_path, group in groups.items():  # every model's losses are checked before the first query, which takes hours
        with customized(model, group[0].model_dir(args.dataroot)) as custom:
            image_sets = {name: training_set if name == "laion" else encode_exemplars(custom, group[0], args, settings)
                          for name in group[0].image_sets}
            before[model_path] = image_sets, load_losses(custom, group, image_sets, grid, args)
    for model_path, group in groups.items():
        with customized(model, group[0].model_dir(args.dataroot)) as custom:
            for task in group:
                attribute_query(custom, task, *before[model_path], fisher, grid, args, settings)


if __name__ == "__main__":
    run(main)
