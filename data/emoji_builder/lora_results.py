"""Compares the scores of data/emoji_lora's queries with LoRA fine-tuned again without some images.

    python -m data.emoji_builder.lora_results

Reads what tasks/score_emoji_lora.sh and tasks/retrain_emoji_lora.sh wrote, scores that are not there
from the last scores.json; writes
results/evidence/emoji_lora/{scores.json,table.json} and prints the table. For each query of a folder,
of a method: the rank correlation of its scores with the rise of the query's loss without each image
(leave-one-out), of sums of its scores with the loss under random halves (LDS), how often the image
whose loss rises most is first, and which part of the planted images that made the picture it has
among as many of the first.
"""

import base64
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from unlearn.attribution.influence import rank_images
from unlearn.evaluation.datamodels import datamodeling_scores, spearman
from unlearn.storage.reading import read_json

from .lora import TARGET

RESULTS, EVIDENCE = Path("results/emoji_lora"), Path("results/evidence/emoji_lora")
METHODS = {
    "ours": "influence",
    "removal": "by_removal/influence",
    **{
        name: f"baselines/{name}"
        for name in ("influence", "dtrak", "similarity", "text", "vae", "pixel", "random")
    },
}
MEASURES = ("leave-one-out", "first", "LDS", "planted")


def read_scores(folder: str, task: dict, known: dict) -> dict[str, list[float]]:
    """A query's scores by method, of those methods that are there; known: those of the last time,
    which stand where results do not."""
    name = task["synth_image_path"].removeprefix("synth/")
    found = dict(known.get(folder, {}).get(Path(name).with_suffix("").as_posix(), {}))
    for method, place in METHODS.items():
        path = RESULTS / folder / place / name / "influence.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                found[method] = [float(f"{value:.6g}") for value in file["influence"]]
    return found


def read_models(folder: str, kind: str) -> tuple[np.ndarray, list[dict]]:
    """Models of a folder: which images each has seen, [models, N] bool, and the queries' losses."""
    members, losses = [], []
    for path in sorted((EVIDENCE / folder / kind).glob("*.json")):
        record = read_json(path)
        count = record["identity"]["num_images"]
        bits = np.frombuffer(base64.b64decode(record["identity"]["members"]), np.uint8)
        members.append(np.unpackbits(bits)[:count].astype(bool))
        losses.append(record["losses"])
    return np.array(members), losses


def list_planted(folder: str, task: dict) -> list[int]:
    """Rows of the spoiled images that a query's prompt calls by their caption; of marked ones none
    can be called."""
    root = TARGET / folder
    lines = (root / "laion_subset/metadata.jsonl").read_text().splitlines()
    spoiled = read_json(root / "spoiled.json")
    return [
        row
        for row, entry in enumerate(map(json.loads, lines))
        if spoiled.get(entry["file_name"]) in ("copy", "caption")
        and entry["text"] == task["prompt"]
    ]


def measure(
    scores: np.ndarray,
    rises: np.ndarray,
    halves: np.ndarray,
    losses: np.ndarray,
    planted: list[int],
) -> dict[str, float]:
    """What one method's scores of a query are worth. rises: of the loss without each image, [N];
    halves: [models, N]; losses: [models]."""
    found = {}
    order = rank_images(scores)
    if len(rises):
        found["leave-one-out"] = spearman(scores[None], rises[None])[0]
        found["first"] = float(order[0] == np.argmax(rises))
    if len(halves):
        found["LDS"] = datamodeling_scores(scores[None], halves, losses[None])[0]
    if planted:
        found["planted"] = np.isin(order[: len(planted)], planted).mean()
    return {name: float(value) for name, value in found.items()}


def measure_folder(folder: str, known: dict) -> tuple[dict, dict]:
    """Scores and measures of a folder's queries: ({query: {method: scores}}, {method: {measure:
    [queries]}}). known: scores of the last time."""
    tasks = read_json(Path(f"tasks/emoji_lora/{folder}.json"))
    each, each_losses = read_models(folder, "each")
    halves, half_losses = read_models(folder, "halves")
    is_half = halves.sum(axis=1) < halves.shape[1] if len(halves) else np.zeros(0, bool)
    full = [losses for losses, half in zip(half_losses, is_half) if not half]
    scores, values = {}, defaultdict(lambda: defaultdict(list))
    for task in tasks:
        name = Path(task["synth_image_path"]).with_suffix("").as_posix().removeprefix("synth/")
        scores[name] = read_scores(folder, task, known)
        rises = np.zeros(0)
        if len(each) and full:
            left_out = np.argmin(each, axis=1)
            rises = np.full(each.shape[1], np.nan)
            rises[left_out] = [losses[name] - full[0][name] for losses in each_losses]
            rises = rises if np.isfinite(rises).all() else np.zeros(0)
        own = [losses[name] for losses, half in zip(half_losses, is_half) if half]
        for method, array in scores[name].items():
            found = measure(
                np.array(array),
                rises,
                halves[is_half],
                np.array(own),
                list_planted(folder, task),
            )
            for kind, value in found.items():
                values[method][kind].append(value)
    return scores, values


def is_complete(scores: dict[str, dict], values: dict) -> bool:
    """Whether every query of a folder has scores of all methods and all measures: methods are
    compared on the same queries alone."""
    has_all = all(found.keys() == METHODS.keys() for found in scores.values())
    return has_all and len(values["removal"]["first"]) == len(scores)


def summarise(values: list[dict]) -> dict[str, dict[str, list]]:
    """{method: {measure: [mean, standard error, queries]}} over the queries of some folders."""
    table = {}
    for method in METHODS:
        table[method] = {}
        for kind in MEASURES:
            several = [value for each in values for value in each[method][kind]]
            several = [value for value in several if np.isfinite(value)]
            if len(several) > 1:
                error = float(np.std(several, ddof=1) / len(several) ** 0.5)
                table[method][kind] = [round(float(np.mean(several)), 4), round(error, 4)]
                table[method][kind].append(len(several))
    return table


def show(table: dict) -> None:
    """Prints a table."""
    print("| method | " + " | ".join(MEASURES) + " |\n|" + " --- |" * (1 + len(MEASURES)))
    for method in METHODS:
        found = table[method]
        cells = [
            f"{found[kind][0]:.3f} ± {found[kind][1]:.3f}" if kind in found else ""
            for kind in MEASURES
        ]
        print(f"| {method} | " + " | ".join(cells) + " |")


def main():
    """Writes scores and table, of the tuning folders and of the reported ones."""
    split, scores, tables = read_json(TARGET / "folders.json"), {}, {}
    kept = EVIDENCE / "scores.json"
    known = read_json(kept) if kept.exists() else {}
    for kind, folders in split.items():
        measured = {}
        for folder in folders:
            found, values = measure_folder(folder, known)
            if is_complete(found, values):
                scores[folder], measured[folder] = found, values
        tables[kind] = {"folders": list(measured), **summarise(list(measured.values()))}
        print(f"\n{kind}: {', '.join(measured) or 'none is complete'}")
        show(tables[kind])
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(scores) + "\n")
    (EVIDENCE / "table.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
