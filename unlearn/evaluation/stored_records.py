"""What the record beside a result says of its query and settings, for people."""

import re
from collections.abc import Iterator
from pathlib import Path

from ..datasets.boxes import Box, check_box
from ..datasets.tasks import BASE, Task
from ..storage.records import MEANINGS, names_of

OLD_QUERY = re.compile(r'(.+) with the prompt "(.*)"', re.DOTALL)  # of `names`, in every record
FIGURES = {
    "relative_weight_change": ("weights moved by", "{:.2%}"),
    "query_loss_before": ("the query's own loss before", "{:.4f}"),
    "query_loss_after": ("the query's own loss after", "{:.4f}"),
    "median_change": ("change of the median training image's loss", "{:+.1e}"),
}


def text_of(values: dict, name: str) -> str | None:
    """A text of a record, None where it is none."""
    return values[name] if isinstance(values.get(name), str) else None


def texts_of(values: dict, name: str) -> list[str]:
    """The texts of a list in a record, [] where it is none."""
    found = values.get(name)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def scoring_of(record: dict) -> str | None:
    """The way of scoring that a record tells, None where it tells none."""
    settings = record["identity"].get("settings")
    return text_of(settings, "scoring") if isinstance(settings, dict) else None


def box_of(record: dict) -> Box | None:
    """The box of the query's picture that alone counts, None where all of it does."""
    settings = record["identity"].get("settings")
    found = settings.get("box") if isinstance(settings, dict) else None
    if isinstance(found, list) and len(found) == 4 and all(type(each) is int for each in found):
        return check_box(found)
    return None


def describe_query(record: dict, task: Task | None, query: str) -> dict:
    """What is known of the query, from the task file, else from its record: picture (relative to
    the data root), prompt, seed and model; those that are not known are missing."""
    found = record.get("circumstances")
    found = found if isinstance(found, dict) else {}
    known = {
        "picture": text_of(found, "picture"),
        "prompt": text_of(found, "prompt"),
        "seed": found.get("seed"),
        "model": text_of(found, "model"),
    }
    old = OLD_QUERY.fullmatch(names_of(record).get("query") or "")
    if known["picture"] is None and old and strip_name(old[1]) == strip_name(query):
        known.update(picture=old[1], prompt=old[2])
    if task is not None:
        known.update(
            picture=task.synth_image_path,
            prompt=task.prompt,
            seed=task.seed,
            model=task.model_name,
        )
    if known["model"] in (None, BASE):  # which says nothing to those who have one model alone
        known["model"] = names_of(record).get("model") or known["model"]
    return {name: value for name, value in known.items() if value is not None}


def strip_name(picture: str) -> str:
    """The folder of a query's results, of its picture's path."""
    return Path(picture).with_suffix("").as_posix().removeprefix("synth/")


def count_draws(settings: dict) -> dict:
    """Settings with the draws of a step as one number, of which two flags are the factors."""
    names = "unlearn_batch_size", "unlearn_grad_accum_steps"
    size, number = (settings.get(name) for name in names)
    if not isinstance(size, int) or not isinstance(number, int):
        return settings
    draws = {names[0]: size * number, names[1]: None}
    return {name: draws.get(name, value) for name, value in settings.items()}


def list_settings(record: dict, arrays: dict) -> Iterator[tuple[str, str]]:
    """What was computed, and with what: (words, value), from a record and the arrays beside it."""
    names, found = names_of(record), record.get("circumstances")
    found = found if isinstance(found, dict) else {}
    for kind in ("model", "data root", "Fisher"):
        if names.get(kind):
            yield kind, str(names[kind])
    yield "images ranked", f"{len(arrays['ids']):,}"
    settings = record["identity"].get("settings")
    for field, value in count_draws(settings).items() if isinstance(settings, dict) else ():
        if value is not None:
            words = MEANINGS.get(field, (str(field),))[0]
            yield words, f"{value:,}" if isinstance(value, int) else str(value)
    for field, (words, form) in FIGURES.items():
        if field in arrays:
            yield words, form.format(float(arrays[field]))
    for field, words in (("time", "made at"), ("device", "device")):
        if isinstance(found.get(field), str) and found[field] != "None":
            yield words, found[field].replace("T", " ") if field == "time" else found[field]
    versions = [f"{name} {found[name]}" for name in ("unlearn", "torch", "numpy") if name in found]
    if versions:
        yield "programs", ", ".join(versions)
