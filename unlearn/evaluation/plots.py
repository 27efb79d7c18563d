"""Plots of the evaluation against retrained models. matplotlib is an extra: without it there are
none."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ..storage.artifacts import whole_file
from .plot_styles import BLUE, FAINT, GREY, INK, STYLE, label_rows, style_methods
from .removal_plots import Curve, draw_equivalents, draw_removals
from .scores import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_interval(
    axes: "Axes",
    numbers: tuple[float, float, float],
    place: float,
    color: str,
    marker: str,
    label: str | None,
) -> None:
    """One line of `draw_lds`: mean, low and high."""
    mean, low, high = numbers
    axes.plot(
        [low, high], [place] * 2, color=color, linewidth=2.2, solid_capstyle="butt", alpha=0.7
    )
    axes.plot(mean, place, marker, color=color, markersize=6.5, label=label)
    axes.annotate(
        f"{mean:.3f}",
        (high, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
    )


def draw_lds(plt: ModuleType, rows: Sequence[tuple]) -> "Figure":
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
            numbers, named = row[column : column + 3], label if place == 0 else None
            draw_interval(axes, numbers, place + shift, color, marker, named)
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


def write_figure(path: Path, figure: "Figure", plt: ModuleType) -> None:
    """Writes one figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    plt.close(figure)
    with whole_file(path) as file:
        file.write(image.getvalue())


def draw_plots(rows: Mapping[str, Sequence[tuple]], curve: Curve | None, output: str) -> None:
    """Writes lds.png, leave_k_out.png and equivalent.png below `output`, those whose rows are
    there. rows: by the name of their CSV file; curve: (mask of the queries, (numbers, changes [n,
    queries], models)) of random removal."""
    if find_spec("matplotlib") is None:
        print("No plots: matplotlib is not installed (pip install -e .[plots]).")
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    removed = {row[0] for row in rows.get("leave_k_out", []) if row[1]}
    with matplotlib.rc_context(cast(Any, STYLE)):  # the stubs want each key's own type
        figures = {
            "lds": rows.get("lds") and draw_lds(plt, rows["lds"]),
            "leave_k_out": removed
            and curve is not None
            and draw_removals(plt, rows["leave_k_out"], curve, style_methods(removed)),
            "equivalent": rows.get("equivalent") and draw_equivalents(plt, rows["equivalent"]),
        }
        written = [name for name, figure in figures.items() if figure]
        for name in written:
            write_figure(Path(output) / f"{name}.png", figures[name], plt)
    if written:
        print(f"Drawn: {', '.join(f'{name}.png' for name in written)}")
