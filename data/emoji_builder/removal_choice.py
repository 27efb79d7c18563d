"""Which settings of removal find the exemplars of customized models? Asked of the four models of
data/emoji that are not reported, for their two committed queries each and four pictures more, whose
prompts ask for something else beside the new token. Prints the table of
results/evidence/emoji/choose_removal.md; ten minutes on a CPU core.

    python -m data.emoji_builder.removal_choice
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from unlearn.attribution.removal import RemovalSettings
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.datasets.preparation import prepare_training_set
from unlearn.datasets.queries import encode_exemplars, encode_picture, encode_query
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import group_by_model, load_tasks
from unlearn.evaluation.metrics import average_precision, exemplar_ranks, markdown_table, recall
from unlearn.models.customization import customized
from unlearn.models.pipelines import load_model
from unlearn.runtime.programs import run

from .customize import make_queries

ROOT, TASKS, SEED, BATCH = "data/emoji", "tasks/emoji_tuning.json", 770, 16
TIMESTEPS = (150, 350, 550, 750, 950, 350)
CHOICES = {
    "350": [1],
    "350, twice": [1, 5],
    "950": [4],
    "150, 350, 550, 750, 950": [0, 1, 2, 3, 4],
}
RIDGES = (0.1, 1, 10, 100, 1000)


def other_prompts(prompt):
    """Prompts that ask for something else beside a model's token."""
    if "picture" in prompt:  # of a style
        return [prompt.replace("picture", thing) for thing in ("face", "house")]
    return [f"a {prompt}", f"blue {prompt}"]


def open_queries(model, tasks, folder):
    """The committed queries of a model, then pictures that it makes of other prompts, twice each."""
    queries = [encode_query(model, task, ROOT) for task in tasks]
    prompts = other_prompts(tasks[0].prompt) * 2
    model.pipeline.set_progress_bar_config(disable=True)
    resolution = model.resolution(read_settings(ROOT))
    for number, picture in enumerate(make_queries(model.pipeline, prompts, SEED)):
        path = folder / f"{number}.png"
        picture.save(path)
        queries.append(encode_picture(model, path, prompts[number], resolution))
    return queries


def score(model, images, tasks, folder):
    """({ridge: scores [draws, queries, N], exemplars first}, number of exemplars) of a model."""
    exemplars = encode_exemplars(model, tasks[0], ROOT, BATCH)
    queries, scores = open_queries(model, tasks, folder), {}
    for ridge in RIDGES:
        study = RemovalStudy(
            model,
            {"exemplar": exemplars, "laion": images},
            folder / "features",
            RemovalSettings("cross-attn-kv", TIMESTEPS, probes=1),
            ridge,
        )
        study.build()
        scores[ridge] = study.score_draws(queries)[0]
    return scores, len(exemplars)


def rate(scores, num_exemplars):
    """Recall@10 and average precision of a query's scores [N]."""
    order = np.argsort(-scores, kind="stable")
    ranks = exemplar_ranks(order, np.arange(len(scores)) < num_exemplars)
    return recall(ranks, 10), average_precision(ranks)


def main(argv=None):
    """Scores every query with every setting, and prints what each finds."""
    settings, found = read_settings(ROOT), []
    base = load_model(settings["pipeline"], "cpu", settings["unet"])
    images = prepare_training_set(base, ROOT)
    for path, tasks in group_by_model(load_tasks(TASKS, ROOT)).items():
        with TemporaryDirectory() as folder, customized(base, f"{ROOT}/{path}") as model:
            found.append(score(model, images, tasks, Path(folder)))
    rows = []
    for name, draws in CHOICES.items():
        for ridge in RIDGES:
            rated = np.array(
                [
                    [rate(each, count) for each in scores[ridge][draws].sum(axis=0)]
                    for scores, count in found
                ]
            )  # [models, queries, 2]: two committed queries, then four
            cells = [rated[:, :2, 0], rated[:, 2:, 0], rated[..., 0], rated[..., 1]]
            rows.append([name, f"{ridge:g}", *(f"{cell.mean():.3f}" for cell in cells)])
    header = ["timesteps", "ridge", "Recall@10, committed", "other prompts", "all", "mAP, all"]
    print("\n".join(markdown_table(header, rows)))


if __name__ == "__main__":
    run(main)
