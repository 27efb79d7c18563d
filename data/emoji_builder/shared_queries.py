"""Chooses the queries of data/emoji_shared among several pictures of each prompt.

    python -m data.emoji_builder.shared_queries

A model that was trained on few pictures often makes one of them again, whatever it is asked for.
What taught it that is plain to see. So of all candidates those are taken that are least like any
training picture, by the centred cosine of VAE latents, at most two of a prompt, and divided at
random among reporting and tuning. No retrained model has any part in it.
"""

import json
import shutil
from pathlib import Path

import numpy as np

from unlearn.baselines.similarity import cosine_scores, mean_features
from unlearn.storage.artifacts import write_json

ROOT, TASKS = Path("data/emoji_shared"), Path("tasks")
CANDIDATES = ROOT / "synth/candidates"
NUM_REPORTED, NUM_TUNING, MOST_A_PROMPT = 60, 20, 2


def likeness() -> np.ndarray:
    """How like the training picture that it is most like each candidate is, [candidates]."""
    training = np.load(ROOT / "laion_latents.npy")
    blocks = [training.reshape(2, len(training) // 2, -1)]
    candidates = np.load(CANDIDATES / "latents.npy")
    flat = candidates.reshape(len(candidates), -1)
    return cosine_scores(flat, blocks, mean_features(blocks)).max(axis=1)


def choose(prompts: list[str], like: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows of the candidates that become reported and tuning queries."""
    taken = {prompt: [] for prompt in prompts}
    for row in np.argsort(like, kind="stable"):
        count = sum(map(len, taken.values()))
        if len(taken[prompts[row]]) < MOST_A_PROMPT and count < NUM_REPORTED + NUM_TUNING:
            taken[prompts[row]].append(int(row))
    rows = np.random.default_rng(0).permutation(sorted(sum(taken.values(), []))).tolist()
    return rows[:NUM_REPORTED], rows[NUM_REPORTED:]


def write_queries(name: str, task_json: Path, rows: list[int], candidates: list[dict]) -> None:
    """Writes the pictures and arrays of some candidates to synth/NAME, and their task file."""
    folder = ROOT / "synth" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = []
    for number, row in enumerate(rows):
        picture = f"synth/{name}/{number:05d}.png"
        shutil.copy(ROOT / candidates[row]["synth_image_path"], ROOT / picture)
        entries.append({**candidates[row], "synth_image_path": picture, "row": number})
        entries[-1].update({kind: f"synth/{name}/{kind}.npy" for kind in ("latents", "embeddings")})
    for kind in "latents", "embeddings":
        np.save(folder / f"{kind}.npy", np.load(CANDIDATES / f"{kind}.npy")[rows])
    write_json(task_json, entries)


def main():
    """Writes data/emoji_shared/synth/{queries,tuning} and both task files anew."""
    candidates = json.loads((CANDIDATES / "tasks.json").read_text(encoding="utf-8"))
    reported, tuning = choose([task["prompt"] for task in candidates], likeness())
    write_queries("queries", TASKS / "emoji_shared.json", reported, candidates)
    write_queries("tuning", TASKS / "emoji_shared_tuning.json", tuning, candidates)


if __name__ == "__main__":
    main()
