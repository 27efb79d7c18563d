"""Which models `retrain` is to train: their names, and which images each may see."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..advice import influence_command, write_command
from ..attribution.influence import is_undecided
from ..errors import UserError
from ..evaluation.rankings import count_warnings, read_influence, warnings_of
from ..runtime.programs import log
from ..storage.reading import read_json
from ..storage.records import names_of_file, record_path
from .training import random_members


@dataclass(frozen=True, eq=False)
class Plan:
    """One model to be trained: its name, seed and images, and whose images were left out, for
    `evaluate`."""

    name: str
    kind: str  # full, subset or without
    seed: int
    members: np.ndarray  # [N] bool
    removed: dict | None  # method, query, k


def check_count(flag, value, largest, item):
    """Raises UserError where so many images cannot be removed or kept."""
    if not 1 <= value < largest:
        raise UserError(
            f"{flag} {value}: expected 1 to {largest - 1}, fewer than the {largest} {item}"
        )


def seed_suffix(seed):
    """What a model's name says of a seed other than 0."""
    return f"-seed{seed}" if seed else ""


def plan_full(args, training_set, tasks):
    """Full models, one a seed."""
    return [
        Plan(f"full-seed{seed}", "full", seed, np.ones(len(training_set), bool), None)
        for seed in args.seeds
    ]


def plan_subsets(args, training_set, tasks):
    """Models of random subsets, `--fraction` of the images each."""
    count, kept = len(training_set), round(len(training_set) * args.fraction)
    check_count(f"--fraction {args.fraction}: images kept:", kept, count, "training images")
    prefix = "half" if args.fraction == 0.5 else f"subset-{args.fraction:g}"
    return [
        Plan(
            f"{prefix}-{number:03d}{seed_suffix(args.seeds[0])}",
            "subset",
            args.seeds[0],
            random_members(count, kept, number, training_set.name),
            None,
        )
        for number in range(args.first, args.first + args.count)
    ]


def plan_random(args, training_set, tasks):
    """Models without K random images."""
    count, plans = len(training_set), []
    for k in args.top_k:
        check_count("--top_k", k, count, "training images")
        for number in range(args.first, args.first + args.count):
            members = random_members(count, count - k, number, f"{training_set.name} without {k}")
            plans.append(
                Plan(
                    f"random-k{k}-{number:03d}{seed_suffix(args.seeds[0])}",
                    "without",
                    args.seeds[0],
                    members,
                    {"method": "random", "query": None, "k": k},
                )
            )
    return plans


def ranking_command(args, folder, method):
    """What ranks the queries of `retrain`'s task files into `folder`."""
    if method == "ours":
        return influence_command(
            args, task_json=args.task_json[0], result_dir=folder.parent, top_k=None
        )  # retrain's top_k is another
    return write_command(
        "baselines",
        args,
        task_json=args.task_json[0],
        result_dir=folder.parent.parent,
        methods=[method],
    )


def plan_without(args, training_set, tasks):
    """Models without the K most influential images of a query, by each method's influence file."""
    plans, warnings = [], {}
    for folder in map(Path, args.influence):
        method = (
            "ours"
            if folder.name == "influence" and folder.parent.name != "baselines"
            else folder.name
        )
        for task in tasks[: args.num_queries]:
            path = folder / task.result_name / "influence.npz"
            arrays = read_influence(path, f"make it: {ranking_command(args, folder, method)}")
            ranked = read_json(record_path(path), "record")["identity"].get("candidates")
            if arrays["ids"].tolist() != training_set.ids or ranked != [training_set.identity]:
                where = (
                    names_of_file(path).get("data root")
                    or "another data root, or of files that have changed since"
                )
                raise UserError(
                    f"{path}: ranks other training images, {len(arrays['ids'])} of {where}, than "
                    f"the {len(training_set)} of "
                    f"{args.dataroot}; give the --dataroot, --sd_version and --laion_subset_size "
                    f"it was made with"
                )
            warnings[path] = warnings_of(arrays)
            for k in args.top_k:
                check_count("--top_k", k, len(training_set), "training images")
                if is_undecided(arrays["influence"], k):
                    raise UserError(
                        f"{path}: the images ranked {k} and {k + 1} have the same score; the "
                        f"order of the files, not {method}, would "
                        "decide which are removed; give another --top_k, or leave this folder "
                        "out of --influence"
                    )
                members = np.ones(len(training_set), bool)
                members[arrays["rank"][:k]] = False
                name = f"without-{method}-{task.result_name.replace('/', '-')}-k{k}{seed_suffix(args.seeds[0])}"
                plans.append(
                    Plan(
                        name,
                        "without",
                        args.seeds[0],
                        members,
                        {"method": method, "query": task.result_name, "k": k},
                    )
                )
    for line in count_warnings(warnings, "rankings"):
        log.warning(line)
    return plans


def make_plans(kind, args, training_set, tasks):
    """The models of a kind. Raises UserError where two would have one name."""
    plans = PLANS[kind](args, training_set, tasks)
    names = [plan.name for plan in plans]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"retrain {kind}: would train {twice[0]} twice; give each seed, K, folder and task "
            f"file once"
        )
    return plans


PLANS = {"full": plan_full, "subsets": plan_subsets, "random": plan_random, "without": plan_without}


def make_stacks(plans, size):
    """Plans of one seed in runs of `size`."""
    seeds = dict.fromkeys(plan.seed for plan in plans)
    alike = [[plan for plan in plans if plan.seed == seed] for seed in seeds]
    return [group[start : start + size] for group in alike for start in range(0, len(group), size)]
