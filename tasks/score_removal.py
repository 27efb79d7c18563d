"""Scores queries of a base model by removal, into one small file that `evaluate --scores` reads.

    python tasks/score_removal.py --dataroot data/emoji_shared --result_dir results/emoji_shared \\
        --task_json tasks/emoji_shared.json tasks/emoji_shared_tuning.json \\
        --output results/evidence/emoji_shared/scores

The features of the training set are kept in RESULT_DIR/removal. The queries' latents and embeddings
must be stored, as `python -m unlearn generate` stores them.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from unlearn.attribution.removal import RIDGE, RemovalSettings
from unlearn.attribution.removal_index import RemovalIndex, build_features
from unlearn.datasets.queries import read_stored
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import TrainingSet, open_training_set
from unlearn.evaluation.score_files import write_scores
from unlearn.evaluation.scores import MethodScores, keep_order
from unlearn.models.pipelines import SELECTIONS, load_model
from unlearn.runtime.programs import run


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = RemovalSettings()
    parser.add_argument("--dataroot", required=True)
    parser.add_argument("--task_json", nargs="+", required=True)
    parser.add_argument("--result_dir", default="results")
    parser.add_argument("--output", required=True, help="folder of the scores")
    parser.add_argument("--weight_selection", choices=SELECTIONS, default=default.weight_selection)
    parser.add_argument("--timesteps", type=int, nargs="+", default=default.timesteps)
    parser.add_argument("--probes", type=int, default=default.probes)
    parser.add_argument("--sketch_size", type=int, default=default.sketch_size)
    parser.add_argument("--ridge", type=float, default=RIDGE)
    parser.add_argument("--overwrite", action="store_true", help="replace other features")
    return parser.parse_args(argv)


def read_query(model, task, dataroot, name):
    """A query as a training set of one image and one view."""
    shape = model.latent_shape(model.resolution(read_settings(dataroot)))
    stored = read_stored(task, dataroot, shape, model.embedding_shape)
    return TrainingSet(
        name,
        [task.synth_image_path],
        [task.prompt],
        [None],
        stored["latents"][None, None],
        stored["embeddings"][None, None],
    )


def main(argv=None):
    """Builds the features, or keeps them, and scores."""
    args = parse_arguments(argv)
    tasks = [task for path in args.task_json for task in load_tasks(path, args.dataroot)]
    settings = read_settings(args.dataroot)
    model = load_model(settings["pipeline"], "cpu", settings["unet"])
    name, shape = settings["name"], model.latent_shape(model.resolution(settings))
    images = open_training_set(args.dataroot, name, shape, model.embedding_shape)
    removal = RemovalSettings(
        args.weight_selection, tuple(args.timesteps), args.probes, args.sketch_size
    )
    folder = Path(args.result_dir) / "removal"
    build_features(model, images, removal, folder, args.overwrite)
    queries = [read_query(model, task, args.dataroot, name) for task in tasks]
    scores = RemovalIndex(model, images, removal, folder).score(queries, args.ridge)
    made = {**asdict(removal), "timesteps": list(removal.timesteps), "ridge": args.ridge}
    found = MethodScores(
        "removal",
        images.identity,
        images.ids,
        np.stack([keep_order(row) for row in scores]),
        {"settings": made},
    )
    write_scores(args.output, found, [task.query_name for task in tasks])


if __name__ == "__main__":
    run(main)
