"""Models trained from scratch into files, and measured: a stack of them at a time."""

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from .. import noise
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..models.generation import make_pictures
from ..models.lora import has_matrices
from ..models.pipelines import Model, replaced_weights
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
from .lora import read_matrices, save_lora
from .measures import MeasureSettings, Questions, compare_pictures, query_losses, write_pictures
from .plans import Plan
from .recipes import Recipe
from .training import train

REMEDY = "give --overwrite to replace it, or another --output and --result_dir"


def model_identity(
    model: Model, training_set: TrainingSet, plan: Plan, recipe: Recipe, precision: str
) -> dict:
    """Identity of one trained model. The seed is the plan's, whatever the recipe's."""
    return {
        **replace(recipe, seed=plan.seed).identity(model, training_set),
        "precision": precision,
        "members": digest(np.packbits(plan.members).tobytes().hex()),
    }


def weights_path(result_dir: str | Path, plan: Plan) -> Path:
    """Where a trained model's weights are written."""
    return Path(result_dir) / "retrain" / plan.name / "model.safetensors"


def train_stack(
    model: Model,
    training_set: TrainingSet,
    plans: Sequence[Plan],
    recipe: Recipe,
    precision: str,
    result_dir: str | Path,
) -> float:
    """Trains the models of a stack, which are of one seed, together, and writes their weights and
    records. Returns the seconds it took."""
    identities = [model_identity(model, training_set, plan, recipe, precision) for plan in plans]
    paths = [weights_path(result_dir, plan) for plan in plans]
    checkpoint = paths[0].parent.parent / f".{plans[0].name}-{digest(identities)[:16]}.checkpoint"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with progress(
        recipe.num_steps(len(training_set)),
        f"training {plans[0].name}" + (f" and {len(plans) - 1} more" if plans[1:] else ""),
        "steps",
    ) as bar:
        weights = train(
            model,
            training_set,
            np.stack([plan.members for plan in plans]),
            replace(recipe, seed=plans[0].seed),
            checkpoint,
            bar.update,
        )
    for path, identity, tensors in zip(paths, identities, weights):
        record_path(path).unlink(missing_ok=True)
        if recipe.lora_rank:
            content = save_lora(model, path, tensors, recipe.lora_rank, recipe.lora_alpha)
        else:
            content = write_tensors(path, tensors)
        write_record(path, identity, model.device, content)
    for plan in plans:
        for leftover in checkpoint.parent.glob(f".{plan.name}-*.checkpoint"):
            leftover.unlink()
    return time.monotonic() - start


def measure_identity(
    trained: dict,
    training_set: TrainingSet,
    plan: Plan,
    settings: MeasureSettings,
    queries: dict[str, str],
) -> dict:
    """What must be the same for the measures of two models to be compared, and which images this
    one has seen. trained: of `model_identity`; queries: {name: digest}, of `query_digests`."""
    recipe = {
        name: value
        for name, value in trained.items()
        if name not in ("seed", "initial_weights", "members")
    }
    return {
        "format_version": FORMAT_VERSION,
        "recipe": digest(recipe),
        "training_set": training_set.identity,
        "num_images": len(training_set),
        "seed": plan.seed,
        "members": base64.b64encode(np.packbits(plan.members).tobytes()).decode(),
        "queries": queries,
        **asdict(settings),
    }


def measure_pictures(
    model: Model, questions: Questions, folder: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Makes the queries' pictures again, writes them below a folder, and compares them with the
    queries: mean squared error and similarity, float64 [n] each."""
    queries, settings = questions.queries, questions.settings
    seeds = [task.seed for task in questions.tasks if task.seed is not None]
    if questions.pictures is None or len(seeds) != len(questions.tasks):
        raise ValueError("pictures can be compared only where every query has a seed and a picture")
    latents, made = make_pictures(
        model,
        queries.name,
        {name: array[:, 0] for name, array in queries.conditioning.items()},
        seeds,
        queries.latents.shape[2:],
        settings.num_inference_steps,
        settings.guidance_scale,
        questions.vae_batch_size,
    )
    paths = write_pictures(folder, questions.names, made)
    features = (
        [questions.encode(files)[0] for files in (queries.paths, paths)]
        if questions.encode
        else [queries.latents[0], latents]
    )
    return compare_pictures(questions.pictures, made, *features)


def measure(
    model: Model, weights: dict[str, torch.Tensor], questions: Questions, folder: Path, name: str
) -> dict[str, dict[str, float]]:
    """Measures of the queries under the trained weights of a model of this name: {"losses": {query:
    value}, "mse": ..., "similarity": ...}, the last two where it makes pictures, which are written
    below its folder. Raises UserError where one is not finite."""
    settings = questions.settings
    grid = noise.timestep_grid(settings.timesteps, model.num_train_timesteps, "--loss_time_samples")
    with replaced_weights(model.denoiser, weights):
        values = {
            "losses": query_losses(
                model, questions.queries, grid, settings.noise_seed, questions.loss_batch_size
            )
        }
        if questions.pictures is not None:
            values["mse"], values["similarity"] = measure_pictures(model, questions, folder)
    for kind, array in values.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{name}: {kind} of {int((~np.isfinite(array)).sum())} queries are NaN or "
                f"infinite; the model or a feature is broken"
            )
    return {
        kind: {query: float(f"{value:.9g}") for query, value in zip(questions.names, array)}
        for kind, array in values.items()
    }


def is_measured(path: Path, identity: dict, with_pictures: bool, overwrite: bool) -> bool:
    """Whether a model's measures are there. Raises UserError where they are of other models or
    queries and may stay."""
    if not path.exists() or overwrite:
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
    return not with_pictures or "mse" in record


def finish(
    model: Model,
    questions: Questions,
    plan: Plan,
    weights: Path,
    path: Path,
    identity: dict,
    cost: dict,
) -> None:
    """Measures one trained model and writes its file. cost: what training it took, where it was
    trained now."""
    is_lora = has_matrices(model.denoiser)
    tensors = read_matrices(weights) if is_lora else read_tensors(weights, "trained weights")
    values = measure(model, tensors, questions, weights.parent, plan.name)
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
