"""Whether the highest scores stand out from the others: a rule on the shape of the scores alone."""

from dataclasses import dataclass

import numpy as np

from ..attribution.influence import is_indifferent

FEWEST = 40  # images; of fewer the rule says nothing
LEVEL = 0.05  # how often random scores may be said to hold an image that stands out
MIRROR = 3  # how much farther above the median than the lowest score lies below it
GAP_MIRROR = 5  # how much wider than the widest gap among the lowest scores
WEAK = "The order is weak evidence."  # on the page and on screen
CLEARLY, GAP_CLEARLY = 1.5, 2  # times the bound, from the median; times the gap of chance


@dataclass(frozen=True)
class StandingOut:
    """What the shape of the scores says of the highest ones."""

    count: int  # how many images stand out
    bound: float | None  # the score from which an image does; None: it cannot be told
    clarity: float = 0.0  # how far out the first is, or how wide the gap; 1: as chance rarely is
    by_gap: bool = False  # as a group, by the gap below them
    is_tied: bool = False  # all images have one score
    is_calibrated: bool = False  # by queries of models that never saw the images


@dataclass(frozen=True)
class Tail:
    """The highest tenth of the scores, as an exponential whose spread its lower half tells, so that
    those that stand out do not widen it."""

    num_upper: int  # how many scores lie above that lower half
    start: float  # the highest of the lower half
    spread: float
    factor: float  # spreads from `start` that the highest score passes with probability LEVEL / 2


def measure_tail(falling: np.ndarray) -> Tail:
    """The Tail of falling scores, [n], n >= FEWEST.

    For an exponential tail the level is exact: the spread is a gamma variable, independent of what
    lies above (Rényi's spacings, type II censoring). Where scores fall faster, as a normal
    distribution's, `factor` is passed more rarely.
    """
    num_tail = int(np.clip(len(falling) // 10, 20, 200))
    num_lower = num_tail // 2
    num_upper = num_tail - num_lower
    excess = falling[num_upper:num_tail] - falling[num_tail]
    spread = (excess.sum() + num_upper * excess[0]) / num_lower
    factor = num_lower * ((num_upper / (LEVEL / 2)) ** (1 / num_lower) - 1)
    return Tail(num_upper, float(falling[num_upper]), float(spread), float(factor))


def weigh_gaps(falling: np.ndarray, count: int) -> np.ndarray:
    """Gaps below the first, second, ... score, each times its number: of an exponential tail they
    all have one distribution, with the tail's spread for mean. Source: Rényi's spacings."""
    return np.arange(1, count + 1) * -np.diff(falling[: count + 1])


def find_far(falling: np.ndarray, tail: Tail) -> StandingOut:
    """The images whose scores are farther out than the tail leads one to expect, and at least
    MIRROR times as far above the median as the lowest score lies below it."""
    median = float(np.median(falling))
    mirrored = median + MIRROR * (median - float(falling[-1]))
    bound = max(tail.start + tail.factor * tail.spread, mirrored)
    if not bound > median:  # most scores are equal
        return StandingOut(0, None)
    clarity = (float(falling[0]) - median) / (bound - median)
    return StandingOut(int((falling > bound).sum()), bound, clarity)


def find_parted(falling: np.ndarray, tail: Tail) -> StandingOut:
    """The images above the lowest gap that is wider than the tail leads one to expect, and at least
    GAP_MIRROR times as wide as any among the lowest scores."""
    gaps = weigh_gaps(falling, tail.num_upper)
    expected = max(
        tail.factor * tail.spread,
        GAP_MIRROR * float(weigh_gaps(-falling[::-1], tail.num_upper).max()),
    )
    wide = np.flatnonzero(gaps > expected)
    if not len(wide) or expected <= 0:
        return StandingOut(0, None)
    last = int(wide[-1])
    middle = float(falling[last] + falling[last + 1]) / 2
    return StandingOut(last + 1, middle, float(gaps[last] / expected), by_gap=True)


def find_standing_out(scores: np.ndarray) -> StandingOut:
    """Which scores are not like the others: those that lie far out each by itself or, where none
    does, a group that a wide gap parts from the rest.

    Both are measured against the fall-off of the scores below, and against the low end, for what
    only scatters does so to both sides. Of random scores (normal, uniform, Laplace, exponential,
    Student's t with 3 degrees of freedom) at most about LEVEL of the rankings are said to hold such
    an image. Tails that are heavier still, and to one side only, can deceive it.
    scores: float [n], finite, in any order.
    """
    falling = np.sort(np.asarray(scores, np.float64))[::-1]
    if len(falling) and is_indifferent(falling):
        return StandingOut(0, None, is_tied=True)
    if len(falling) < FEWEST:
        return StandingOut(0, None)
    tail = measure_tail(falling)
    far = find_far(falling, tail)
    parted = find_parted(falling, tail)
    return parted if parted.count and not far.count else far


def describe_standing_out(
    found: StandingOut, num_images: int, is_doubtful: bool = False
) -> tuple[str, str]:
    """(headline, explanation) in plain words. is_doubtful: there are reasons why the scores may mean
    little, whatever their shape."""
    if found.is_tied:
        return (
            "All images have the same score.",
            "Such scores say nothing about which image mattered.",
        )
    if num_images < FEWEST:
        return (
            f"With {num_images} images it cannot be told whether one stands out.",
            f"{WEAK} The rule that tells it needs at least {FEWEST} images.",
        )
    if not found.count and found.is_calibrated:
        return (
            f"None of the {num_images:,} images stands out.",
            "Images that a model never saw have such scores too, or the model explains the first "
            f"image worse than the picture, as one that it never saw. {WEAK}",
        )
    if not found.count:
        return (
            f"None of the {num_images:,} images stands out.",
            f"The highest scores are no higher than the others lead one to expect of chance. {WEAK}",
        )
    who = (
        f"One of {num_images:,} images stands"
        if found.count == 1
        else f"{found.count:,} of {num_images:,} images stand"
    )
    explanation = explain_shape(found)
    if is_doubtful:
        return f"{who} out, but the result may mean little.", f"By the scores alone: {explanation}"
    headline = f"{who} out, but narrowly."
    if found.clarity >= (GAP_CLEARLY if found.by_gap else CLEARLY):
        headline = f"{who} out clearly."
    elif found.by_gap and found.count > 1:
        headline = f"{who} out as a group."
    return headline, explanation


def explain_shape(found: StandingOut) -> str:
    """What of the plot says that the first images stand out, in a sentence."""
    if found.is_calibrated:
        return (
            f"Images that a model never saw rarely pass the dashed line; the first lies "
            f"{format_times(found.clarity)} as far out."
        )
    if found.by_gap:
        parted = "it" if found.count == 1 else "them"
        return (
            f"The gap at the dashed line parts {parted} from the others; chance alone rarely leaves "
            f"one so wide."
        )
    return (
        f"Chance alone rarely passes the dashed line; the first lies "
        f"{format_times(found.clarity)} as far out."
    )


def format_times(number: float) -> str:
    """A multiple, in words."""
    return f"{number:.1f} times" if number < 9.95 else f"{number:,.0f} times"
