"""Trains models from scratch and measures queries under them: in full, without images, on random subsets.

    python -m unlearn retrain full --dataroot data/emoji_small --seeds 0 1 2
    python -m unlearn retrain subsets --count 64 --dataroot data/emoji_small --task_json tasks/emoji_small.json
    python -m unlearn retrain without --top_k 6 12 --influence results/influence --num_queries 5 --task_json ... --dataroot ...
    python -m unlearn retrain random --top_k 6 12 --count 2 --dataroot ... --task_json ...

Writes RESULT_DIR/retrain/<model>/model.safetensors and, where task files are given, one small file of measures a model to
--output: each query's loss under it and how far the picture that it makes from the query's prompt and seed has moved. The
data root says which UNet and which recipe. Killed and run again, the same command goes on where it was; under `accelerate
launch` every process trains its share of the models.
"""

import argparse
import base64
import time
from pathlib import Path

import numpy as np
import torch

from .. import UserError, noise
from ..artifacts import write_json, write_tensors
from ..baselines import feature_encoder
from ..generation import check_steps, make_pictures
from ..hashes import digest
from ..inputs import add_flags, check_pictures, check_result_dir, check_training_files, encode_query, prepare_training_set, resolve
from ..measures import compare_pictures, join_sets, load_pictures, query_losses, sampling_of, write_pictures
from ..models import load_model, replaced_weights
from ..plans import PLANS, make_plans, make_stacks
from ..reading import read_json, read_tensors
from ..records import FORMAT_VERSION, circumstances, compare_identity, keep_complete, record_path, write_record
from ..retrained import query_digests
from ..runtime import log, process_share, progress
from ..tasks import load_tasks
from ..training import SCHEDULES, Recipe, train

REMEDY = "give --overwrite to replace it, or another --output and --result_dir"


def recipe_of(args, seed):
    """The recipe by the flags, which the data root's settings have filled."""
    return Recipe(args.train_epochs, args.train_lr, args.train_batch_size, args.train_schedule, seed, args.mixed_precision)


def model_identity(model, training_set, plan, args):
    """Identity of one trained model."""
    return {**recipe_of(args, plan.seed).identity(model, training_set), "precision": args.precision,
            "members": digest(np.packbits(plan.members).tobytes().hex())}


def weights_path(args, plan):
    """Where a trained model's weights are written."""
    return Path(args.result_dir) / "retrain" / plan.name / "model.safetensors"


def train_stack(model, training_set, plans, args):
    """Trains the models of a stack together and writes their weights and records. Returns the seconds it took."""
    identities = [model_identity(model, training_set, plan, args) for plan in plans]
    paths = [weights_path(args, plan) for plan in plans]
    checkpoint = paths[0].parent.parent / f".{plans[0].name}-{digest(identities)[:16]}.checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    recipe, start = recipe_of(args, plans[0].seed), time.monotonic()
    with progress(recipe.num_steps(len(training_set)), f"training {plans[0].name}" + (f" and {len(plans) - 1} more" if plans[1:] else ""), "steps") as bar:
        weights = train(model, training_set, np.stack([plan.members for plan in plans]), recipe, checkpoint, bar.update)
    for path, identity, tensors in zip(paths, identities, weights):
        record_path(path).unlink(missing_ok=True)
        write_record(path, identity, model.device, write_tensors(path, tensors))
    for plan in plans:
        for leftover in checkpoint.parent.glob(f".{plan.name}-*.checkpoint"):
            leftover.unlink()
    return time.monotonic() - start


def measure_identity(model, training_set, plan, tasks, args):
    """What must be the same for the measures of two models to be compared, and which images this one has seen."""
    recipe = model_identity(model, training_set, plan, args)
    recipe = digest({name: value for name, value in recipe.items() if name not in ("seed", "initial_weights", "members")})
    num_inference_steps, guidance_scale = sampling_of(tasks)
    return {"format_version": FORMAT_VERSION, "recipe": recipe, "training_set": training_set.identity, "num_images": len(training_set),
            "seed": plan.seed, "members": base64.b64encode(np.packbits(plan.members)).decode(),
            "queries": query_digests(tasks, args.dataroot), "timesteps": args.loss_time_samples, "noise_seed": args.noise_seed,
            "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "features": args.features}


def measure(model, weights, queries, pictures, tasks, plan, encode, args):
    """Measures of the queries under trained weights: {"losses": {query: value}, "mse": ..., "similarity": ...}.
    encode: encoder of `--features` (see baselines), or None."""
    grid = noise.timestep_grid(args.loss_time_samples, len(model.alpha_bars), "--loss_time_samples")
    with replaced_weights(model.denoiser, weights):
        values = {"losses": query_losses(model, queries, grid, args.noise_seed, args.loss_batch_size)}
        if not args.no_pictures:
            latents, made = make_pictures(model, queries.name, queries.embeddings[:, 0], [task.seed for task in tasks],
                                          queries.latents.shape[2:], *sampling_of(tasks), args.vae_batch_size)
            paths = write_pictures(weights_path(args, plan).parent, [task.result_name for task in tasks], made)
            features = [encode(files)[0] for files in (queries.paths, paths)] if encode else [queries.latents[0], latents]
            values["mse"], values["similarity"] = compare_pictures(pictures, made, *features)
    names = [task.result_name for task in tasks]
    return {kind: {name: float(f"{value:.9g}") for name, value in zip(names, array)} for kind, array in values.items()}


def is_measured(path, identity, args):
    """Whether a model's measures are there. Raises UserError where they are of other models or queries and may stay."""
    if not path.exists() or args.overwrite:
        return False
    record = read_json(path, "measures")
    found = record.get("identity") if isinstance(record, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the measures of a retrained model; {REMEDY}")
    compare_identity(path, {name: value for name, value in identity.items() if name != "queries"}, found, REMEDY)
    if found.get("queries") != identity["queries"]:
        raise UserError(f"{path}: was measured on other queries than the {len(identity['queries'])} of these task files; give all task "
                        f"files that it was measured on, or {REMEDY.removeprefix('give ')}")
    return args.no_pictures or "mse" in record


def print_cost(plans, untrained, unmeasured, training_set, tasks, args):
    """Prints what there is to do: models, steps and size."""
    recipe = recipe_of(args, args.seeds[0])
    print(f"{len(plans)} models; {len(untrained)} to be trained, {len(unmeasured) if tasks else 0} to be measured on {len(tasks)} queries")
    print(f"{len(training_set)} images; {recipe.epochs} epochs of {recipe.batch_size} images a step: {recipe.num_steps(len(training_set)):,} steps a model "
          f"at a learning rate of {recipe.rate:g} ({recipe.schedule})")


def finish(model, queries, pictures, tasks, plan, path, identity, encode, args, cost):
    """Measures one trained model and writes its file. cost: what training it took, where it was trained now."""
    weights = read_tensors(weights_path(args, plan), "trained weights")
    values = measure(model, weights, queries, pictures, tasks, plan, encode, args)
    write_json(path, {"identity": identity, "kind": plan.kind, "removed": plan.removed, **values,
                      "circumstances": {**circumstances(model.device), **cost}})


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(prog="python -m unlearn retrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PLANS, help="all images | random subsets | without K random ones | without a query's top K")
    parser.add_argument("--task_json", nargs="+", default=[], help="task files whose queries are measured under each model")
    parser.add_argument("--result_dir", default="results", help="where weights are written (default results)")
    parser.add_argument("--output", help="folder of the measures (default RESULT_DIR/retrained)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of initial weights and batches (default 0; several: full only)")
    parser.add_argument("--count", type=int, default=1, help="subsets, random: how many models (of each K)")
    parser.add_argument("--first", type=int, default=0, help="subsets, random: number of the first one (default 0)")
    parser.add_argument("--fraction", type=float, default=0.5, help="subsets: images kept (default 0.5)")
    parser.add_argument("--top_k", type=int, nargs="+", default=[], help="random, without: images left out")
    parser.add_argument("--influence", nargs="+", default=[], metavar="DIR", help="without: RESULT_DIR/influence, RESULT_DIR/baselines/METHOD, ...")
    parser.add_argument("--num_queries", type=int, help="without: the first so many queries only")
    parser.add_argument("--stack", type=int, default=1, help="models trained at once, as one batch (default 1)")
    parser.add_argument("--train_epochs", type=int, help="passes over the training set")
    parser.add_argument("--train_lr", type=float, help="learning rate of AdamW")
    parser.add_argument("--train_batch_size", type=int, help="images a step")
    parser.add_argument("--train_schedule", choices=SCHEDULES, help="of the learning rate")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="of training (default no)")
    parser.add_argument("--loss_time_samples", type=int, default=200, help="timesteps of the queries' losses (default 200)")
    parser.add_argument("--loss_batch_size", type=int, help="noisy samples in one forward pass; memory only")
    parser.add_argument("--features", metavar="MODEL_NAME", help="CLIP or DINO model that pictures are compared by (default: VAE latents)")
    parser.add_argument("--no_pictures", action="store_true", help="measure losses only")
    add_flags(parser, "dataroot", "sd_version", "laion_subset_size", "vae_batch_size", "noise_seed", "precision", "device", "overwrite", "dry_run")
    args = parser.parse_args(argv)
    settings = resolve(args, {"loss_batch_size": "batch_size"})
    args.output = Path(args.output or f"{args.result_dir}/retrained")
    return args, settings


def check_flags(args, tasks):
    """Raises UserError where flags that the kind needs are missing, or tasks cannot be measured."""
    needed = {"random": ["top_k"], "without": ["top_k", "influence", "task_json"]}.get(args.kind, [])
    for flag in needed:
        if not getattr(args, flag):
            raise UserError(f"retrain {args.kind}: needs --{flag}")
    if args.kind != "full" and len(args.seeds) > 1:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: only full models are trained with several; start it once a seed")
    for flag in ("count", "stack", "num_queries"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: expected at least 1")
    for folder in args.influence:
        if not Path(folder).is_dir():
            raise UserError(f"--influence {folder}: no such folder; compute_influence.py and python -m unlearn baselines make them")
    for task in tasks:
        if task.model_path is not None:
            raise UserError(f"{task.synth_image_path}: was made by a customized model; only queries of the base model are measured by retraining")
        if task.seed is None and not args.no_pictures:
            raise UserError(f"{task.synth_image_path}: has no seed in its task file, so that it cannot be made again; give --no_pictures")


def main(argv=None):
    """Checks, plans, then trains and measures stack by stack."""
    args, settings = parse_arguments(argv)
    tasks = [task for path in args.task_json for task in load_tasks(path, args.dataroot)]
    check_flags(args, tasks)
    for folder in args.result_dir, args.output:
        check_result_dir(folder)
    check_training_files(args)
    check_pictures(tasks, args.dataroot)
    encode = feature_encoder(args.features, args.device, args.vae_batch_size) if args.features else None
    model = load_model(args.sd_version, args.device, args.unet, trained=False)
    noise.timestep_grid(args.loss_time_samples, len(model.alpha_bars), "--loss_time_samples")
    check_steps(model, sampling_of(tasks)[0])
    training_set = prepare_training_set(model, args, settings)
    index, num_processes = process_share()
    plans = make_plans(args.kind, args, training_set, tasks)
    measures = {plan.name: (args.output / f"{plan.name}.json", measure_identity(model, training_set, plan, tasks, args)) for plan in plans}
    unmeasured = [plan for plan in plans if not tasks or not is_measured(*measures[plan.name], args)]
    untrained = [plan for plan in unmeasured if not keep_complete(weights_path(args, plan), model_identity(model, training_set, plan, args),
                                                                  args.overwrite, REMEDY)]
    print_cost(plans, untrained, unmeasured, training_set, tasks, args)
    if args.dry_run:
        return
    queries = join_sets([encode_query(model, task, args, settings) for task in tasks]) if tasks else None
    pictures = None
    if tasks and not args.no_pictures:
        pictures = load_pictures(args.dataroot, [task.synth_image_path for task in tasks], settings["resolution"])
    # Stacks are runs of all plans, done or not, so that a stack which was killed while it was written is the same again.
    for stack in make_stacks(plans, args.stack)[index::num_processes]:
        cost = {}
        if any(plan in untrained for plan in stack):
            seconds = train_stack(model, training_set, stack, args)
            cost = {"train_seconds": round(seconds / len(stack), 1), "stacked": len(stack), "threads": torch.get_num_threads()}
            log.info(f"{len(stack)} models in {seconds:.0f} s, {seconds / len(stack):.1f} s each")
        for plan in stack:
            if tasks and plan in unmeasured:
                finish(model, queries, pictures, tasks, plan, *measures[plan.name], encode, args, cost)
