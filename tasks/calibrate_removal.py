"""Are removal's intervals as wide as they say, and how often does it call an image attributable that
the model never saw? Prints both tables of results/README.md. Ten minutes on a CPU core.

    python tasks/calibrate_removal.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from unlearn.attribution.intervals import find_intervals
from unlearn.attribution.removal import RemovalSettings
from unlearn.attribution.removal_scores import score_draws
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.datasets.preparation import prepare_training_set
from unlearn.datasets.queries import encode_picture, encode_query
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import TrainingSet, label_rows
from unlearn.models.pipelines import load_model
from unlearn.report.attributable import describe_attributable
from unlearn.runtime.programs import run

MANY_DRAWS, NUM_STRANGE, NUM_PICKS = 64, 120, 20


def open_world(name):
    """Model, training set and queries of a world, those of the tuning file first."""
    root = f"data/{name}"
    settings = read_settings(root)
    model = load_model(settings["pipeline"], "cpu", settings["unet"])
    files = [f"tasks/{name}_tuning.json", f"tasks/{name}.json"]
    tasks = [task for file in files for task in load_tasks(file, root)]
    queries = [encode_query(model, task, root) for task in tasks]
    return model, prepare_training_set(model, root), queries


def open_strange(model, images, known, count):
    """Images of data/emoji that a model never saw: whose captions no image of a set `known` has."""
    _, paths, captions = label_rows("data/emoji")
    rows = [row for row in range(len(paths)) if captions[row] not in known]
    size = images.latents.shape[-1] * model.pipeline.vae_scale_factor
    found = [
        encode_picture(model, paths[row], captions[row], size, "emoji", f"strange/{row}")
        for row in np.random.default_rng(0).permutation(rows)[:count]
    ]
    return TrainingSet(
        "strange",
        [image.ids[0] for image in found],
        [image.captions[0] for image in found],
        [image.paths[0] for image in found],
        np.concatenate([image.latents for image in found], axis=1),
        np.concatenate([image.embeddings for image in found]),
        "strange",
    )


def measure(model, images, queries, folder, **settings):
    """Features of images and queries, and losses of both."""
    study = RemovalStudy(model, {"laion": images}, folder, RemovalSettings(**settings))
    study.build()
    own = np.array([study.maker.explain(query, [0])[0] for query in queries])
    asked = np.stack([study.maker.make(query, [0])[0] for query in queries])
    return np.concatenate(list(study.blocks())), asked, study.losses["laion"], own


def show_coverage(folder):
    """How often intervals of a few draws hold the mean of the others."""
    model, images, queries = open_world("emoji_shared")
    settings = {"timesteps": (350,) * MANY_DRAWS}
    features, asked, *_ = measure(model, images, queries[:40], folder, **settings)
    draws, _ = score_draws(lambda: iter([features]), asked)
    random = np.random.default_rng(0)
    print("| draws | intervals that hold the others' mean | corrected for its error | high / low |")
    print("| ---: | ---: | ---: | ---: |")
    for count in (2, 3, 4, 6):
        held, wide = [], []
        for _ in range(NUM_PICKS):
            order = random.permutation(MANY_DRAWS)
            few, others = draws[order[:count]], draws[order[count:]]
            # The others' mean has an error itself: intervals for the difference are that much wider.
            extra = np.sqrt(1 + count / len(others))
            for query in range(few.shape[1]):
                found = find_intervals(few[:, query])
                mean, center = count * others[:, query].mean(axis=0), few[:, query].sum(axis=0)
                distance = np.abs(np.log(mean / center)) / np.log(found.high / center)
                held.append([(distance <= 1).mean(), (distance <= extra).mean()])
                wide.append(np.median(found.high / found.low))
        plain, corrected = np.mean(held, axis=0)
        print(f"| {count} | {plain:.1%} | {corrected:.1%} | {np.mean(wide):.1f} |")


def find_called(features, asked, losses, own):
    """Queries [queries] bool of which an image is called attributable."""
    draws, units = score_draws(lambda: iter([features]), asked)
    found = [
        describe_attributable(row, unit, losses, loss)
        for row, unit, loss in zip(draws.sum(axis=0), units.sum(axis=0), own)
    ]
    return np.array([each["num_attributable"] > 0 for each in found])


def show_nulls(folder):
    """Of how many queries an image is called attributable, of their own and of strange ones."""
    print("| model | candidates | queries with an attributable image: first 40 | others |")
    print("| --- | --- | ---: | ---: |")
    for name in ("emoji_small", "emoji_shared"):
        model, images, queries = open_world(name)
        known = {*images.captions, *label_rows("data/emoji_small")[2]}
        strange = open_strange(model, images, known, NUM_STRANGE)
        for title, candidates, counts in (
            ("never seen", strange, (40, 80, NUM_STRANGE)),
            ("its own", images, (len(images),)),
        ):
            features, asked, losses, own = measure(
                model, candidates, queries, folder / f"{name} {title}"
            )
            for count in counts:
                called = find_called(features[:count], asked, losses[:count], own)
                shares = f"{called[:40].mean():.1%} | {called[40:].mean():.1%}"
                print(f"| {name} | {count} {title} | {shares} |", flush=True)


def main(argv=None):
    """Both tables."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        show_nulls(Path(folder))
        show_coverage(Path(folder) / "coverage")


if __name__ == "__main__":
    run(main)
