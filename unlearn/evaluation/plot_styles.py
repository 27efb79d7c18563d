"""How plots look."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .scores import OURS, RANDOM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Look = Mapping[str, tuple[str, str]]  # colour and marker by method

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


def style_methods(methods: Iterable[str]) -> Look:
    """Colour and marker by method: the same method looks the same in every plot."""
    others = sorted(method for method in methods if method not in (OURS, RANDOM))
    look = {
        method: (OTHERS[place % len(OTHERS)], MARKERS[place % len(MARKERS)])
        for place, method in enumerate(others)
    }
    return {OURS: (BLUE, "o"), RANDOM: (GREY, "o"), **look}


def label_rows(axes: "Axes", labels: Sequence[str]) -> None:
    """Names at the rows 0, 1, ... of a horizontal plot, without the axis' line."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
