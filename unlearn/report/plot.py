"""The plot of all scores as shapes of an SVG picture: where bars, dots and ticks stand."""

import math

import numpy as np

WIDTH, HEIGHT, AXIS = 720, 200, 168  # of the picture; AXIS: where the bars stand
LEFT, RIGHT = 56, 16  # margins; the numbers of images stand in the left one
TOP = 12  # highest point of a bar
NUM_BINS = 90
LABEL_GAP = 22  # between two numbers of marked images


def nice_step(width: float, most: int = 5) -> float:
    """The smallest of 1, 2, 5, 10, ... of which at most `most` fit into `width`."""
    power = 10.0 ** math.floor(math.log10(width / most))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= width)


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two scores."""
    step = nice_step(high - low)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def plot_scores(scores: np.ndarray, num_marked: int, bound: float | None) -> dict | None:
    """Shapes of a histogram of all scores, heights on a logarithmic scale with round numbers as
    levels, and the highest `num_marked` as dots. None where all scores are equal. scores: float [n],
    falling."""
    low, high = float(scores[-1]), float(scores[0])
    if not high > low:
        return None

    def across(score):
        return round(LEFT + (score - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    counts, edges = np.histogram(scores, NUM_BINS, (low, high))
    scale = (AXIS - TOP) / math.log1p(counts.max())
    numbers = [10**power for power in range(len(str(counts.max())))]
    if len(numbers) == 1:  # a single number would give no scale
        numbers = [number for number in (1, 2, 5) if number <= counts.max()]
    bars = [
        {
            "x": across(edge),
            "width": round((WIDTH - LEFT - RIGHT) / NUM_BINS - 1, 1),
            "height": round(max(3.0, scale * math.log1p(count)), 1),
        }
        for edge, count in zip(edges, counts)
        if count
    ]
    dots, last = [], float("inf")
    for rank, score in enumerate(scores[:num_marked], 1):
        x = across(score)
        is_named = last - x >= LABEL_GAP
        last = x if is_named else last
        dots.append({"x": x, "rank": rank, "is_named": is_named})
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "axis": AXIS,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "levels": [
            {"y": round(AXIS - scale * math.log1p(count), 1), "text": f"{count:,}"}
            for count in numbers
        ],
        "bars": bars,
        "dots": dots,
        "ticks": [
            {"x": across(tick), "text": f"{tick:.6g}".replace("-", "−")}
            for tick in round_ticks(low, high)
        ],
        "bound": across(bound) if bound is not None and low < bound < high else None,
    }
