"""Are twelve images that are chosen together missed more than the first twelve of a ranking? Images of
data/emoji_shared stand in for each other: a score says what a query loses without one alone.

    python -m data.emoji_builder.chosen_together          # chooses: results/emoji_shared/together.json
    python -m unlearn retrain sets --sets_json results/emoji_shared/together.json --stack 8 --no_pictures \\
        --task_json tasks/emoji_shared.json tasks/emoji_shared_tuning.json --dataroot data/emoji_shared \\
        --result_dir results/emoji_shared --loss_time_samples 50 \\
        --output results/evidence/emoji_shared/chosen_together
    python -m data.emoji_builder.chosen_together --compare

Chosen by `attribution.removal_sets`, by two draws and one probe.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from unlearn.attribution.removal import RemovalSettings
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.datasets.preparation import prepare_training_set
from unlearn.datasets.queries import encode_query
from unlearn.datasets.settings import read_settings
from unlearn.datasets.tasks import load_tasks
from unlearn.evaluation.metrics import markdown_table, mean_and_error
from unlearn.models.pipelines import load_model
from unlearn.storage.artifacts import write_json
from unlearn.storage.reading import read_json

ROOT, TASKS = "data/emoji_shared", "tasks/emoji_shared.json"
EVIDENCE = Path("results/evidence/emoji_shared")
SETS = Path("results/emoji_shared/together.json")
NUM_QUERIES, COUNT = 30, 12
SETTINGS = RemovalSettings(timesteps=(350, 350), probes=1)


def write_sets() -> None:
    """Chooses the images of each query."""
    settings = read_settings(ROOT)
    model = load_model(settings["pipeline"], "cpu", settings["unet"])
    images = prepare_training_set(model, ROOT)
    queries = [encode_query(model, task, ROOT) for task in load_tasks(TASKS, ROOT)[:NUM_QUERIES]]
    with TemporaryDirectory() as folder:
        study = RemovalStudy(model, {"laion": images}, Path(folder), SETTINGS)
        study.build()
        sets = study.score_all(queries, set_size=COUNT).sets
    ids = [[images.ids[row] for row in chosen.rows] for chosen in sets]
    write_json(SETS, {f"q{number:05d}": each for number, each in enumerate(ids)})


def compare() -> None:
    """Rises of the queries' losses without the sets and without each method's first twelve, x 1000."""
    read = lambda path: read_json(path)["losses"]
    before = read(EVIDENCE / "retrained/full-seed0.json")
    names = sorted(name for name in before if "queries/" in name)[:NUM_QUERIES]
    found = {}
    for number, name in enumerate(names):
        path = EVIDENCE / f"chosen_together/set-q{number:05d}.json"
        if path.exists():
            found[number] = 1e3 * (read(path)[name] - before[name])
    mean, error = mean_and_error(np.array(list(found.values())))
    rows = [["chosen together", str(len(found)), f"{mean:.1f} ± {error:.1f}", ""]]
    for method in ("removal", "similarity", "ours", "dtrak"):
        files = {
            number: EVIDENCE / f"retrained/without-{method}-queries-{number:05d}-k{COUNT}.json"
            for number in found
        }
        rises = {
            number: 1e3 * (read(path)[names[number]] - before[names[number]])
            for number, path in files.items()
            if path.exists()
        }
        more = np.array([found[number] - rise for number, rise in rises.items()])
        own, apart = mean_and_error(np.array(list(rises.values()))), mean_and_error(more)
        higher = f"+{apart[0]:.1f} ± {apart[1]:.1f}, higher for {(more > 0).sum()}"
        rows.append([method, str(len(rises)), "{:.1f} ± {:.1f}".format(*own), higher])
    header = ["the twelve images of", "queries", "rise x1e-3", "chosen together minus it"]
    print("\n".join(markdown_table(header, rows)))


def main() -> None:
    """Chooses, or compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", action="store_true")
    compare() if parser.parse_args().compare else write_sets()


if __name__ == "__main__":
    main()
