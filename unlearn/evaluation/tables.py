"""Markdown tables and CSV files of the evaluation against retrained models, from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..report.ranking import write_csv
from . import beyond_lds, bundles, lds
from .metrics import format_p, markdown_table
from .removal import MEASURES
from .scores import OURS

COLUMNS = {  # of the CSV files
    "lds": lds.COLUMNS,
    "lds_queries": lds.QUERY_COLUMNS,
    "lds_beyond": beyond_lds.COLUMNS,
    "leave_k_out": (
        "method",
        "k",
        "queries",
        "models",
        *(name + end for name in MEASURES for end in ("", "_error")),
    ),
    "leave_k_out_paired": (
        "baseline",
        "k",
        "queries",
        *(name + end for name in MEASURES for end in ("", "_error", "_p")),
    ),
    "retention": (
        "method",
        "k",
        "models",
        "own_dL",
        "others_dL",
        "others_dL_error",
        "own_mse",
        "others_mse",
        "others_mse_error",
    ),
    "equivalent": ("method", "k", "queries", "dL", "random_images", "low", "high", "most_tried"),
    "leave_k_out_together": bundles.COLUMNS,
}

UNITS = {
    "dL": 1e-3,
    "mse": 1e-2,
    "similarity": 1.0,
}  # of the tables, as in [AbU] Table 1; CSV files have plain numbers
DIGITS = {"dL": 2, "mse": 2, "similarity": 3}
SHOWN = {"dL": "dL x1e-3", "mse": "MSE x1e-2", "similarity": "similarity"}


def format_interval(mean: float, low: float, high: float) -> str:
    """`+0.123 (0.100 to 0.150)`."""
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def lds_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of the LDS of every method and of ours minus it, and of both after the powers
    that tuning queries chose."""
    show = lambda numbers: "" if numbers[0] == "" else format_interval(*numbers)
    cells = [
        [row[0], show(row[1:4]), show(row[4:7]), f"{row[7]}", show(row[8:11]), show(row[11:14])]
        for row in rows
    ]
    header = [
        "method",
        "LDS of the sum as it is (95 % interval)",
        f"{OURS} minus it",
        "power",
        "LDS after the power",
        f"{OURS} minus it",
    ]
    if rows[0][7] == "":
        header, cells = header[:3], [row[:3] for row in cells]
    return markdown_table(header, cells)


def beyond_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of the LDS of every method beyond its top image and beyond similarity."""
    show = lambda numbers: "" if numbers[0] == "" else format_interval(*numbers)
    cells = [[row[0], f"{row[1]}", show(row[2:5]), show(row[5:8])] for row in rows]
    header = ["method", "power", "beyond its top image (95 % interval)", "beyond similarity"]
    return markdown_table(header, cells)


def format_measure(mean: float, error: float, unit: float, digits: int = 2) -> str:
    """A mean with its standard error in a unit; empty where nothing was measured."""
    return (
        ""
        if mean != mean
        else f"{mean / unit:z.{digits}f}"
        + (f" ± {error / unit:.{digits}f}" if np.isfinite(error) else "")
    )


def removal_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of leave-K-out."""
    cells = [
        [
            row[0],
            *(f"{count:,}" for count in row[1:4]),
            *(
                format_measure(row[4 + 2 * place], row[5 + 2 * place], UNITS[name], DIGITS[name])
                for place, name in enumerate(MEASURES)
            ),
        ]
        for row in rows
    ]
    return markdown_table(["removed by", "K", "queries", "models", *SHOWN.values()], cells)


def paired_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of ours minus each method, with p values of Student's t test."""
    cells = [
        [
            row[0],
            f"{row[1]:,}",
            f"{row[2]:,}",
            *(
                text
                for place, name in enumerate(MEASURES)
                for mean, error, p in [row[3 + 3 * place : 6 + 3 * place]]
                for text in (format_measure(mean, error, UNITS[name], DIGITS[name]), format_p(p))
            ),
        ]
        for row in rows
    ]
    header = [
        f"{OURS} minus",
        "K",
        "queries",
        *(text for name in MEASURES for text in (SHOWN[name], "p")),
    ]
    return markdown_table(header, cells)


def retention_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of retention."""
    cells = [
        [
            row[0],
            f"{row[1]:,}",
            f"{row[2]:,}",
            format_measure(row[3], np.nan, UNITS["dL"]),
            format_measure(row[4], row[5], UNITS["dL"]),
            format_measure(row[6], np.nan, UNITS["mse"]),
            format_measure(row[7], row[8], UNITS["mse"]),
        ]
        for row in rows
    ]
    header = [
        "removed by",
        "K",
        "models",
        "own dL (absolute) x1e-3",
        "others' x1e-3",
        "own MSE x1e-2",
        "others' MSE x1e-2",
    ]
    return markdown_table(header, cells)


def format_number(number: float, most: int) -> str:
    """A number of images, `>= most` where it is infinite."""
    return f"{number:,.0f}" if np.isfinite(number) else f">= {most:,}"


def equivalent_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of the equivalent numbers of random images; `>= most` where no number that was
    tried does as much."""
    cells = [
        [
            method,
            f"{k:,}",
            format_measure(change, np.nan, UNITS["dL"]),
            format_number(number, most),
            "" if low != low else f"{format_number(low, most)} to {format_number(high, most)}",
        ]
        for method, k, _, change, number, low, high, most in rows
    ]
    return markdown_table(["removed by", "K", SHOWN["dL"], "random images", "95 % interval"], cells)


def bundle_table(rows: Sequence[tuple]) -> list[str]:
    """Markdown lines of leave-K-out of several queries at once."""
    named = [dict(zip(bundles.COLUMNS, row)) for row in rows]
    measures = "dL", "control_dL", "minus_control", "random_dL", "minus_random"
    cells = [
        [
            row["method"],
            *(f"{row[name]:,}" for name in ("k", "together", "models")),
            f"{row['left_out']:.1f}",
            *(f"{row[name]:,}" for name in ("queries", "control_queries")),
            *(format_measure(row[name], row[f"{name}_error"], UNITS["dL"]) for name in measures),
        ]
        for row in named
    ]
    header = ["removed by", "K", "queries a model", "models", "images gone", "queries"]
    header += ["with a control", f"{SHOWN['dL']}, own K gone", "control", "minus it"]
    header += ["as many random images", "minus it"]
    return markdown_table(header, cells)


TABLES = {  # title and Markdown lines, by the name of the rows
    "lds_beyond": (
        "Linear datamodeling score of what is left when a simpler answer is taken out: whether the "
        "method's own first image was there, or what similarity predicts",
        beyond_table,
    ),
    "leave_k_out": (
        "Leave-K-out: loss of the query, error and similarity of its picture made again; mean ± "
        "standard error over queries, each with a model of its own; random and full: over queries "
        "under the same models, whose own deviation is not in it",
        removal_table,
    ),
    "leave_k_out_paired": (
        "Leave-K-out, paired by query (p: Student's t test)",
        paired_table,
    ),
    "retention": (
        "Retention: change of the query that images were removed for, and of all others; mean ± "
        "standard error over models",
        retention_table,
    ),
    "equivalent": (
        "Equivalent number of random images: how many must be removed for the same dL (interval "
        "from drawing queries and models anew)",
        equivalent_table,
    ),
    "leave_k_out_together": (
        "Leave-K-out of several queries at once: a model lost the top K of all of its queries, so "
        "that more images are gone than a query's own, and the rise is not comparable to that of "
        "leave-K-out. Control: the same queries under other queries' models that kept all of their "
        "top K. Mean ± standard error over queries, those of a model counted as if each had its own",
        bundle_table,
    ),
}


def write_tables(rows: Mapping[str, Sequence[tuple]], output: str) -> None:
    """Writes a CSV file of each kind of rows; undefined numbers are empty cells."""
    for name, columns in COLUMNS.items():
        cells = [["" if cell != cell else cell for cell in row] for row in rows.get(name, [])]
        write_csv(Path(output) / f"{name}.csv", columns, cells)
    print(f"Written: {', '.join(f'{name}.csv' for name in COLUMNS)} in {output}")
