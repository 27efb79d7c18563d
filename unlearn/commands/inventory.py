"""What stands in a folder of results: what is complete, damaged, unfinished, claimed or left over,
and what to do about it."""

import os
import re
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..datasets.tasks import Task, find_result
from ..errors import UserError
from ..runtime.programs import progress
from ..storage.leases import EXPIRY, is_dead, read_claim
from ..storage.reading import read_json
from ..storage.records import check_content, is_complete
from .advice import index_command, influence_command, loss_command
from .machine import NOTE, OK, PROBLEM, Finding, try_out

ARTEFACTS = (".npy", ".npz", ".safetensors", ".txt")
CHUNK = re.compile(r"\d+-of-(\d+)\.(npy|sums)")
SHOWN = 3  # names in one finding


def name_some(paths: Sequence[Path]) -> str:
    """The first of some paths, and how many more there are."""
    return ", ".join(map(str, paths[:SHOWN])) + (
        f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    )


def list_files(folder: str | Path) -> tuple[dict[str, list[Path]], dict[Path, list[Path]]]:
    """Files below a folder by kind: artefacts, records, claims, parts, checkpoints and, by their
    folder, chunks."""
    found, chunks = defaultdict(list), defaultdict(list)
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in sorted(names)):
            hidden = path.parent.name.startswith(".")
            if path.suffix in (".part", ".claim"):
                found[path.suffix[1:]].append(path)
            elif CHUNK.fullmatch(path.name) and (hidden or path.parent.name.startswith("shards-")):
                chunks[path.parent].append(path)
            elif path.suffix == ".checkpoint":
                found["checkpoint"].append(path)
            elif path.suffix == ".json":
                found["record"].append(path)
            elif path.suffix in ARTEFACTS and not hidden:
                found["artefact"].append(path)
    return found, chunks


def check_artefacts(paths: Sequence[Path]) -> tuple[int, list[Finding], list[Path]]:
    """Reads every complete artefact once: (how many are whole, the problems of the others, those
    without a record)."""
    complete = [path for path in paths if is_complete(path)]
    bare = [path for path in paths if not is_complete(path)]
    problems = []
    with progress(len(complete), "reading results", "files") as bar:
        for path in complete:
            problem = try_out(
                check_content, path, "make it anew: the same command with --overwrite"
            )[1]
            problems += filter(None, [problem])
            bar.update()
    return len(complete) - len(problems), problems, [path for path in bare if path.suffix != ".txt"]


def orphaned(records: Sequence[Path]) -> list[Path]:
    """Records whose artefact is not there."""

    def is_record(path):
        try:
            return (
                isinstance(record := read_json(path), dict)
                and {"identity", "circumstances", "content"} <= record.keys()
            )
        except UserError:
            return True

    return [
        path
        for path in records
        if not any(path.with_suffix(suffix).exists() for suffix in ARTEFACTS) and is_record(path)
    ]


def examine_claims(paths: Sequence[Path]) -> list[Finding]:
    """Who works on what, and which owners are gone."""
    living, gone = Counter(), []
    for path in paths:
        owner, stamp = read_claim(path) or ({}, None)
        age = time.time() - stamp[1] / 1e9 if stamp else 0
        if is_dead(owner) or age > EXPIRY:
            gone.append(path)
        else:
            living[f"{owner.get('host', 'an unknown host')}, process {owner.get('pid', '?')}"] += 1
    findings = [Finding(OK, f"{who}: at work on {count} pieces") for who, count in living.items()]
    if gone:
        findings.append(
            Finding(
                NOTE,
                f"{len(gone)} claims whose owner is gone or silent: {name_some(gone)}",
                f"none: the next run takes them over, those of other hosts after {EXPIRY} seconds",
            )
        )
    return findings


def rebuild_command(args: Namespace, folder: Path, groups: dict[str | None, list[Task]]) -> str:
    """What builds the index in `folder` again; of a model that the task file does not name, its
    task file must be given."""
    names = [
        group[0].model_name
        for group in groups.values()
        if folder.as_posix().endswith(f"/{group[0].model_name}")
    ]
    output = folder.as_posix().removesuffix(f"/{names[0]}") if names else None
    return (
        index_command(args, output=output)
        if names
        else "python -m unlearn index, with its task file and --output"
    )


def examine_leftovers(
    args: Namespace,
    found: dict[str, list[Path]],
    chunks: dict[Path, list[Path]],
    groups: dict[str | None, list[Task]],
) -> list[Finding]:
    """What runs that ended early left, which the same command goes on with."""
    findings = []
    for folder, paths in chunks.items():
        named = CHUNK.fullmatch(paths[0].name)
        total = int(named[1]) if named else len(paths)
        listing = folder.parent / "shards.txt"
        if folder.name.startswith(".") or not is_complete(listing):
            findings.append(
                Finding(
                    NOTE,
                    f"unfinished: {folder}, {len(paths)} of {total} chunks",
                    "run the same command again to go on",
                )
            )
        elif len(paths) < total:
            findings.append(
                Finding(
                    PROBLEM,
                    f"{folder}: {total - len(paths)} of its {total} shards are gone",
                    f"build it again: {rebuild_command(args, folder.parent, groups)}",
                )
            )
    if found["checkpoint"]:
        findings.append(
            Finding(
                NOTE,
                f"unfinished unlearning or training: {name_some(found['checkpoint'])}",
                "run the same command again to go on",
            )
        )
    if found["part"]:
        findings.append(
            Finding(
                NOTE,
                f"{len(found['part'])} half-written files: {name_some(found['part'])}",
                "none while a run is at work; else the next run that writes them removes them, "
                "or delete them",
            )
        )
    return findings


def examine_progress(args: Namespace, groups: dict[str | None, list[Task]]) -> list[Finding]:
    """How far a task file's models and queries have come."""
    names = {group[0].model_name: group[0].image_sets for group in groups.values()}
    losses = [
        name
        for name, sets in names.items()
        if all(
            is_complete(Path(args.result_dir) / "orig_loss" / name / f"{kind}_loss.npy")
            for kind in sets
        )
    ]
    tasks = [task for group in groups.values() for task in group]
    done = [
        task
        for task in tasks
        if is_complete(find_result(Path(args.result_dir) / "influence", task) / "influence.npz")
    ]
    return [
        Finding(
            OK if count == total else NOTE,
            f"{count} of {total} {what}",
            "" if count == total else command(args),
        )
        for count, total, what, command in (
            (len(losses), len(names), "models have cached losses", loss_command),
            (len(done), len(tasks), "queries are ranked", influence_command),
        )
    ]


def examine_settings(
    records: Sequence[Path], settings: dict, num_images: int | None
) -> list[Finding]:
    """Cached losses of the training set that compute_influence.py would refuse with this data
    root's defaults."""
    asked = {"timesteps": settings["time_samples"], "num_images": num_images, "noise_seed": 0}
    odd = defaultdict(list)
    for path in (
        path for path in records if path.name == "laion_loss.json" and "orig_loss" in path.parts
    ):
        record, problem = try_out(read_json, path)
        identity = record.get("identity") if not problem and isinstance(record, dict) else None
        if not isinstance(identity, dict):
            continue
        for field, value in asked.items():
            found = identity.get(field)
            if (len(found) if isinstance(found, list) else found) not in (value, None):
                odd[
                    f"{field} {len(found) if isinstance(found, list) else found}, by default "
                    f"{value}"
                ].append(path)
    return [
        Finding(
            NOTE,
            f"{len(paths)} models' losses were cached with {what}: {name_some(paths)}",
            "give compute_influence.py the same flags",
        )
        for what, paths in odd.items()
    ]


def examine_results(
    args: Namespace,
    groups: dict[str | None, list[Task]],
    settings: dict | None = None,
    num_images: int | None = None,
) -> list[Finding]:
    """All findings of a folder of results; of a task file's tasks by model too, and of the data
    root's defaults, where given."""
    if not Path(args.result_dir).is_dir():
        return [
            Finding(OK, f"{args.result_dir}: no such folder yet"),
            *(examine_progress(args, groups) if groups else []),
        ]
    found, chunks = list_files(args.result_dir)
    whole, problems, bare = check_artefacts(found["artefact"])
    findings = [
        Finding(OK, f"{args.result_dir}: {whole} artefacts, each as its record says"),
        *problems,
    ]
    if bare:
        findings.append(
            Finding(
                NOTE,
                f"{len(bare)} artefacts without a record, such as published ones: "
                f"{name_some(bare)}",
                "--compat abu adopts published losses; else delete them and run the same command "
                "again",
            )
        )
    if lost := orphaned(found["record"]):
        findings.append(
            Finding(
                PROBLEM,
                f"{len(lost)} records without what they describe: {name_some(lost)}",
                "delete them and run the same command again",
            )
        )
    findings += (
        examine_settings(found["record"], settings, num_images) if settings and num_images else []
    )
    return [
        *findings,
        *(examine_progress(args, groups) if groups else []),
        *examine_claims(found["claim"]),
        *examine_leftovers(args, found, chunks, groups),
    ]
