"""Similarity baselines that `evaluate` measures beside ours, on queries that have exemplars."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from ..attribution.influence import is_indifferent, rank_images
from ..baselines.similarity import (
    Encode,
    encode_blocks,
    feature_encoder,
    latent_blocks,
    latent_encoder,
    pixel_encoder,
    score_queries,
    word_scores,
)
from ..datasets.tasks import Task
from ..errors import UserError
from ..evaluation.metrics import chance_metrics, exemplar_ranks, is_tied, query_metrics
from ..evaluation.rankings import Ranking, check_candidates
from ..evaluation.scores import OURS
from ..runtime.programs import progress
from ..storage.hashes import digest
from .inputs import load_model, prepare_training_set

NAMES = (OURS, "random", "words", "pixel", "vae")  # of methods; a feature model has another


def check_features(names: Sequence[str], paths: Sequence[Path], dataroot: str | Path) -> list[str]:
    """Method names of the feature models. Raises UserError where two are the same or there are no
    pictures to look at."""
    methods = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    if len({*NAMES, *methods}) != len(NAMES) + len(methods):
        raise UserError(
            f"--features {' '.join(names)}: names must differ from each other and from "
            f"{', '.join(NAMES)}"
        )
    if methods and not paths:
        raise UserError(
            f"--features {names[0]}: needs the pictures {dataroot}/laion_subset/images, and "
            f"there are none"
        )
    return methods


def measure_baselines(
    tasks: list[Task],
    args: Namespace,
    settings: dict,
    methods: Sequence[str],
    rankings: Sequence[Ranking],
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Metrics [queries, metrics] of each similarity baseline by name, and notices, a line each."""
    features = {
        method: feature_encoder(name, args.device, args.vae_batch_size)
        for method, name in zip(methods, args.features)
    }
    model = load_model(args, fuse_lora=True)
    training_set = prepare_training_set(model, args)
    check_candidates(
        rankings, len(training_set), digest(training_set.ids), f"the data root {args.dataroot}"
    )
    encoders = {
        "pixel": pixel_encoder(model.resolution(settings)),
        "vae": latent_encoder(model, model.resolution(settings), args.vae_batch_size),
        **features,
    }
    if training_set.paths[0] is None:
        print(
            f"The pixel baseline is left out: {args.dataroot} has no pictures of its training "
            f"images (laion_subset/images).\n"
        )
        del encoders["pixel"]
    values, notices = {}, []
    if any(training_set.captions):
        values["words"] = measure_words(tasks, training_set.captions)
    else:
        print(
            f"The words baseline is left out: {args.dataroot} has no captions of its training "
            f"images.\n"
        )
    for method, encode in encoders.items():
        blocks = (
            partial(latent_blocks, training_set)
            if method == "vae"
            else partial(encode_blocks, encode, cast(Sequence[Path], training_set.paths))
        )
        values[method], lines = measure(
            method, encode, blocks, tasks, args.dataroot, len(training_set)
        )
        notices += lines
    return values, notices


def measure(
    method: str,
    encode: Encode,
    blocks: Callable[[], Iterable[np.ndarray]],
    tasks: Sequence[Task],
    dataroot: str | Path,
    num_training: int,
) -> tuple[np.ndarray, list[str]]:
    """Metrics [queries, metrics] of one baseline, those of chance where it gives all images the
    same score, and notices."""
    rows, ties, indifferent = [], 0, 0
    with progress(2 * num_training, method, "images") as bar:
        for task, scores in zip(tasks, score_queries(encode, blocks, tasks, dataroot, bar.update)):
            is_exemplar = np.arange(len(scores)) < len(task.exemplar_paths)
            if is_indifferent(scores):
                rows.append(chance_metrics(len(task.exemplar_paths), len(scores)))
                indifferent += 1
            else:
                rows.append(query_metrics(exemplar_ranks(rank_images(scores), is_exemplar)))
                ties += is_tied(scores, is_exemplar)
    notices = tie_lines(method, ties)
    if indifferent:
        notices.append(
            f"{method}: in {indifferent} of {len(tasks)} queries all images have the same score, "
            f"which is measured as chance."
        )
    return np.array(rows), notices


def tie_lines(method: str, count: int) -> list[str]:
    """A line on queries whose exemplars tie, in a list, or []."""
    return (
        [
            f"{method}: in {count} queries exemplars tie with training images, counted in the "
            f"exemplars' favour."
        ]
        if count
        else []
    )


def measure_words(tasks: Sequence[Task], captions: Sequence[str]) -> np.ndarray:
    """Metrics [queries, metrics] of the words that prompts share with captions, an exemplar's being
    its model's train prompt. Training images as good as the exemplars are ranked before them: texts
    are often alike, and what cannot tell them apart has found nothing."""
    scores = word_scores(
        [task.prompt for task in tasks], [*(task.train_prompt or "" for task in tasks), *captions]
    )
    before = [int((row[len(tasks) :] >= row[place]).sum()) for place, row in enumerate(scores)]
    return np.array(
        [
            query_metrics(count + 1 + np.arange(len(task.exemplar_paths)))
            for task, count in zip(tasks, before)
        ]
    )
