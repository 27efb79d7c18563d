"""Examines environment, device, memory, disk, data root, task file and results, and says what to do
about each finding.

    python -m unlearn doctor --dataroot data/emoji --task_json tasks/emoji_demo.json
    python -m unlearn doctor --task_json tasks/all_tasks.json --result_dir /scratch/results

Writes nothing and loads no model; every result is read once and compared with its record. Ends with
status 1 where something has to be put right.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from ..runtime.printing import show
from .parsing import add_flags, make_parser


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    """The command line; a data root that is wrong is a finding, not an error."""
    parser = make_parser(__doc__, "python -m unlearn doctor")
    add_flags(parser, "dataroot", "sd_version", "lora", "weights", "laion_subset_size", "device")
    parser.add_argument("--task_json", help="task file to examine too")
    parser.add_argument(
        "--result_dir", default="results", help="folder of results (default results)"
    )
    parser.add_argument("--fisher_path", help="Fisher (default sd_fisher.* of the data root)")
    args = parser.parse_args(argv)
    args.dataroot = args.dataroot or "data/abc"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Examines one thing after the other, and prints."""
    args = parse_arguments(argv)
    # Here: they import torch and diffusers, which takes seconds.
    from ..datasets.own_root import own_root
    from ..datasets.settings import read_settings
    from .examination import examine_data, examine_tasks
    from .flags import check_names
    from .forecast import examine_needs
    from .inputs import check_training_files
    from .inventory import examine_results
    from .machine import (
        OK,
        PROBLEM,
        examine_device,
        examine_disk,
        examine_environment,
        examine_memory,
        try_out,
    )

    check_names(args)
    data, readable = examine_data(args)
    settings = read_settings(args.dataroot) if readable else None
    tasks, groups = examine_tasks(args) if args.task_json and readable else ([], {})
    sections = {
        "environment": examine_environment(),
        "device": examine_device(args.device),
        "memory": examine_memory(args.sd_version or (settings or {}).get("pipeline")),
        "disk": examine_disk(
            {"results": args.result_dir, **({"data root": args.dataroot} if readable else {})},
            {"data root": own_root(args.dataroot)} if readable else {},
            {"data root"} if readable and data[0].status == OK else (),
        ),
        "data root": data,
        "needs": examine_needs(args, settings) if settings else [],
        "tasks": tasks,
        "results": examine_results(
            args, groups, settings, try_out(check_training_files, args)[0] if readable else None
        ),
    }
    for name, findings in sections.items():
        for number, finding in enumerate(findings):
            show(f"{name if number == 0 else '':<12} {finding.status:<8} {finding.text}")
            if finding.remedy:
                show(f"{'':<12} {'':<8} -> {finding.remedy}")
    everything = [finding.status for findings in sections.values() for finding in findings]
    problems = everything.count(PROBLEM)
    notes = len(everything) - everything.count(PROBLEM) - everything.count(OK)
    print(f"\nproblems: {problems}, notes: {notes}" if problems or notes else "\nall is well")
    sys.exit(1 if problems else 0)
