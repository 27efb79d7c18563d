"""Plots of the evaluation against retrained models. matplotlib is an extra: without it there are
none."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..storage.artifacts import whole_file
from .metrics import mean_and_error
from .scores import OURS, RANDOM

# After Okabe and Ito: colour-blind readers can tell them apart, and each has a marker too. Ours and
# random always look the same.
BLUE, PALE, GREY, INK, FAINT = "#0072B2", "#a9c4d6", "#8a8a8a", "#222222", "#dddddd"
OTHERS = (
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#B8A500",
    "#44AA99",
    "#7F7F00",
)
MARKERS = "sD^vPX*<>"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}


def style_methods(methods):
    """Colour and marker by method: the same method looks the same in every plot."""
    others = sorted(method for method in methods if method not in (OURS, RANDOM))
    look = {
        method: (OTHERS[place % len(OTHERS)], MARKERS[place % len(MARKERS)])
        for place, method in enumerate(others)
    }
    return {OURS: (BLUE, "o"), RANDOM: (GREY, "o"), **look}


def label_rows(axes, labels):
    """Names at the rows 0, 1, ... of a horizontal plot, without the axis' line."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def draw_lds(plt, rows):
    """Every method's LDS with its interval, the best on top: of its scores as they are and, where
    tuning queries chose a power, after it, by which they are then sorted."""
    is_powered = rows[0][7] != ""
    rows = sorted(rows, key=lambda row: row[8] if is_powered else row[1])
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + (0.56 if is_powered else 0.42) * len(rows)))
    lines = (
        [(1, -0.17, GREY, "s", "as it is"), (8, 0.17, BLUE, "o", "after its power")]
        if is_powered
        else [(1, 0, BLUE, "o", None)]
    )
    for column, shift, color, marker, label in lines:
        for place, row in enumerate(rows):
            mean, low, high = row[column : column + 3]
            axes.plot(
                [low, high],
                [place + shift] * 2,
                color=color,
                linewidth=2.2,
                solid_capstyle="butt",
                alpha=0.7,
            )
            axes.plot(
                mean,
                place + shift,
                marker,
                color=color,
                markersize=6.5,
                label=label if place == 0 else None,
            )
            axes.annotate(
                f"{mean:.3f}",
                (high, place + shift),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
            )
    axes.axvline(0, color=INK, linewidth=0.8)
    label_rows(axes, [f"{row[0]}, power {row[7]}" if is_powered else row[0] for row in rows])
    for text, row in zip(axes.get_yticklabels(), rows):
        text.set_fontweight("bold" if row[0] == OURS else "normal")
    axes.margins(x=0.12)
    axes.grid(axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(
        f"LDS: rank correlation with {rows[0][-1]} retrained models\n({rows[0][-2]} queries; "
        f"line: 95 % interval)"
    )
    if is_powered:
        axes.legend(
            *(part[::-1] for part in axes.get_legend_handles_labels()),
            loc="lower right",
            title="sum of the scores",
        )
    return figure


def draw_curve(axes, points, method, look):
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


def random_points(curve):
    """Loss changes by number of randomly removed images, the halves among them: [n, 3] for
    `draw_curve`."""
    asked, (counts, changes, _) = curve
    pairs = [mean_and_error(row[asked]) for row in changes]
    return np.array(
        [(count, mean / 1e-3, error / 1e-3) for count, (mean, error) in zip(counts, pairs)]
    ).reshape(-1, 3)


def mark_counts(axes, counts):
    """A logarithmic axis of numbers of images with a tick at each of these, and a grid for the
    other axis."""
    axes.set_xscale("log")
    axes.set_xticks(counts, [f"{count:,.0f}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)


def draw_removals(plt, rows, curve, look):
    """Loss change and picture error against the number of removed images; random removal up to half
    of the set."""
    removed = [row for row in rows if row[1]]
    floor = next((row for row in rows if row[0] == "full, other seeds"), None)
    columns = {
        4: ("Rise of the query's loss (x1e-3)", 1e-3),
        6: ("Error of its picture made again (MSE x1e-2)", 1e-2),
    }
    columns = {
        column: value
        for column, value in columns.items()
        if any(np.isfinite(row[column]) for row in removed)
    }
    figure, panels = plt.subplots(
        1, len(columns), figsize=(1.8 + 4.6 * len(columns), 4.4), squeeze=False
    )
    for axes, (column, (title, unit)) in zip(panels[0], columns.items()):
        lines = {
            method: np.array(
                [
                    [row[1], row[column] / unit, row[column + 1] / unit]
                    for row in removed
                    if row[0] == method
                ]
            )
            for method in dict.fromkeys(row[0] for row in removed)
        }
        if column == 4 and len(curve[1][0]):
            lines[RANDOM] = random_points(curve)
        for method, points in sorted(
            lines.items(), key=lambda item: (item[0] == RANDOM, -item[1][-1, 1])
        ):
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
        mark_counts(axes, sorted({count for points in lines.values() for count in points[:, 0]}))
    figure.supxlabel(
        "training images removed (mean ± standard error over queries)", fontsize=11, color=INK
    )
    entries = sorted(
        zip(*panels[0, 0].get_legend_handles_labels()),
        key=lambda entry: entry[1].startswith("nothing"),
    )
    figure.legend(*zip(*entries), loc="outside right center")
    return figure


def draw_equivalents(plt, rows):
    """How many random images must be removed for what each method does with K: a dot with its
    interval, an arrow where no number that was tried is enough."""
    counts, most = sorted({row[1] for row in rows}), rows[0][-1]
    reach = {
        method: max(row[3] for row in rows if row[0] == method)
        for method in dict.fromkeys(row[0] for row in rows)
    }
    methods = sorted(reach, key=reach.get)
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.2 * len(rows)))
    colors = (
        [plt.get_cmap("Blues")(shade) for shade in np.linspace(0.45, 1, len(counts))]
        if len(counts) > 1
        else [BLUE]
    )
    for method, k, _, _, number, low, high, _ in rows:
        place = methods.index(method) + 0.25 * ((len(counts) - 1) / 2 - counts.index(k))
        color = colors[counts.index(k)]
        axes.plot([min(low, most), min(high, most)], [place, place], color=color, linewidth=1.6)
        axes.plot(
            min(number, most),
            place,
            marker="o" if np.isfinite(number) else ">",
            color=color,
            markersize=6,
            zorder=3,
        )
    for k, color in zip(counts, colors):
        axes.plot([], [], color=color, marker="o", label=f"K = {k:,}")
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


def write_figure(path, figure, plt):
    """Writes one figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    with whole_file(path) as file:
        file.write(image.getvalue())


def draw_plots(rows, curve, output):
    """Writes lds.png, leave_k_out.png and equivalent.png below `output`, those whose rows are
    there. rows: by the name of their CSV file; curve: (mask of the queries, (numbers, changes [n,
    queries], models)) of random removal."""
    if find_spec("matplotlib") is None:
        return print("No plots: matplotlib is not installed (pip install -e .[plots]).")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    removed = {row[0] for row in rows.get("leave_k_out", []) if row[1]}
    with matplotlib.rc_context(STYLE):
        figures = {
            "lds": rows.get("lds") and draw_lds(plt, rows["lds"]),
            "leave_k_out": removed
            and draw_removals(plt, rows["leave_k_out"], curve, style_methods(removed)),
            "equivalent": rows.get("equivalent") and draw_equivalents(plt, rows["equivalent"]),
        }
        written = [name for name, figure in figures.items() if figure]
        for name in written:
            write_figure(Path(output) / f"{name}.png", figures[name], plt)
    if written:
        print(f"Drawn: {', '.join(f'{name}.png' for name in written)}")
