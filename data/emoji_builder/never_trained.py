"""Does a score tell an image that the model was trained on from one that looks and reads alike but
that this model never saw? Asked of eight models of random halves of data/emoji_shared: the other 32
of its 64 pictures are candidates all the same.

    python -m data.emoji_builder.never_trained

Trains the halves half-000 to half-007 as tasks/retrain_emoji_shared.sh does, has each make the
pictures of the first ten reported prompts, ranks all 64 images for each, and prints the table of
results/evidence/emoji_shared/never_trained.csv. Half an hour on a CPU core; killed and run again, it
goes on where it was.

A twin of a trained picture is a never-trained one beside it in the order of similarity. Of each
trained picture among a query's 16 most similar, the nearest twin above it and the nearest below it
make two pairs; one that has no twin on a side makes none. So similarity itself is right in exactly
half of the pairs, and what another score tells beyond that, similarity does not explain. Also told is
how often a query's first image is a trained one.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from itertools import chain
from os import devnull
from pathlib import Path

import numpy as np

import compute_influence
import compute_training_loss
from unlearn.commands import baselines, fisher, retrain
from unlearn.datasets.encoders import encode_texts
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import find_result, load_tasks
from unlearn.evaluation.metrics import format_mean, markdown_table, mean_and_error
from unlearn.models.generation import make_pictures, save_picture
from unlearn.models.pipelines import load_model
from unlearn.report.ranking import write_csv
from unlearn.retraining.batches import random_members
from unlearn.runtime.programs import run
from unlearn.storage.artifacts import whole_file, write_json
from unlearn.storage.reading import read_json

from .lora_answers import separate

ROOT, TASKS = Path("data/emoji_shared"), "tasks/emoji_shared.json"
RESULTS = Path("results/emoji_shared")  # where tasks/retrain_emoji_shared.sh writes its halves too
EVIDENCE = Path("results/evidence/emoji_shared/never_trained.csv")
NUM_HALVES, NUM_QUERIES, FIRST = 8, 10, 16
OWN_LOSS = "own loss, of no query"  # how well the model explains an image
METHODS = {
    "removal": "by_removal/influence",
    "ours": "influence",
    "output": "by_output/influence",
    **{name: f"baselines/{name}" for name in ("dtrak", "similarity", "vae", "text")},
}
MEASURES = ("auc", "auc_all", "first")  # of pairs of twins, of all pairs, first image is trained
ERRORS = ("error", "error_all", "error_first")
COLUMNS = ("method", "pairs", *chain(*zip(MEASURES, ERRORS)), "queries", "models")


def find_pairs(similarity: np.ndarray, is_trained: np.ndarray) -> np.ndarray:
    """Pairs of rows (trained, never trained) of a query, [pairs, 2], from its similarity [N] and
    which images the model saw [N] bool: for each trained one among the FIRST most similar the
    nearest never-trained one that is more similar and the nearest that is less, where both are."""
    never, pairs = np.flatnonzero(~is_trained), []
    for row in np.argsort(-similarity, kind="stable")[:FIRST]:
        above = never[similarity[never] > similarity[row]]
        below = never[similarity[never] < similarity[row]]
        if is_trained[row] and len(above) and len(below):
            pairs.append((row, above[np.argmin(similarity[above])]))
            pairs.append((row, below[np.argmax(similarity[below])]))
    return np.array(pairs, int).reshape(-1, 2)


def share_right(scores: np.ndarray, pairs: np.ndarray) -> float:
    """In which share of pairs [pairs, 2] the first image's score is the higher one, equal ones
    counting half; NaN without pairs."""
    differences = np.subtract(*scores.astype(np.float64)[pairs.T])
    return float(((1 + np.sign(differences)) / 2).mean()) if len(pairs) else np.nan


def make_root(number: int) -> Path:
    """A data root of a half's model: the images of ROOT, all of them, and the model's UNet."""
    root, weights = RESULTS / f"never_trained/{number:03d}", RESULTS / f"retrain/half-{number:03d}"
    settings = read_json(ROOT / "dataset.json") | {"pipeline": str((ROOT / "pipeline").resolve())}
    del settings["train_from"]
    shutil.copytree(ROOT / "laion_subset", root / "laion_subset", dirs_exist_ok=True)
    for path in (*ROOT.glob("laion_*.npy"), *ROOT.glob("laion_*.json")):
        shutil.copy(path, root)
    (root / "unet").mkdir(exist_ok=True)
    for path in (*(ROOT / "unet").glob("*config.json"), weights / "model.safetensors"):
        shutil.copy(path, root / "unet")
    write_json(root / "dataset.json", settings)
    return root


def make_queries(root: Path) -> None:
    """Has a root's model make the pictures of the reported prompts, each by its own seed, and writes
    their task file, last."""
    if (root / "tasks.json").exists():
        return
    tasks, settings = read_json(TASKS)[:NUM_QUERIES], read_settings(root)
    model = load_model(settings["pipeline"], "cpu", settings["unet"])
    resolution = model.resolution(settings)
    texts = encode_texts(model, [task["prompt"] for task in tasks], [None] * len(tasks), resolution)
    _, pictures = make_pictures(
        model,
        settings["name"],
        {name: values.numpy() for name, values in texts.items()},
        [task["seed"] for task in tasks],
        model.latent_shape(resolution),
        tasks[0]["num_inference_steps"],
        tasks[0]["guidance_scale"],
        NUM_QUERIES,
    )
    for task, pixels in zip(tasks, pictures):
        for key in ("latents", "embeddings", "row"):  # of the picture that the full model made
            del task[key]
        with whole_file(root / task["synth_image_path"]) as file:
            save_picture(file, pixels)
    write_json(root / "tasks.json", tasks)


def copy_unlearned(source: Path, target: Path) -> None:
    """Lends the weight changes of queries that were unlearned to another way of scoring."""
    for path in source.rglob("weight_change.*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def score(root: Path) -> None:
    """Scores all images of a root for its queries by every method, each with the settings that
    tasks/retrain_emoji_shared.sh gives it, removal with its own defaults."""

    def call(main: Callable, folder: str, *flags: str) -> None:
        place = ["--dataroot", str(root), "--result_dir", str(root / folder)]
        with open(devnull, "w") as nowhere, redirect_stdout(nowhere):  # tables of every query
            main([*place, "--task_json", str(root / "tasks.json"), *flags])

    fisher.main(["--dataroot", str(root)])
    influence, others = compute_influence.main, baselines.main
    call(compute_training_loss.main, "results")
    call(influence, "results")
    copy_unlearned(root / "results/influence", root / "results/by_output/influence")
    call(influence, "results/by_output", "--scoring", "output")
    call(influence, "results/by_removal", "--scoring", "removal")
    call(others, "results", "--methods", "similarity", "vae", "text")
    call(others, "results", "--methods", "dtrak", "--trak_lambda", "1", "--views", "mean")


def read_scores(root: Path) -> dict[str, np.ndarray]:
    """Scores [queries, N] of a root's queries by method."""
    tasks, found = load_tasks(root / "tasks.json", root), {}
    for method, place in METHODS.items():
        files = [find_result(root / "results" / place, task) / "influence.npz" for task in tasks]
        found[method] = np.stack([np.load(file)["influence"] for file in files])
    losses = np.load(root / "results/orig_loss/base/laion_loss.npy").reshape(2, -1).mean(axis=0)
    return {**found, OWN_LOSS: np.tile(-losses, (len(tasks), 1))}


def measure(scores: dict[str, np.ndarray], is_trained: np.ndarray) -> tuple[dict, int]:
    """Of a half's model: ({method: MEASURES}, means over its queries; number of pairs)."""
    pairs = [find_pairs(similarity, is_trained) for similarity in scores["similarity"]]
    shares = {
        method: (
            np.nanmean([share_right(query, some) for query, some in zip(values, pairs)]),
            np.mean([separate(query, ~is_trained) for query in values]),
            is_trained[values.argmax(axis=1)].mean(),
        )
        for method, values in scores.items()
    }
    return shares, sum(map(len, pairs))


def summarise(found: Sequence[tuple[dict, int]]) -> list[tuple]:
    """Rows of COLUMNS from what was measured of each model; errors are standard errors over models."""
    rows = []
    for method in found[0][0]:
        shares = np.array([measured[method] for measured, _ in found])  # [models, 3]
        ends = [value for column in shares.T for value in mean_and_error(column)]
        rows.append((method, sum(count for _, count in found), *ends, NUM_QUERIES, len(found)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, makes pictures, scores and tells the table."""
    halves = ["subsets", "--count", str(NUM_HALVES), "--stack", str(NUM_HALVES)]
    retrain.main([*halves, "--dataroot", str(ROOT), "--result_dir", str(RESULTS)])
    found = []
    for number in range(NUM_HALVES):
        root = make_root(number)
        make_queries(root)
        score(root)
        scores = read_scores(root)
        count = scores["similarity"].shape[1]
        is_trained = random_members(count, count // 2, number, read_settings(ROOT)["name"])
        found.append(measure(scores, is_trained))
    rows = summarise(found)
    write_csv(EVIDENCE, COLUMNS, rows)
    cells = [[row[0], *(format_mean(*row[at : at + 2]) for at in (2, 4, 6))] for row in rows]
    header = ["method", f"{rows[0][1]} pairs of twins", "all pairs", "first image is trained"]
    print("\n".join(markdown_table(header, cells)))


if __name__ == "__main__":
    run(main)
