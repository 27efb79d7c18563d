"""The models that `retrain` is to train, by its flags, and which of them are not there yet."""

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from ..attribution.names import NAMED
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..evaluation.scores import OURS
from ..retraining.models import REMEDY, is_measured, weights_path
from ..retraining.plans import Plan, PlanSettings, make_plans
from ..retraining.rankings import put_set_first, read_rankings, read_scored
from ..retraining.sets import read_sets
from ..storage.records import keep_complete
from .advice import influence_command, write_command


def plan_settings(args: Namespace) -> PlanSettings:
    """Which models are trained, by the flags."""
    return PlanSettings(
        args.kind,
        tuple(args.seeds),
        args.first,
        args.count,
        args.fraction,
        tuple(args.top_k),
        read_sets(args.sets_json) if args.kind == "sets" else (),
        args.together,
    )


def ranking_command(args: Namespace, folder: Path, method: str) -> str:
    """What ranks the queries of `retrain`'s task files into `folder`."""
    if method == OURS or method in NAMED:
        scoring = {} if method == OURS else {"scoring": method}
        return influence_command(
            args, task_json=args.task_json[0], result_dir=folder.parent, top_k=None, **scoring
        )  # retrain's top_k is another
    return write_command(
        "baselines",
        args,
        task_json=args.task_json[0],
        result_dir=folder.parent.parent,
        methods=[method],
    )


def check_full_model(plans: Sequence[Plan], args: Namespace) -> None:
    """Raises UserError where models without some images would be trained that no full model of
    their seed is there to compare with."""
    seeds = {plan.seed for plan in plans if plan.kind in ("without", "together")}
    for seed in sorted(seeds):
        if args.task_json and not any(
            path.exists()
            for path in (
                args.output / f"full-seed{seed}.json",
                Path(args.result_dir) / f"retrain/full-seed{seed}/model.safetensors",
            )
        ):
            command = write_command(
                "retrain", args, "full", "--seeds", str(seed), output=args.output
            )
            raise UserError(
                f"retrain {args.kind}: {args.output} has no full model of seed {seed} to compare "
                f"models of that seed with; train it "
                f"first: {command}"
            )


def plan_models(args: Namespace, training_set: TrainingSet, tasks: list[Task]) -> list[Plan]:
    """The models of the kind that is asked for."""
    settings = plan_settings(args)
    asked = tasks[: args.num_queries]
    rankings = read_rankings(
        [Path(folder) for folder in args.influence],
        asked,
        training_set,
        args.dataroot,
        partial(ranking_command, args),
    )
    if args.chosen_sets:
        largest = max(args.top_k)
        rankings = (put_set_first(ranking, largest, REMEDY) for ranking in rankings)
    if args.scores:
        scored = read_scored(args.scores, args.methods, asked, training_set, args.dataroot)
        rankings = chain(rankings, scored)
    plans = make_plans(settings, training_set, rankings)
    check_full_model(plans, args)
    return plans


def measures_path(args: Namespace, plan: Plan) -> Path:
    """Where the measures of a model are written."""
    return args.output / f"{plan.name}.json"


def find_unfinished(
    plans: Sequence[Plan],
    trained: dict[str, dict],
    measured: dict[str, dict],
    tasks: Sequence[Task],
    args: Namespace,
) -> tuple[list[Plan], list[Plan]]:
    """Those of the plans whose models are to be trained, and to be measured. trained, measured: the
    identities by name. Raises UserError where files of other models are in the way."""
    unmeasured = [
        plan
        for plan in plans
        if not tasks
        or not is_measured(
            measures_path(args, plan), measured[plan.name], not args.no_pictures, args.overwrite
        )
    ]
    untrained = [
        plan
        for plan in unmeasured
        if not keep_complete(
            weights_path(args.result_dir, plan), trained[plan.name], args.overwrite, REMEDY
        )
    ]
    return untrained, unmeasured
