"""Plots of what removing images did."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from .metrics import mean_and_error
from .plot_styles import BLUE, FAINT, GREY, INK, Look, label_rows
from .scores import OURS, RANDOM

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# mask of the queries, (numbers of randomly removed images, changes [n, queries], models)
Curve = tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]


def draw_curve(axes: "Axes", points: np.ndarray, method: str, look: Look) -> None:
    """One line: a measure, already in its unit, against K with standard errors; points [n, 3],
    those without a value left out."""
    points, (color, marker) = points[np.isfinite(points[:, 1])], look[method]
    if len(points):
        axes.errorbar(
            points[:, 0],
            points[:, 1],
            np.nan_to_num(points[:, 2]),
            color=color,
            marker=marker,
            markersize=6,
            linewidth=2.4 if method == OURS else 1.5,
            elinewidth=1,
            label=method,
            zorder=3 if method == OURS else 2,
        )


def random_points(curve: Curve) -> np.ndarray:
    """Loss changes by number of randomly removed images, the halves among them: [n, 3] for
    `draw_curve`."""
    asked, (counts, changes, _) = curve
    pairs = [mean_and_error(row[asked]) for row in changes]
    return np.array(
        [(count, mean / 1e-3, error / 1e-3) for count, (mean, error) in zip(counts, pairs)]
    ).reshape(-1, 3)


def mark_counts(axes: "Axes", counts: Sequence[float]) -> None:
    """A logarithmic axis of numbers of images with a tick at each of these, and a grid for the
    other axis."""
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,.0f}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


REMOVAL_PANELS = {  # title and unit by column of the rows
    4: ("Rise of the query's loss (x1e-3)", 1e-3),
    6: ("Error of its picture made again (MSE x1e-2)", 1e-2),
}


def removal_lines(
    rows: Sequence[tuple], column: int, unit: float, curve: Curve
) -> list[tuple[str, np.ndarray]]:
    """A measure of each method against the number of removed images, [n, 3] for `draw_curve`: by
    falling measure at the last number, random removal last."""
    lines = {
        method: np.array(
            [
                [row[1], row[column] / unit, row[column + 1] / unit]
                for row in rows
                if row[0] == method
            ]
        )
        for method in dict.fromkeys(row[0] for row in rows)
    }
    if column == 4 and len(curve[1][0]):
        lines[RANDOM] = random_points(curve)
    return sorted(lines.items(), key=lambda item: (item[0] == RANDOM, -item[1][-1, 1]))


def draw_removals(plt: ModuleType, rows: Sequence[tuple], curve: Curve, look: Look) -> "Figure":
    """Loss change and picture error against the number of removed images; random removal up to half
    of the set."""
    removed = [row for row in rows if row[1]]
    floor = next((row for row in rows if row[0] == "full, other seeds"), None)
    columns = [
        column for column in REMOVAL_PANELS if any(np.isfinite(row[column]) for row in removed)
    ]
    figure, panels = plt.subplots(
        1, len(columns), figsize=(1.8 + 4.6 * len(columns), 4.4), squeeze=False
    )
    for axes, column in zip(panels[0], columns):
        title, unit = REMOVAL_PANELS[column]
        lines = removal_lines(removed, column, unit, curve)
        for method, points in lines:
            draw_curve(axes, points, method, look)
        if floor and np.isfinite(floor[column]):
            axes.axhline(
                floor[column] / unit,
                color=GREY,
                linestyle=":",
                linewidth=1.5,
                label="nothing removed,\nanother seed",
            )
        axes.set_title(title)
        mark_counts(axes, sorted({count for _, points in lines for count in points[:, 0]}))
    figure.supxlabel(
        "training images removed (mean ± standard error over queries)", fontsize=11, color=INK
    )
    entries = sorted(
        zip(*panels[0, 0].get_legend_handles_labels()),
        key=lambda entry: entry[1].startswith("nothing"),
    )
    figure.legend(*zip(*entries), loc="outside right center")
    return figure


def draw_equivalent(axes: "Axes", row: tuple, place: float, color: str | tuple) -> None:
    """One row of `draw_equivalents`: a dot with its interval, an arrow where no number that was
    tried is enough."""
    *_, number, low, high, most = row
    axes.plot([min(low, most), min(high, most)], [place, place], color=color, linewidth=1.6)
    axes.plot(
        min(number, most),
        place,
        marker="o" if np.isfinite(number) else ">",
        color=color,
        markersize=6,
        zorder=3,
    )


def mark_most(axes: "Axes", most: int) -> None:
    """The line that no dot is beyond: the largest number of random images that was tried."""
    axes.axvline(most, color=GREY, linestyle=":", linewidth=1.5)
    axes.annotate(
        f"most tried: {most:,}",
        (most, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=10,
        color=INK,
    )


def draw_equivalents(plt: ModuleType, rows: Sequence[tuple]) -> "Figure":
    """How many random images must be removed for what each method does with K."""
    counts, most = sorted({row[1] for row in rows}), rows[0][-1]
    reach = {
        method: max(row[3] for row in rows if row[0] == method)
        for method in dict.fromkeys(row[0] for row in rows)
    }
    methods = sorted(reach, key=lambda method: reach[method])
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.2 * len(rows)))
    colors = (
        [plt.get_cmap("Blues")(shade) for shade in np.linspace(0.45, 1, len(counts))]
        if len(counts) > 1
        else [BLUE]
    )
    for row in rows:
        index = counts.index(row[1])
        place = methods.index(row[0]) + 0.25 * ((len(counts) - 1) / 2 - index)
        draw_equivalent(axes, row, place, colors[index])
    for k, color in zip(counts, colors):
        axes.plot([], [], color=color, marker="o", label=f"K = {k:,}")
    mark_most(axes, most)
    axes.set_xlim(0, most * 1.03)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    label_rows(axes, methods)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        "random images to remove for the same rise of the query's loss (line: 95 % interval)"
    )
    figure.legend(loc="outside right center")
    return figure
