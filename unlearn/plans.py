"""Which models `retrain` is to train: their names, and which images each may see."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import UserError
from .rankings import read_influence
from .training import random_members


@dataclass(frozen=True)
class Plan:
    """One model to be trained: its name, seed and images, and whose images were left out, for `evaluate`."""

    name: str
    kind: str  # full, subset or without
    seed: int
    members: np.ndarray  # [N] bool
    removed: dict | None  # method, query, k


def check_count(flag, value, largest, item):
    """Raises UserError where so many images cannot be removed or kept."""
    if not 1 <= value < largest:
        raise UserError(f"{flag} {value}: expected 1 to {largest - 1}, fewer than the {largest} {item}")


def plan_full(args, training_set, tasks):
    """Full models, one a seed."""
    return [Plan(f"full-seed{seed}", "full", seed, np.ones(len(training_set), bool), None) for seed in args.seeds]


def plan_subsets(args, training_set, tasks):
    """Models of random subsets, `--fraction` of the images each."""
    count, kept = len(training_set), round(len(training_set) * args.fraction)
    check_count(f"--fraction {args.fraction}: images kept:", kept, count, "training images")
    prefix = "half" if args.fraction == 0.5 else f"subset-{args.fraction:g}"
    return [Plan(f"{prefix}-{number:03d}", "subset", args.seeds[0], random_members(count, kept, number, training_set.name), None)
            for number in range(args.first, args.first + args.count)]


def plan_random(args, training_set, tasks):
    """Models without K random images."""
    count, plans = len(training_set), []
    for k in args.top_k:
        check_count("--top_k", k, count, "training images")
        for number in range(args.first, args.first + args.count):
            members = random_members(count, count - k, number, f"{training_set.name} without {k}")
            plans.append(Plan(f"random-k{k}-{number:03d}", "without", args.seeds[0], members, {"method": "random", "query": None, "k": k}))
    return plans


def plan_without(args, training_set, tasks):
    """Models without the K most influential images of a query, by each method's influence file."""
    plans = []
    for folder in map(Path, args.influence):
        method = "ours" if folder.name == "influence" and folder.parent.name != "baselines" else folder.name
        for task in tasks[:args.num_queries]:
            path = folder / task.result_name / "influence.npz"
            arrays = read_influence(path, "make it: compute_influence.py or python -m unlearn baselines")
            if arrays["ids"].tolist() != training_set.ids:
                raise UserError(f"{path}: ranks other images ({len(arrays['ids'])}, first {arrays['ids'][0]}) than this training set "
                                f"({len(training_set)}, first {training_set.ids[0]}); give the --dataroot and subset it was made with")
            for k in args.top_k:
                check_count("--top_k", k, len(training_set), "training images")
                members = np.ones(len(training_set), bool)
                members[arrays["rank"][:k]] = False
                name = f"without-{method}-{task.result_name.replace('/', '-')}-k{k}"
                plans.append(Plan(name, "without", args.seeds[0], members, {"method": method, "query": task.result_name, "k": k}))
    return plans


PLANS = {"full": plan_full, "subsets": plan_subsets, "random": plan_random, "without": plan_without}
