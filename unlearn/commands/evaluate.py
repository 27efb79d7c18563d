"""Measures finished queries: Recall@k and mAP of their exemplars or, without exemplars, against
retrained models.

    python -m unlearn evaluate --task_json tasks/abc.json
    python -m unlearn evaluate --task_json tasks/abc.json --features openai/clip-vit-large-patch14 facebook/dinov2-base
    python -m unlearn evaluate --task_json tasks/emoji_small.json --dataroot data/emoji_small --retrained FOLDER

Prints Markdown tables and writes evaluate.csv (method x group x metric), paired.csv (ours against
each baseline) and queries.csv (query x method). Groups are all queries, the kinds (object, style)
and the test cases.

With --retrained, the folder of the models' JSON files: the linear datamodeling score (lds.csv,
lds_queries.csv), leave-K-out (leave_k_out.csv, leave_k_out_paired.csv; of several queries at once:
leave_k_out_together.csv), retention.csv, equivalent.csv, their plots, and scores/METHOD.npz, from
which --scores makes the same tables again without the influence files. No model is loaded. The LDS
depends on how heavy the tails of scores are: with --tuning_json, a task file of further queries that
are scored and measured too, it is also told after the power of the scores that is best for each
method on those.
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..attribution.names import NAMED
from ..datasets.tasks import Task, load_tasks
from ..datasets.training_sets import list_images
from ..errors import UserError
from ..evaluation.evidence import Commands, Sources
from ..evaluation.exemplars import report
from ..evaluation.goldstandard import evaluate_retrained
from ..evaluation.metrics import chance_metrics, query_metrics
from ..evaluation.rankings import Ranking, check_candidates, check_exemplars, read_ranking
from ..evaluation.scores import OURS
from ..retraining.measures import LOSS_TIMESTEPS
from .advice import influence_command, write_command
from .evaluate_baselines import check_features, measure_baselines, tie_lines
from .flags import add_flags, make_parser, resolve
from .inputs import check_pictures, check_training_files


def parse_arguments(argv: Sequence[str] | None) -> tuple[Namespace, dict]:
    """The command line, resolved against the data root's defaults: (args, settings)."""
    parser = make_parser(__doc__, "python -m unlearn evaluate")
    parser.add_argument("--task_json", required=True, help="task file whose queries are finished")
    parser.add_argument(
        "--result_dir", default="results", help="where compute_influence.py wrote (default results)"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="MODEL_NAME",
        help="CLIP or DINO models to compare with, folders or hub names",
    )
    parser.add_argument(
        "--retrained",
        help="folder of retrained models' JSON files (python -m unlearn retrain) to measure "
        "against",
    )
    parser.add_argument(
        "--scores",
        help="with --retrained: folder of scores/METHOD.npz to read instead of influence files",
    )
    parser.add_argument(
        "--tuning_json",
        help="with --retrained: task file of further queries, not reported, on which the power "
        "of each "
        "method's scores is chosen",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="with --retrained: only these (default all that are finished)",
    )
    parser.add_argument("--output", help="folder of the CSV files (default RESULT_DIR/evaluate)")
    add_flags(
        parser,
        "dataroot",
        "sd_version",
        "lora",
        "weights",
        "laion_subset_size",
        "vae_batch_size",
        "precision",
        "device",
    )
    args = parser.parse_args(argv)
    for flag in "scores", "methods", "tuning_json":
        if getattr(args, flag) and not args.retrained:
            raise UserError(f"--{flag}: only with --retrained DIR")
    if args.retrained and args.features:
        raise UserError(
            "--features: not with --retrained; score them as a baseline: python -m unlearn "
            "baselines --features"
        )
    settings = resolve(args)
    args.output = args.output or f"{args.result_dir}/evaluate"
    return args, settings


def sources_of(args: Namespace) -> Sources:
    """Where the evidence stands, by the flags."""
    return Sources(
        args.task_json,
        args.dataroot,
        args.retrained,
        args.result_dir,
        args.scores,
        args.tuning_json,
        tuple(args.methods or ()),
    )


def score_command(args: Namespace, method: str | None, task_json: str | Path) -> str:
    """What scores the queries of a task file by a method, by all baselines where it is None."""
    if method == OURS or method in NAMED:
        scoring = {} if method == OURS else {"scoring": method}
        return influence_command(args, task_json=task_json, **scoring)
    methods = None if method is None else [method]
    return write_command("baselines", args, methods=methods, task_json=task_json)


def retrain_command(args: Namespace, kind: str, *words: str, **more: Any) -> str:
    """What makes models of a kind, measured on the queries that are evaluated."""
    return write_command("retrain", args, kind, *words, output=args.retrained, **more)


def alike_command(args: Namespace, seeds: Iterable[int], identity: dict) -> str:
    """What makes full models of these seeds, measured as a model of this identity was."""
    timesteps = identity["timesteps"] if identity["timesteps"] != LOSS_TIMESTEPS else None
    return retrain_command(
        args,
        "full",
        "--seeds",
        *map(str, seeds),
        loss_time_samples=timesteps,
        noise_seed=identity["noise_seed"],
        features=identity.get("features"),
    )


def commands_of(args: Namespace) -> Commands:
    """What messages of an evaluation against retrained models tell people to type."""
    return Commands(
        score=partial(score_command, args),
        train_full=lambda task_json: retrain_command(args, "full", task_json=task_json),
        train_subsets=retrain_command(args, "subsets", count=64),
        train_alike=partial(alike_command, args),
    )


def read_rankings(tasks: Sequence[Task], args: Namespace) -> list[Ranking]:
    """The Ranking of each query. Raises UserError where one is missing, or they are not alike."""
    check_exemplars(tasks, args.task_json)
    commands = influence_command(args), influence_command(args, overwrite=True)
    rankings = [read_ranking(task, args.dataroot, args.result_dir, *commands) for task in tasks]
    check_candidates(rankings, rankings[0].num_training, rankings[0].training_ids, rankings[0].path)
    return rankings


def main(argv: Sequence[str] | None = None) -> None:
    """Checks every input, measures ours, chance and the baselines, prints and writes."""
    args, settings = parse_arguments(argv)
    tasks = load_tasks(args.task_json, args.dataroot)
    if args.retrained:
        return evaluate_retrained(tasks, sources_of(args), commands_of(args), args.output)
    rankings = read_rankings(tasks, args)
    methods = check_features(args.features, list_images(args.dataroot), args.dataroot)
    check_pictures(tasks, args.dataroot)
    check_training_files(args)
    values = {
        OURS: np.array([query_metrics(ranking.ranks) for ranking in rankings]),
        "random": np.array(
            [chance_metrics(len(ranking.ranks), ranking.num_candidates) for ranking in rankings]
        ),
    }
    baselines, notices = measure_baselines(tasks, args, settings, methods, rankings)
    report(
        tasks,
        rankings,
        {**values, **baselines},
        [*tie_lines(OURS, sum(ranking.tied for ranking in rankings)), *notices],
        args.output,
    )
