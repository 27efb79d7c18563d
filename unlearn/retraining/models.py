"""Models trained from scratch into files, and measured: a stack of them at a time."""

import base64
import time
from pathlib import Path

import numpy as np

from .. import noise
from ..errors import UserError
from ..evaluation.retrained import query_digests
from ..models.generation import make_pictures
from ..models.pipelines import replaced_weights
from ..runtime.programs import progress
from ..storage.artifacts import write_json, write_tensors
from ..storage.hashes import digest
from ..storage.reading import read_json, read_tensors
from ..storage.records import (
    FORMAT_VERSION,
    circumstances,
    compare_identity,
    record_path,
    write_record,
)
from .measures import compare_pictures, query_losses, sampling_of, write_pictures
from .training import Recipe, train

REMEDY = "give --overwrite to replace it, or another --output and --result_dir"


def recipe_of(args, seed):
    """The recipe by the flags, which the data root's settings have filled."""
    return Recipe(
        args.train_epochs,
        args.train_lr,
        args.train_batch_size,
        args.train_schedule,
        seed,
        args.mixed_precision,
    )


def model_identity(model, training_set, plan, args):
    """Identity of one trained model."""
    return {
        **recipe_of(args, plan.seed).identity(model, training_set),
        "precision": args.precision,
        "members": digest(np.packbits(plan.members).tobytes().hex()),
    }


def weights_path(args, plan):
    """Where a trained model's weights are written."""
    return Path(args.result_dir) / "retrain" / plan.name / "model.safetensors"


def train_stack(model, training_set, plans, args):
    """Trains the models of a stack together and writes their weights and records. Returns the
    seconds it took."""
    identities = [model_identity(model, training_set, plan, args) for plan in plans]
    paths = [weights_path(args, plan) for plan in plans]
    checkpoint = paths[0].parent.parent / f".{plans[0].name}-{digest(identities)[:16]}.checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    recipe, start = recipe_of(args, plans[0].seed), time.monotonic()
    with progress(
        recipe.num_steps(len(training_set)),
        f"training {plans[0].name}" + (f" and {len(plans) - 1} more" if plans[1:] else ""),
        "steps",
    ) as bar:
        weights = train(
            model,
            training_set,
            np.stack([plan.members for plan in plans]),
            recipe,
            checkpoint,
            bar.update,
        )
    for path, identity, tensors in zip(paths, identities, weights):
        record_path(path).unlink(missing_ok=True)
        write_record(path, identity, model.device, write_tensors(path, tensors))
    for plan in plans:
        for leftover in checkpoint.parent.glob(f".{plan.name}-*.checkpoint"):
            leftover.unlink()
    return time.monotonic() - start


def measure_identity(model, training_set, plan, tasks, args):
    """What must be the same for the measures of two models to be compared, and which images this
    one has seen."""
    recipe = model_identity(model, training_set, plan, args)
    recipe = digest(
        {
            name: value
            for name, value in recipe.items()
            if name not in ("seed", "initial_weights", "members")
        }
    )
    num_inference_steps, guidance_scale = sampling_of(tasks)
    return {
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "training_set": training_set.identity,
        "num_images": len(training_set),
        "seed": plan.seed,
        "members": base64.b64encode(np.packbits(plan.members)).decode(),
        "queries": query_digests(tasks, args.dataroot),
        "timesteps": args.loss_time_samples,
        "noise_seed": args.noise_seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "features": args.features,
    }


def measure(model, weights, queries, pictures, tasks, plan, encode, args):
    """Measures of the queries under trained weights: {"losses": {query: value}, "mse": ...,
    "similarity": ...}. encode: encoder of `--features` (see baselines), or None."""
    grid = noise.timestep_grid(args.loss_time_samples, len(model.alpha_bars), "--loss_time_samples")
    with replaced_weights(model.denoiser, weights):
        values = {
            "losses": query_losses(model, queries, grid, args.noise_seed, args.loss_batch_size)
        }
        if not args.no_pictures:
            latents, made = make_pictures(
                model,
                queries.name,
                queries.embeddings[:, 0],
                [task.seed for task in tasks],
                queries.latents.shape[2:],
                *sampling_of(tasks),
                args.vae_batch_size,
            )
            paths = write_pictures(
                weights_path(args, plan).parent, [task.result_name for task in tasks], made
            )
            features = (
                [encode(files)[0] for files in (queries.paths, paths)]
                if encode
                else [queries.latents[0], latents]
            )
            values["mse"], values["similarity"] = compare_pictures(pictures, made, *features)
    for kind, array in values.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{plan.name}: {kind} of {int((~np.isfinite(array)).sum())} queries are NaN or "
                f"infinite; the model or a feature is broken"
            )
    names = [task.result_name for task in tasks]
    return {
        kind: {name: float(f"{value:.9g}") for name, value in zip(names, array)}
        for kind, array in values.items()
    }


def is_measured(path, identity, args):
    """Whether a model's measures are there. Raises UserError where they are of other models or
    queries and may stay."""
    if not path.exists() or args.overwrite:
        return False
    record = read_json(path, "measures")
    found = record.get("identity") if isinstance(record, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the measures of a retrained model; {REMEDY}")
    compare_identity(
        path, {name: value for name, value in identity.items() if name != "queries"}, found, REMEDY
    )
    if found.get("queries") != identity["queries"]:
        raise UserError(
            f"{path}: was measured on other queries than the {len(identity['queries'])} of these "
            f"task files; give all task "
            f"files that it was measured on, or {REMEDY.removeprefix('give ')}"
        )
    return args.no_pictures or "mse" in record


def finish(model, queries, pictures, tasks, plan, path, identity, encode, args, cost):
    """Measures one trained model and writes its file. cost: what training it took, where it was
    trained now."""
    weights = read_tensors(weights_path(args, plan), "trained weights")
    values = measure(model, weights, queries, pictures, tasks, plan, encode, args)
    write_json(
        path,
        {
            "identity": identity,
            "kind": plan.kind,
            "removed": plan.removed,
            **values,
            "circumstances": {**circumstances(model.device), **cost},
        },
    )
