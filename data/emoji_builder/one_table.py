"""All that was measured of the methods, in one table, from committed files.

    python -m data.emoji_builder.one_table

Reads results/evidence: LDS of both worlds, leave-K-out and never-trained twins of data/emoji_shared, exemplars
of data/emoji, and what `tasks/method_costs.py` measured.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from unlearn.evaluation.metrics import format_mean, markdown_table, mean_and_error

EVIDENCE = Path("results/evidence")
METHODS = ("ours", "output", "removal", "das", "dtrak", "similarity")
TITLES = {"ours": "ours, as published", "removal": "removal", "das": "DAS", "dtrak": "D-TRAK"}
REMOVAL_DRAWS = {"emoji_shared": "removal-four-draws"}  # of the default; `removal` there has one
PASSES = {  # forward (F) and backward (B) passes of an image: 2 views at 10 timesteps; removal 4 draws
    "ours": "20 F once, 20 F a query",
    "output": "40 F a query",
    "removal": "4 F, 8 B once",
    "das": "20 F, 20 B once",
    "dtrak": "20 F, 20 B once",
    "similarity": "none",
}
NOT_MEASURED = ""


def read(name: str) -> list[dict[str, str]]:
    """The rows of a file of the evidence."""
    with (EVIDENCE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def by_method(name: str, **fixed: str) -> dict[str, dict[str, str]]:
    """Rows by method, of those with fixed entries."""
    rows = read(name)
    return {row["method"]: row for row in rows if fixed.items() <= row.items()}


def own_row(rows: dict[str, dict[str, str]], method: str, world: str) -> dict[str, str]:
    """A method's row, of removal that of the default's draws."""
    return rows[REMOVAL_DRAWS.get(world, method) if method == "removal" else method]


def lds(world: str, kind: str) -> Callable[[str], str]:
    """LDS of a method in a world, "" or "powered_", with the power."""
    rows = by_method(f"{world}/lds.csv")

    def find(method: str) -> str:
        row = own_row(rows, method, world)
        power = f" ({float(row['power']):g})" if kind else ""
        return f"{float(row[f'{kind}lds']):.3f}{power}"

    return find


def beyond(world: str, what: str) -> Callable[[str], str]:
    """LDS beyond something, after the power."""
    rows = by_method(f"{world}/lds_beyond.csv")

    def find(method: str) -> str:
        is_itself = (method, what) == ("similarity", "beyond_similarity")
        return NOT_MEASURED if is_itself else f"{float(own_row(rows, method, world)[what]):.3f}"

    return find


def left_out(k: int) -> Callable[[str], str]:
    """Rise of a query's loss without the first K images, x 1000."""
    rows = by_method("emoji_shared/leave_k_out.csv", k=str(k))

    def find(method: str) -> str:
        if method not in rows:
            return NOT_MEASURED
        mean, error = (1e3 * float(rows[method][name]) for name in ("dL", "dL_error"))
        return f"{mean:.1f} ± {error:.1f} ({rows[method]['queries']})"

    return find


def twins() -> Callable[[str], str]:
    """AUC of trained over never-trained twins."""
    rows = by_method("emoji_shared/never_trained.csv")

    def find(method: str) -> str:
        if method not in rows:
            return NOT_MEASURED
        return format_mean(float(rows[method]["auc"]), float(rows[method]["error"]))

    return find


def exemplars(metric: str, column: str) -> Callable[[str], str]:
    """Recall@10 or mAP of the exemplars of data/emoji, of removal with its other settings there."""
    published = by_method("emoji/evaluate.csv", group="all", metric=metric)
    others: dict[str, list[float]] = {}
    for row in read("emoji/other_scoring.csv"):
        others.setdefault(row["scoring"], []).append(float(row[column]))
    spread = [name for name in others if name.startswith("removal") and "five" in name]

    def find(method: str) -> str:
        if method == "ours":
            row = published[method]
            return format_mean(float(row["mean"]), float(row["standard_error"]))
        name = spread[0] if method == "removal" else method
        if name not in others:
            return NOT_MEASURED
        return format_mean(*mean_and_error(np.array(others[name])))

    return find


def cost(column: str, unit: float = 1.0, digits: int = 1) -> Callable[[str], str]:
    """What `tasks/method_costs.py` measured."""
    rows = by_method("speed/methods.csv")
    return lambda method: f"{float(rows[method][column]) / unit:,.{digits}f}"


def main() -> None:
    """Prints the table, a column a method."""
    lines: dict[str, Callable[[str], str]] = {
        "LDS, `emoji_small`": lds("emoji_small", ""),
        "after the power": lds("emoji_small", "powered_"),
        "beyond its top image": beyond("emoji_small", "beyond_top_image"),
        "beyond similarity": beyond("emoji_small", "beyond_similarity"),
        "LDS, `emoji_shared`": lds("emoji_shared", ""),
        "after the power ": lds("emoji_shared", "powered_"),
        "beyond its top image ": beyond("emoji_shared", "beyond_top_image"),
        "beyond similarity ": beyond("emoji_shared", "beyond_similarity"),
        "without its first 3 images, rise (queries)": left_out(3),
        "without its first 12": left_out(12),
        "trained over never-trained twins, AUC": twins(),
        "exemplars, Recall@10": exemplars("Recall@10", "Recall@10"),
        "exemplars, mAP": exemplars("mAP", "AP"),
        "passes an image": PASSES.__getitem__,
        "seconds once, 362 images": cost("seconds_once"),
        "seconds a query": cost("seconds_a_query"),
        "KB kept of an image": cost("bytes_an_image", 1e3),
    }
    cells = [[label.strip(), *map(find, METHODS)] for label, find in lines.items()]
    header = ["", *(TITLES.get(name, f"`{name}`") for name in METHODS)]
    print("\n".join(markdown_table(header, cells)))


if __name__ == "__main__":
    main()
