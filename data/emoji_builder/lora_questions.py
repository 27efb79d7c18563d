"""What is asked of data/emoji_lora by training again: which images scores call unused, or alike.

    python -m data.emoji_builder.lora_questions [FOLDER ...]

Reads what tasks/score_emoji_lora.sh wrote; writes, for each folder,
results/evidence/emoji_lora/FOLDER/questions.json (sets of images chosen by scores alone, the likeness
of every two images, each query's unit, removal with a sign) and results/emoji_lora/FOLDER/sets.json,
which `retrain sets` takes. What training says: `lora_answers`.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np

from unlearn import api
from unlearn.attribution.likeness import compare_images, group_alike
from unlearn.attribution.removal import own_settings
from unlearn.attribution.removal_scores import RIDGE, at_timestep, ridge_inverse
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.attribution.usage import find_unused
from unlearn.baselines.similarity import normalise
from unlearn.datasets.queries import encode_query
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import TrainingSet
from unlearn.report.ranking import name_images
from unlearn.storage.reading import read_json

from .lora import TARGET
from .lora_results import EVIDENCE, RESULTS

PAIRS, RANDOM = 3, 3  # alike and random pairs of a folder; random sets of a size
COPIED = 0.99  # likeness of copies


def open_study(folder: str) -> tuple[RemovalStudy, list[TrainingSet], list[str]]:
    """What ranked a folder's images by removal, its queries, and their names."""
    root = str(TARGET / folder)
    model = api.load_model(root, "cpu")
    images = api.open_training_set(root, model)
    place = RESULTS / folder / "by_removal/removal/base"
    study = RemovalStudy(model, {"laion": images}, place, own_settings(model))
    tasks = load_tasks(f"tasks/emoji_lora/{folder}.json", root)
    queries = [encode_query(model, task, root) for task in tasks]
    return study, queries, [task.query_name for task in tasks]


def score_signed(study: RemovalStudy, queries: np.ndarray) -> np.ndarray:
    """Removal without its square, tr(phi_q M Phi_i^T) [queries, N], which has a sign. queries:
    features [queries, timesteps, rows, size]."""
    total = 0.0
    for timestep in range(queries.shape[1]):
        blocks = partial(at_timestep, study.blocks, timestep, None)
        inverse, _ = ridge_inverse(blocks, queries.shape[-1], RIDGE)
        images = np.concatenate(list(blocks()))
        solved = [inverse(np.asarray(rows, np.float64)) for rows in queries[:, timestep]]
        total = total + np.einsum("qrs,irs->qi", np.stack(solved), images)
    return np.asarray(total)


def compare_latents(images: TrainingSet) -> np.ndarray:
    """Cosines [N, N] of the images' latents, centred."""
    flat = images.latents[0].reshape(len(images), -1).astype(np.float64)
    flat = normalise(flat - flat.mean(axis=0))
    return flat @ flat.T


def list_copies(folder: str) -> list[list[int]]:
    """Rows of the pictures that stand several times in a folder: those of one copied emoji."""
    spoiled = read_json(TARGET / folder / "spoiled.json")
    lines = (TARGET / folder / "laion_subset/metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    files = [json.loads(line)["file_name"] for line in lines]
    copied = [row for row, name in enumerate(files) if spoiled.get(name) == "copy"]
    return [
        [row for row in copied if captions[row] == caption]
        for caption in dict.fromkeys(captions[row] for row in copied)
    ]


def choose_sets(
    highest: np.ndarray, unused: np.ndarray, likeness: np.ndarray, folder: str
) -> dict[str, list[int]]:
    """Rows of the images that are left out together. highest: each image's highest score in any
    query; unused: bool; both [N]."""
    rng = np.random.default_rng([ord(letter) for letter in folder])
    count, order = len(highest), np.argsort(highest, kind="stable")
    quarter = count // 4
    sets = {"low": order[:quarter], "high": order[-quarter:], "unused": np.flatnonzero(unused)}
    for number in range(RANDOM):
        sets[f"random-{number}"] = rng.choice(count, quarter, replace=False)
    upper = [(first, second) for first in range(count) for second in range(first + 1, count)]
    others = [pair for pair in upper if likeness[pair] < COPIED]
    alike = sorted(others, key=lambda pair: -likeness[pair])[:PAIRS]
    sets |= {f"alike-{number}": np.array(pair) for number, pair in enumerate(alike)}
    for number, pair in enumerate(rng.choice(len(others), PAIRS, replace=False)):
        sets[f"pair-{number}"] = np.array(others[pair])
    return {name: sorted(int(row) for row in rows) for name, rows in sets.items() if len(rows)}


def write_sets() -> None:
    """Writes questions.json and sets.json of each folder whose queries are scored by removal."""
    for folder in sys.argv[1:] or list_folders():
        study, queries, names = open_study(folder)
        images = study.image_sets["laion"]
        files = name_images(images.ids, images.paths, np.zeros(len(images), bool))
        draws, units = study.score_draws(queries)
        scores = draws.sum(axis=0) / units.sum(axis=0)[:, None]
        likeness = compare_images(study.blocks)
        sets = choose_sets(
            scores.max(axis=0), find_unused(scores, group_alike(likeness)), likeness, folder
        )
        for number, rows in enumerate(list_copies(folder)):
            sets[f"copies-{number}"] = rows
        features = np.stack([study.maker.make(query, [0])[0] for query in queries])
        signed = score_signed(study, features)
        found = {
            "files": files,
            "units": dict(zip(names, shorten(units.sum(axis=0)))),
            "sets": sets,
            "likeness": [shorten(row, 4) for row in likeness],
            "latents": [shorten(row, 4) for row in compare_latents(images)],
            "signed removal": {name: shorten(row) for name, row in zip(names, signed)},
        }
        (EVIDENCE / folder).mkdir(parents=True, exist_ok=True)
        (EVIDENCE / folder / "questions.json").write_text(json.dumps(found) + "\n")
        named = {name: [files[row] for row in rows] for name, rows in sets.items()}
        (RESULTS / folder / "sets.json").write_text(json.dumps(named, indent=1) + "\n")
        print(
            f"{folder}: {len(sets)} sets, {len(sets.get('unused', []))} images unused", flush=True
        )


def shorten(values: np.ndarray, digits: int = 6) -> list[float]:
    """Numbers with so many digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def list_folders() -> Iterator[str]:
    """The folders, tuning ones first."""
    for kind in ("tuning", "reported"):
        yield from read_json(TARGET / "folders.json")[kind]


if __name__ == "__main__":
    write_sets()
