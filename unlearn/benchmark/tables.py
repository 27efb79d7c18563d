"""A benchmark's tables on screen."""

from collections.abc import Sequence

from ..evaluation.metrics import markdown_table


def format_row(row: dict, sizes: Sequence[str]) -> list[str]:
    """A procedure's cells."""
    if "samples_per_second" not in row:
        return [row["procedure"], *[""] * (7 + 2 * len(sizes)), row["note"]]
    peak = row["peak_device_bytes"] or row["peak_host_bytes"]
    target = row["load_seconds"] + sum(row["at_target_images"].values())
    found = [row["fidelity"][size] for size in sizes]
    return [
        row["procedure"],
        f"{row['samples_per_second']:,.1f}",
        f"{row['load_seconds']:.2f}",
        f"{row['unlearn_seconds']:.2f}",
        f"{row['score_seconds']:.2f}",
        f"{row['share_of_ceiling']:.1%}",
        f"{peak / 1e6:,.0f}" if peak else "",
        *(
            text
            for fidelity in found
            for text in (
                f"{fidelity['spearman']:.4f}",
                f"{fidelity['in_top']:.1f} of {fidelity['top']}",
            )
        ),
        f"{target:,.1f}",
        row["note"],
    ]


def procedures_table(rows: Sequence[dict], target_images: int) -> list[str]:
    """Lines of speed, cost and fidelity, a row a procedure."""
    sizes = list(next((row["fidelity"] for row in rows if "fidelity" in row), {}))
    header = [
        "procedure",
        "samples/s",
        "load s",
        "unlearn s",
        "score s",
        "of ceiling",
        "peak MB",
        *(text for size in sizes for text in (f"Spearman {size}", f"top {size}")),
        f"s a query at {target_images:,}",
        "note",
    ]
    return markdown_table(header, [format_row(row, sizes) for row in rows])


def draws_table(rows: Sequence[dict]) -> list[str]:
    """Lines of how far unlearning with so many draws is from many published ones."""
    header = [
        "draws",
        "s a query",
        "cosine",
        "relative error",
        "cosine, published draws",
        "relative error, published draws",
    ]
    cells = [
        [
            f"{row['draws']:,}",
            f"{row['seconds']:.1f}",
            *(
                f"{row[kind][measure]:.4f}"
                for kind in ("ours", "published")
                for measure in ("cosine", "relative_error")
            ),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def scaling_table(rows: Sequence[dict]) -> list[str]:
    """Lines of seconds and memory with the number of images."""
    kinds, units = ("exact", "gradient"), ("s", "us a sample", "peak host MB")
    header = ["images", "timesteps", *(f"{kind} {unit}" for kind in kinds for unit in units)]
    cells = [
        [
            f"{row['num_images']:,}",
            str(row["timesteps"]),
            *(
                text
                for kind in kinds
                for text in (
                    f"{row[kind]['seconds']:.1f}",
                    f"{row[kind]['microseconds_a_sample']:.0f}",
                    f"{(row[kind]['peak_host_bytes'] or 0) / 1e6:,.0f}",
                )
            ),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def print_tables(report: dict, target_images: int) -> None:
    """Prints the rows, and draws and scaling where they were measured."""
    tables = [procedures_table(report["rows"], target_images)]
    if report["draws"]:
        tables.append(draws_table(report["draws"]))
    if report["scaling"]:
        tables.append(scaling_table(report["scaling"]))
    print("\n\n".join("\n".join(lines) for lines in tables))
