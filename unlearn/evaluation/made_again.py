"""The picture of what models without images make of the queries' prompts and seeds."""

import io
from collections.abc import Sequence
from pathlib import Path

from ..datasets.tasks import Task
from ..report.figures import draw_grid
from ..report.ranking import load_picture
from ..storage.artifacts import whole_file
from .removal import group_models
from .retrained_models import RetrainedModel


def picture_path(result_dir: str, model: RetrainedModel, query: str) -> Path:
    """Where `retrain` left what a model made of a query's prompt and seed."""
    return Path(result_dir) / "retrain" / model.path.stem / f"pictures/{query}.png"


def models_without_most(
    models: Sequence[RetrainedModel], queries: Sequence[str]
) -> tuple[int, dict[str | None, list[RetrainedModel]]]:
    """The largest number of images that were removed for one of the queries, and the models without
    so many, by method."""
    most = max((model.num_removed for model in models if model.query in queries), default=0)
    groups = group_models(models, "without")
    return most, {method: group for (method, k), group in groups.items() if k == most}


def draw_made_again(
    tasks: Sequence[Task],
    models: Sequence[RetrainedModel],
    queries: Sequence[str],
    dataroot: str,
    result_dir: str,
    output: str,
) -> None:
    """Writes made_again.jpg: each query for which images were removed, beside what the models
    without the most of them make of its prompt and seed, as far as `retrain` left the pictures
    below RESULT_DIR. A model of random removal is the first one. queries: names, in the order of
    the models' measures."""
    most, methods = models_without_most(models, queries)
    asked = [task for task in tasks if any(model.query == task.query_name for model in models)]
    rows, is_any_there = [], False
    for task in asked:
        query = task.query_name
        row: list[tuple] = [(f"{dataroot}/{task.synth_image_path}", task.prompt)]
        for group in methods.values():
            model = next((each for each in group if each.query in (None, query)), None)
            if model and (path := picture_path(result_dir, model, query)).exists():
                mse = model.mse[queries.index(query)]
                row.append((path, f"MSE {100 * mse:.1f}e-2"))
                is_any_there = True
            else:
                row.append((None, ""))
        rows.append(row)
    if not is_any_there:
        return
    titles = [f"made again without {most} images by {method}" for method in methods]
    cells = [[(path and load_picture(path), text) for path, text in row] for row in rows]
    jpeg = io.BytesIO()
    draw_grid(["the query", *titles], cells).save(jpeg, "JPEG", quality=92)
    with whole_file(Path(output) / "made_again.jpg") as file:
        file.write(jpeg.getvalue())
    print(f"Drawn: made_again.jpg, {len(rows)} queries without {most} images")
