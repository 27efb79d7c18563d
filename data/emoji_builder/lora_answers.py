"""What retraining says of a fine-tuner's questions, from committed files.

    python -m data.emoji_builder.lora_answers

Reads what `lora_questions` and tasks/ask_emoji_lora.sh wrote, of the folders where it is there; prints
tables of the tuning folders and of the reported ones, and writes them to
results/evidence/emoji_lora/answers.json. Rises are of the queries' losses, x 1000; +- are standard
errors over queries.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unlearn.attribution.influence import rank_images
from unlearn.attribution.likeness import SAME
from unlearn.attribution.usage import find_unused
from unlearn.evaluation.datamodels import spearman
from unlearn.storage.reading import read_json

from .lora import TARGET
from .lora_questions import COPIED, list_copies
from .lora_results import EVIDENCE, read_models

SIGNED = ("influence", "ours", "dtrak", "signed removal", "removal", "vae", "random")
PLANTED = ("removal", "ours", "influence", "dtrak", "similarity", "text", "vae", "pixel", "random")
LOWEST = 3  # images


@dataclass(frozen=True, eq=False)
class Folder:
    """Of a folder of N images and Q queries."""

    name: str
    tasks: list[dict]
    scores: dict[str, np.ndarray]  # [Q, N] by method
    rises: np.ndarray  # [Q, N]: of the loss without each image
    other: np.ndarray | None  # the same with another seed, None where it is not there
    sets: dict[str, np.ndarray]  # rises [Q] without each set, of those that are there
    rows: dict[str, list[int]]  # of every set
    likeness: np.ndarray  # [N, N]
    latents: np.ndarray  # [N, N]: cosines

    @property
    def usage(self) -> np.ndarray:
        """Removal in the unit of each query, [Q, N]."""
        return self.scores["removal"] / self.scores["unit"][:, None]


def read_rises(folder: str, kind: str, full: dict, names: list[str]) -> dict[tuple, np.ndarray]:
    """{rows that were left out: rises [Q]} of the models of a kind."""
    members, losses = read_models(folder, kind)
    before = np.array([full[name] for name in names])
    return {
        tuple(np.flatnonzero(~seen).tolist()): np.array([found[name] for name in names]) - before
        for seen, found in zip(members, losses)
        if not seen.all()
    }


def read_full(folder: str, kind: str) -> dict | None:
    """The queries' losses under the full model that stands beside models of a kind."""
    members, losses = read_models(folder, kind)
    return next((found for seen, found in zip(members, losses) if seen.all()), None)


def read_each(folder: str, kind: str, full: dict | None, names: list[str], count: int):
    """Rises [Q, N] without each image; None where one is missing."""
    found = read_rises(folder, kind, full, names) if full else {}
    if any((row,) not in found for row in range(count)):
        return None
    return np.stack([found[(row,)] for row in range(count)], axis=1)


def open_folder(name: str, scores: dict[str, dict]) -> Folder | None:
    """A folder's scores and retrained losses; None where an image was not left out yet."""
    asked = read_json(EVIDENCE / name / "questions.json")
    tasks = read_json(Path(f"tasks/emoji_lora/{name}.json"))
    queries, count = list(scores), len(asked["files"])
    full = read_full(name, "halves")
    rises = read_each(name, "each", full, queries, count)
    if rises is None or full is None:
        return None
    trained = read_rises(name, "sets", full, queries)
    known = {
        method: np.array([scores[query][method] for query in queries])
        for method in scores[queries[0]]
    }
    known["signed removal"] = np.array([asked["signed removal"][query] for query in queries])
    known["unit"] = np.array([asked["units"][query] for query in queries])
    return Folder(
        name,
        tasks,
        known,
        rises,
        read_each(name, "each-seed1", read_full(name, "each-seed1"), queries, count),
        {
            key: trained[tuple(rows)]
            for key, rows in asked["sets"].items()
            if tuple(rows) in trained
        },
        asked["sets"],
        np.array(asked["likeness"]),
        np.array(asked["latents"]),
    )


def mean_error(values: Iterable[float]) -> list[float]:
    """[mean, standard error, number] of the finite ones of some values."""
    kept = np.array([value for value in values if np.isfinite(value)])
    error = kept.std(ddof=1) / len(kept) ** 0.5 if len(kept) > 1 else np.nan
    return [round(float(kept.mean()), 4), round(float(error), 4), len(kept)] if len(kept) else []


def separate(scores: np.ndarray, falls: np.ndarray) -> float:
    """How often an image whose absence lets the loss fall has a lower score than one whose absence
    lets it rise: 0.5 by chance; NaN where one kind is missing."""
    low, high = scores[falls], scores[~falls]
    if not len(low) or not len(high):
        return np.nan
    below = (low[:, None] < high).mean() + 0.5 * (low[:, None] == high).mean()
    return float(below)


def judge_sign(folders: list[Folder]) -> dict:
    """Whether a score's sign or its low end tells images whose absence lets a query's loss fall."""
    found: dict = {"base": mean_error(v for f in folders for v in (f.rises < 0).mean(axis=1))}
    for method in SIGNED:
        values = defaultdict(list)
        for folder in folders:
            for scores, rises in zip(folder.scores[method], folder.rises):
                values["separates"].append(separate(scores, rises < 0))
                lowest = np.argsort(scores, kind="stable")[:LOWEST]
                values["lowest fall"].append((rises[lowest] < 0).mean())
                if (scores < 0).any():
                    values["negative fall"].append((rises[scores < 0] < 0).mean())
        found[method] = {name: mean_error(few) for name, few in values.items()}
    for folder in folders:
        if folder.other is not None:
            pairs = list(zip(folder.rises, folder.other))
            found[f"other seed, {folder.name}"] = {
                "rank correlation": mean_error(spearman(a[None], b[None])[0] for a, b in pairs),
                "separates": mean_error(separate(b, a < 0) for a, b in pairs),
                "falls that fall again": mean_error(
                    (b[a < 0] < 0).mean() for a, b in pairs if (a < 0).any()
                ),
                "base": mean_error((b < 0).mean() for _, b in pairs),
            }
    return found


def judge_usage(folders: list[Folder]) -> dict:
    """What is lost without a quarter of the images: those that no query uses, random ones, and those
    that are used most."""
    found, differences = defaultdict(list), []
    for folder in folders:
        random = [rises for name, rises in folder.sets.items() if name.startswith("random")]
        if not {"low", "high"} <= folder.sets.keys() or not random:
            continue
        found["random"] += list(1e3 * np.mean(random, axis=0))
        for name in ("low", "high"):
            found[name] += list(1e3 * folder.sets[name])
        differences += list(1e3 * (folder.sets["low"] - np.mean(random, axis=0)))
        unused = find_unused(folder.usage)
        found["one unused image"] += (
            list(1e3 * folder.rises[:, unused].mean(axis=1)) if unused.any() else []
        )
        found["one other image"] += list(1e3 * folder.rises[:, ~unused].mean(axis=1))
    table = {name: mean_error(values) for name, values in found.items()}
    return {**table, "low minus random": mean_error(differences)}


def judge_likeness(folders: list[Folder]) -> dict:
    """What is lost without images that do the same, together and one at a time, of the queries that
    use them most; and which pairs are found."""
    found, pairs = defaultdict(list), defaultdict(int)
    for folder in folders:
        for name, rises in folder.sets.items():
            kind = name.split("-")[0]
            if kind not in ("copies", "alike", "pair"):
                continue
            rows = folder.rows[name]
            asked = np.argsort(-folder.usage[:, rows].sum(axis=1), kind="stable")[:3]
            found[f"{kind}, together"].append(1e3 * rises[asked].mean())
            found[f"{kind}, sum of each alone"].append(
                1e3 * folder.rises[asked][:, rows].sum(axis=1).mean()
            )
        count = len(folder.likeness)
        copied = {pair for rows in list_copies(folder.name) for pair in list_pairs(rows)}
        for pair in list_pairs(range(count)):
            pairs["copies"] += pair in copied
            pairs["copies found"] += pair in copied and folder.likeness[pair] >= SAME
            pairs["others"] += pair not in copied
            pairs["others found"] += pair not in copied and folder.likeness[pair] >= SAME
            pairs["others with latents alike"] += (
                pair not in copied and folder.latents[pair] >= SAME
            )
    others = [
        f.likeness[p]
        for f in folders
        for p in list_pairs(range(len(f.likeness)))
        if f.likeness[p] < COPIED
    ]
    return {
        **{name: mean_error(values) for name, values in found.items()},
        "pairs": {name: int(count) for name, count in pairs.items()},
        "highest likeness of others": float(max(others)),
    }


def list_pairs(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Every two of some rows, the lower first."""
    rows = sorted(rows)
    return [(first, second) for number, first in enumerate(rows) for second in rows[number + 1 :]]


def judge_planted(folders: list[Folder]) -> dict:
    """Which part of the planted images that made a picture a method has among as many of the first:
    those whose caption the query's prompt is."""
    found = defaultdict(list)
    for folder in folders:
        spoiled = read_json(TARGET / folder.name / "spoiled.json")
        lines = (TARGET / folder.name / "laion_subset/metadata.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        for number, task in enumerate(folder.tasks):
            for kind in ("copy", "caption"):
                rows = [
                    row
                    for row, entry in enumerate(entries)
                    if spoiled.get(entry["file_name"]) == kind and entry["text"] == task["prompt"]
                ]
                for method in PLANTED if rows else ():
                    first = rank_images(folder.scores[method][number])[: len(rows)]
                    found[f"{kind}, {method}"].append(float(np.isin(first, rows).mean()))
    return {name: mean_error(values) for name, values in found.items()}


JUDGES = {
    "sign": judge_sign,
    "usage": judge_usage,
    "likeness": judge_likeness,
    "planted": judge_planted,
}


def main() -> None:
    """Prints and writes the tables."""
    scores, tables = read_json(EVIDENCE / "scores.json"), {}
    for kind, names in read_json(TARGET / "folders.json").items():
        opened = [open_folder(name, scores[name]) for name in names if name in scores]
        folders = [folder for folder in opened if folder]
        tables[kind] = {"folders": [folder.name for folder in folders]}
        for name, judge in JUDGES.items() if folders else ():
            tables[kind][name] = judge(folders)
    print(json.dumps(tables, indent=1))
    (EVIDENCE / "answers.json").write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
