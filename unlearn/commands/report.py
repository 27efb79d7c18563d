"""Makes report.html, a page to look at and to send on, from a folder of results.

    python -m unlearn report results
    python -m unlearn report results --dataroot data/abc --task_json tasks/abc.json   # older results

Writes RESULT_DIR/influence/<query>/report.html for each query and, of several, the index
RESULT_DIR/report.html. Each page is one file with small pictures in it, and works from disk.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..errors import UserError
from ..runtime.printing import show
from .parsing import make_parser

if TYPE_CHECKING:
    from ..datasets.tasks import Task


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = make_parser(__doc__, "python -m unlearn report")
    parser.add_argument(
        "result_dir", metavar="RESULT_DIR", help="the --result_dir of compute_influence.py"
    )
    parser.add_argument(
        "--dataroot", help="data root, where its pictures stand now (default: as the results say)"
    )
    parser.add_argument(
        "--task_json",
        help="task file of the queries, for results that do not hold their prompts; with "
        "--dataroot",
    )
    return parser.parse_args(argv)


def read_tasks(args: Namespace) -> "dict[str, Task]":
    """Tasks by the folder of their results, {} without a task file."""
    if args.dataroot is not None and not Path(args.dataroot).is_dir():
        raise UserError(f"--dataroot {args.dataroot}: no such folder")
    if args.task_json is None:
        return {}
    if args.dataroot is None:
        raise UserError(f"--task_json {args.task_json}: give its data root too, by --dataroot")
    from ..datasets.tasks import load_tasks

    tasks = load_tasks(args.task_json, args.dataroot)
    return {name: task for task in tasks for name in (task.query_name, task.result_name)}


def main(argv: Sequence[str] | None = None) -> None:
    """Checks every result, then writes a page for each, and their index."""
    args = parse_arguments(argv)
    # Here: they import torch, which takes seconds.
    from ..evaluation.stored_results import check_result, find_results, read_report
    from ..front.together import read_kept
    from ..report.page import index_entry, write_index, write_report
    from ..runtime.programs import progress
    from ..storage.artifacts import check_writable
    from ..storage.sharing import turn

    folder = Path(args.result_dir)
    queries, tasks = find_results(folder), read_tasks(args)
    check_writable(folder, "pages are written into the folder of results")
    for query in queries:
        with turn(folder / "influence" / query / "influence.npz"):
            check_result(folder, query)
    together, entries = read_kept(folder, queries), []
    with progress(len(queries), "writing pages", "queries") as bar:
        for query in queries:
            place = folder / "influence" / query
            with turn(place / "influence.npz"):  # a run may write it anew
                report = read_report(folder, query, args.dataroot, tasks.get(query))
                path = write_report(place, report)
            link = quote(path.relative_to(folder).as_posix())
            entries.append(index_entry(link, report))
            bar.update()
    if len(entries) > 1 or (folder / "report.html").exists():  # whose links may lead nowhere
        path = write_index(folder, entries, together)
    show(f"Page: {path}")
