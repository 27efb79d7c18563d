"""Scores the training images of each task's query by other methods: centred cosines, influence
functions, the TRAK family.

    python -m unlearn baselines --task_json tasks/emoji_small.json --dataroot data/emoji_small
    python -m unlearn baselines --task_json tasks/abc.json --methods pixel vae --features facebook/dinov2-base

Writes RESULT_DIR/baselines/<method>/<query>/influence.npz, each with its record, in the format of
compute_influence.py. Killed and run again, the same command goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from ..attribution.influence import is_indifferent, rank_images
from ..attribution.losses import noise_identity
from ..baselines.methods import (
    CENTRED,
    INFLUENCE_WEIGHTS,
    METHODS,
    OF_BASE_MODEL,
    OF_COSINES,
    OF_PICTURES,
    SETTINGS,
    SWEEP,
    VIEWS,
    Run,
    picture_scores,
)
from ..baselines.similarity import feature_encoder
from ..datasets.encoding import has_given_arrays, map_files
from ..datasets.pictures import hash_picture, read_header
from ..datasets.tasks import load_tasks
from ..errors import UserError
from ..models.customization import check_customization, check_tokens
from ..models.generation import NUM_INFERENCE_STEPS, check_steps
from ..models.pipelines import SELECTIONS, load_model, select_parameters
from ..noise import timestep_grid
from ..runtime.programs import log
from ..storage.artifacts import whole_file
from ..storage.hashes import digest
from ..storage.records import keep_complete, record_path, write_record
from .inputs import (
    add_flags,
    check_pictures,
    check_result_dir,
    check_training_files,
    compare_images,
    encode_query,
    find_fisher,
    load_fisher,
    prepare_training_set,
    resolve,
)

REMEDY = "give --overwrite to replace it, or another --result_dir"


def parse_arguments(argv):
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearn baselines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task_json", required=True, help="task file: the queries")
    parser.add_argument(
        "--result_dir", default="results", help="where results are written (default results)"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default all)",
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
    args = parser.parse_args(argv)
    args.compat = None
    return args, resolve(args)


def add_gradient_flags(parser):
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
        default="all",
        help="TRAK family: whose gradients (default all)",
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


def name_features(names):
    """Method names of the feature models: the last part of each. Raises UserError where one is
    another method's."""
    methods = [Path(name).resolve().name for name in names]
    if len({*METHODS, "ours", *methods}) != len(METHODS) + 1 + len(methods):
        raise UserError(
            f"--features {' '.join(names)}: names must differ from each other and from ours, "
            f"{', '.join(METHODS)}"
        )
    return methods


def check_methods(args, tasks):
    """Raises UserError where there is no method, one is unknown, or one cannot score a task."""
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown or not args.methods + args.features:
        raise UserError(
            f"--methods: expected some of {', '.join(METHODS)}, found "
            f"{', '.join(unknown) or 'none'}"
        )
    custom = next((task for task in tasks if task.model_path is not None), None)
    if custom and (refused := [method for method in args.methods if method in OF_BASE_MODEL]):
        raise UserError(
            f"{args.task_json}: {custom.synth_image_path}: was made by the customized model "
            f"{custom.model_path}; "
            f"{', '.join(refused)} can only score queries of the base model; give --methods "
            f"{' '.join(name for name in METHODS if name not in OF_BASE_MODEL)}"
        )


def method_identity(run, method, feature_model):
    """Identity of a method's scores, but for the query."""
    names = SETTINGS.get(method, ())
    own = {"fisher": run.fisher.identity} if method == "influence" else {}
    if set(SWEEP) <= set(names):
        own.update(noise_identity(None, run.model.device))
    if feature_model:
        own["features"] = feature_model
    if run.readings and (feature_model or method in OF_PICTURES):
        own["readings"] = digest(run.readings)
    settings = (
        CENTRED
        if feature_model or method in OF_COSINES
        else {name: getattr(run.args, name) for name in names}
    )
    return {
        **run.model.identity,
        "method": method,
        "settings": settings,
        **own,
        "candidates": [run.training_set.identity],
    }


def list_readings(dataroot, training_set):
    """How pictures that are not plain are read, {id: reading}, of a data root whose arrays, and so
    its identity, tell nothing of them."""
    if not has_given_arrays(dataroot):
        return {}
    readings = map_files(lambda path: read_header(path)[0], training_set.paths, "looking at images")
    return {id: reading for id, reading in zip(training_set.ids, readings) if reading}


def list_results(run, method, feature_model):
    """Path and identity of each query's scores by a method."""
    for task, query in zip(run.tasks, run.queries):
        identity = {**method_identity(run, method, feature_model), "query": query.identity}
        if method == "journeytrak":  # its trajectory starts where the query's own did
            identity["query_seed"] = task.seed
        if task.exemplar_paths:
            identity["exemplars"] = digest([hash_picture(path) for path in task.exemplar_paths])
        yield run.folder / method / task.result_name / "influence.npz", identity


def write_scores(path, identity, run, task, scores, warnings=()):
    """Writes one query's scores as compute_influence.py does, exemplars first, and what there is to
    warn of."""
    exemplars = task.exemplar_ids(run.args.dataroot)
    if not np.isfinite(scores).all():
        raise UserError(
            f"{path}: {int((~np.isfinite(scores)).sum())} scores are NaN or infinite; the model "
            f"or a feature is broken"
        )
    record_path(path).unlink(missing_ok=True)
    with whole_file(path) as file:
        np.savez(
            file,
            ids=np.array([*exemplars, *run.training_set.ids]),
            influence=scores,
            rank=rank_images(scores),
            is_exemplar=np.arange(len(scores)) < len(exemplars),
            **({"warnings": np.array(warnings, str)} if warnings else {}),
        )
    write_record(path, identity, run.model.device)


def score_tasks(run, method, score, feature_model=None):
    """Scores all queries by a method where some are pending: so that a run that was killed gives
    the bits of one that was not."""
    results = list(list_results(run, method, feature_model))
    pending = [
        not keep_complete(path, identity, run.args.overwrite, REMEDY) for path, identity in results
    ]
    indifferent = []
    if any(pending):
        for task, (path, identity), scores, is_pending in zip(
            run.tasks, results, score(run), pending, strict=True
        ):
            if is_pending:
                write_scores(
                    path,
                    identity,
                    run,
                    task,
                    scores,
                    run.fisher.warnings if method == "influence" else (),
                )
            if is_indifferent(scores):
                indifferent.append(task.synth_image_path)
    if indifferent:
        log.warning(
            f"{method}: all images have the same score for {len(indifferent)} of {len(results)} "
            f"queries, first {indifferent[0]}: of "
            "these it says nothing. Are all captions or pictures alike?"
        )
    log.info(f"{method}: {len(results)} queries in {run.folder / method}")


def of_base_model(tasks):
    """Those tasks whose pictures the base model made."""
    return [task for task in tasks if task.model_path is None]


def check_run(args):
    """The checks that need no model: (tasks, method names of the feature models)."""
    tasks, feature_names = load_tasks(args.task_json, args.dataroot), name_features(args.features)
    check_methods(args, tasks)
    check_result_dir(args.result_dir)
    check_training_files(args)
    if "influence" in args.methods:
        find_fisher(args)
    check_pictures(tasks, args.dataroot)
    check_tokens(None, of_base_model(tasks), args.sd_version)
    return tasks, feature_names


def main(argv=None):
    """Checks, loads, then scores and saves method by method."""
    args, settings = parse_arguments(argv)
    tasks, feature_names = check_run(args)
    encoders = {
        method: feature_encoder(name, args.device, args.vae_batch_size)
        for method, name in zip(feature_names, args.features)
    }
    model = load_model(args.sd_version, args.device, args.unet)
    check_customization(model, None, of_base_model(tasks))
    grid = timestep_grid(args.time_samples, len(model.alpha_bars))
    check_steps(model, args.num_inference_steps)
    fisher = None
    if "influence" in args.methods:  # of K and V, whatever the TRAK family's weights are
        parameters = select_parameters(model.denoiser, INFLUENCE_WEIGHTS)
        fisher = load_fisher(
            find_fisher(args),
            model,
            parameters,
            args.damping,
            argparse.Namespace(**{**vars(args), "weight_selection": None}),
        )
    training_set = prepare_training_set(model, args, settings)
    if fisher:
        fisher.warnings = compare_images(
            find_fisher(args),
            training_set,
            argparse.Namespace(**{**vars(args), "weight_selection": None}),
        )
    of_pictures = [*(method for method in args.methods if method in OF_PICTURES), *feature_names]
    if of_pictures and training_set.paths[0] is None:
        raise UserError(
            f"--methods {' '.join(of_pictures)}: need the training images' pictures, and "
            f"{args.dataroot} has none"
        )
    queries = [encode_query(model, task, args, settings) for task in tasks]
    run = Run(
        model,
        training_set,
        tasks,
        queries,
        args,
        model.resolution(settings),
        grid,
        Path(args.result_dir) / "baselines",
        fisher,
        list_readings(args.dataroot, training_set) if of_pictures else {},
    )
    for method in dict.fromkeys(args.methods):
        score_tasks(run, method, METHODS[method])
    for (method, encode), name in zip(encoders.items(), args.features):
        score_tasks(run, method, partial(picture_scores, encode=encode, name=method), name)
