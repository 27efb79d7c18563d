"""Which models `retrain` is to train: their names, and which images each may see."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..attribution.influence import is_undecided
from ..datasets.training_sets import TrainingSet
from ..errors import UserError
from ..evaluation.rankings import count_warnings
from ..evaluation.scores import RANDOM
from ..runtime.programs import log
from .batches import random_members
from .rankings import MethodRanking
from .sets import Sets, find_rows


@dataclass(frozen=True)
class PlanSettings:
    """Which models are trained."""

    kind: str  # one of PLANS
    seeds: tuple[int, ...] = (0,)  # of weights and batches; all kinds but full take the first
    first: int = 0  # number of the first random model
    count: int = 1  # of random models, of each K
    fraction: float = 0.5  # of the images that a random subset keeps
    top_k: tuple[int, ...] = ()  # images left out
    sets: Sets = ()
    together: int = 1  # queries whose top K leave at once


@dataclass(frozen=True, eq=False)
class Plan:
    """One model to be trained: its name, seed and images, and whose images were left out, for
    `evaluate`."""

    name: str
    kind: str  # full, subset, without or together
    seed: int
    members: np.ndarray  # [N] bool
    removed: dict | None  # method, query (together: queries and their number asked for) and k


def check_count(flag: str, value: int, largest: int, item: str) -> None:
    """Raises UserError where so many images cannot be removed or kept."""
    if not 1 <= value < largest:
        raise UserError(
            f"{flag} {value}: expected 1 to {largest - 1}, fewer than the {largest} {item}"
        )


def seed_suffix(seed: int) -> str:
    """What a model's name says of a seed other than 0."""
    return f"-seed{seed}" if seed else ""


def plan_full(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """Full models, one a seed."""
    return [
        Plan(f"full-seed{seed}", "full", seed, np.ones(len(training_set), bool), None)
        for seed in settings.seeds
    ]


def plan_subsets(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """Models of random subsets, `fraction` of the images each."""
    count, kept = len(training_set), round(len(training_set) * settings.fraction)
    check_count(f"--fraction {settings.fraction}: images kept:", kept, count, "training images")
    prefix = "half" if settings.fraction == 0.5 else f"subset-{settings.fraction:g}"
    return [
        Plan(
            f"{prefix}-{number:03d}{seed_suffix(settings.seeds[0])}",
            "subset",
            settings.seeds[0],
            random_members(count, kept, number, training_set.name),
            None,
        )
        for number in range(settings.first, settings.first + settings.count)
    ]


def plan_each(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """As many models as images, each without one of them."""
    check_count("images left out:", 1, len(training_set), "training images")
    return [
        Plan(
            f"without-{row:04d}{seed_suffix(settings.seeds[0])}",
            "subset",
            settings.seeds[0],
            np.arange(len(training_set)) != row,
            None,
        )
        for row in range(len(training_set))
    ]


def plan_sets(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """Models without chosen images, one a set. Raises UserError where an image is not there, or
    none is left."""
    plans, seed = [], settings.seeds[0]
    for name, images in settings.sets:
        members = np.ones(len(training_set), bool)
        members[find_rows(training_set, name, images)] = False
        left_out = int((~members).sum())
        check_count(f"set {name}: images left out:", left_out, len(members), "training images")
        plans.append(Plan(f"set-{name}{seed_suffix(seed)}", "subset", seed, members, None))
    return plans


def plan_random(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """Models without K random images."""
    count, plans = len(training_set), []
    for k in settings.top_k:
        check_count("--top_k", k, count, "training images")
        for number in range(settings.first, settings.first + settings.count):
            members = random_members(count, count - k, number, f"{training_set.name} without {k}")
            plans.append(
                Plan(
                    f"random-k{k}-{number:03d}{seed_suffix(settings.seeds[0])}",
                    "without",
                    settings.seeds[0],
                    members,
                    {"method": RANDOM, "query": None, "k": k},
                )
            )
    return plans


def plan_without(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking]
) -> list[Plan]:
    """Models without the K most influential images of a query, or of several at once, by each
    ranking that says which they are. Raises UserError where none does."""
    rankings = list(rankings)
    decided = find_decided(rankings, settings.top_k)
    if settings.together > 1:
        return plan_together(settings, [ranking.query for ranking in rankings], decided)
    return [plan_removal(ranking, k, settings.seeds[0]) for ranking, k in decided]


def find_decided(
    rankings: Sequence[MethodRanking], numbers: Sequence[int]
) -> list[tuple[MethodRanking, int]]:
    """Rankings, each with those of the numbers of first images that its scores decide. Raises
    UserError where none does."""
    decided, undecided = [], Counter()
    for ranking in rankings:
        for k in numbers:
            check_count("--top_k", k, len(ranking.order), "training images")
            if is_undecided(ranking.scores, k):
                undecided[ranking.method, k] += 1
            else:
                decided.append((ranking, k))
    for line in count_warnings({each.path: each.warnings for each in rankings}, "rankings"):
        log.warning(line)
    asked = Counter(ranking.method for ranking in rankings)
    for (method, k), count in undecided.items():
        line = (
            f"{method}: in {count} of {asked[method]} queries the images ranked {k} and {k + 1} have "
            f"the same score; the order of the files, not {method}, would decide which are removed"
        )
        if not decided:
            raise UserError(f"{line}; give another --top_k, or leave this method out")
        log.warning(f"{line}: no models without these")
    return decided


def plan_removal(ranking: MethodRanking, k: int, seed: int) -> Plan:
    """The model without the first K images of a ranking."""
    members = np.ones(len(ranking.order), bool)
    members[ranking.order[:k]] = False
    return Plan(
        f"without-{ranking.method}-{in_name(ranking.query)}-k{k}{seed_suffix(seed)}",
        "without",
        seed,
        members,
        {"method": ranking.method, "query": ranking.query, "k": k},
    )


def in_name(query: str) -> str:
    """A query as a model's name holds it."""
    return query.replace("/", "-")


def plan_together(
    settings: PlanSettings, queries: Sequence[str], decided: Sequence[tuple[MethodRanking, int]]
) -> list[Plan]:
    """Models without the first K images of several queries, `together` of the queries a model in
    their order, which is every method's. decided: of `find_decided`; a query that a method's scores
    do not decide is not among its model's. Raises UserError where no image is left."""
    size, seed, bundles = settings.together, settings.seeds[0], {}
    order = list(dict.fromkeys(queries))
    first = {query: order[place - place % size] for place, query in enumerate(order)}
    for ranking, k in decided:
        bundles.setdefault((ranking.method, first[ranking.query], k), []).append(ranking)
    plans = []
    # By K, because a stack takes as long as the one of its models that sees the most images.
    for (method, query, k), rankings in sorted(bundles.items(), key=lambda item: item[0][2]):
        members = np.ones(len(rankings[0].order), bool)
        members[np.concatenate([ranking.order[:k] for ranking in rankings])] = False
        name = f"without-{method}-together{size}-{in_name(query)}-k{k}{seed_suffix(seed)}"
        left_out = int((~members).sum())
        check_count(f"{name}: images left out:", left_out, len(members), "training images")
        asked = [ranking.query for ranking in rankings]
        if len(set(asked)) < len(asked):
            raise UserError(
                f"{name}: would leave out the images of a query twice; give each K, folder and task "
                f"file once"
            )
        removed = {"method": method, "queries": asked, "together": size, "k": k}
        plans.append(Plan(name, "together", seed, members, removed))
    return plans


PLANS = {
    "full": plan_full,
    "subsets": plan_subsets,
    "each": plan_each,
    "sets": plan_sets,
    "random": plan_random,
    "without": plan_without,
}


def make_plans(
    settings: PlanSettings, training_set: TrainingSet, rankings: Iterable[MethodRanking] = ()
) -> list[Plan]:
    """The models of a kind; rankings: of the kind `without`. Raises UserError where two would have
    one name."""
    plans = PLANS[settings.kind](settings, training_set, rankings)
    names = [plan.name for plan in plans]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"retrain {settings.kind}: would train {twice[0]} twice; give each seed, K, folder and "
            f"task file once"
        )
    return plans


def make_stacks(plans: Sequence[Plan], size: int) -> list[list[Plan]]:
    """Plans of one seed in runs of `size`."""
    seeds = dict.fromkeys(plan.seed for plan in plans)
    alike = [[plan for plan in plans if plan.seed == seed] for seed in seeds]
    return [group[start : start + size] for group in alike for start in range(0, len(group), size)]
