"""A query's result folder read back as the Report that its page shows."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..attribution.names import OUTPUT, REMOVAL
from ..datasets.tasks import Task, find_named_result
from ..datasets.training_sets import label_rows
from ..errors import NotThere, UserError
from ..report.attributable import read_attributable
from ..report.contents import Report, Row, share_groups
from ..report.grouping import find_originals, group_images
from ..report.ranking import name_images, restore
from ..report.results import describe_recall
from ..report.standing_out import StandingOut
from ..storage.reading import read_npz, read_text
from ..storage.records import is_complete, names_of, read_record
from .rankings import read_influence, warnings_of
from .stored_records import box_of, describe_query, list_settings, scoring_of, text_of, texts_of
from .stored_sets import REMEDY, read_groups, read_set

SIMILARITIES = {  # methods that never look at the model, the one to compare with first
    "similarity": "similarity of text and latents",
    "vae": "similarity of latents",
    "pixel": "similarity of pixels",
    "text": "similarity of text",
}
OF_INDEX = {
    "rescored": ("b", 1),
    "recall": ("f", 0),
    "recall_low": ("f", 0),
    "recall_k": ("iu", 0),
    "num_audited": ("iu", 0),
}
OF_INTERVALS = {
    "low": ("f", 1),
    "high": ("f", 1),
    "rank_first": ("iu", 1),
    "rank_last": ("iu", 1),
}
OF_BOUND = {"bound": ("f", 0), "num_attributable": ("iu", 0)}
METHOD = (
    "A score tells how much worse the model explains a training image once it has unlearned the "
    "query: the higher, the more the image had to do with the picture."
)
METHODS = {  # by the record's way of scoring, where it is none of changes of losses
    REMOVAL: "A score tells how much less certain the model would be of this picture if the image had "
    "not been among its training images: the higher, the more of what it knows of the picture comes "
    "from that image alone. An image whose near twin is there too has a low one, for the twin would "
    "fill its place. Scores compare images of one picture; their unit says nothing by itself.",
    OUTPUT: "A score tells how far the model's predictions of a training image move once it has "
    "unlearned the query: the higher, the more the image had to do with the picture.",
}


def find_results(result_dir: Path) -> list[str]:
    """Names of the queries whose results are complete. Raises UserError where there is none."""
    folder = Path(result_dir) / "influence"
    if not folder.is_dir():
        raise UserError(
            f"{result_dir}: no folder influence in it; give the --result_dir of "
            f"compute_influence.py"
        )
    found = sorted(path for path in folder.rglob("influence.npz") if is_complete(path))
    if not found:
        raise UserError(
            f"{folder}: no complete result in it (influence.npz and its record "
            f"influence.json); run compute_influence.py first"
        )
    return [path.parent.relative_to(folder).as_posix() for path in found]


def check_result(result_dir: Path, query: str) -> None:
    """Raises UserError where a query's result is damaged."""
    folder = Path(result_dir) / "influence" / query
    read_influence(folder / "influence.npz", REMEDY)
    read_labels(folder / "influence.csv")


def read_labels(path: Path) -> dict[str, tuple[str, str]]:
    """Caption and path of each image by its id, as influence.csv says; {} where it is not there.
    Raises UserError where it is another table."""
    if not path.exists():
        return {}
    csv.field_size_limit(1 << 24)
    try:
        rows = list(csv.DictReader(read_text(path, "table").splitlines()))
        return {
            row["id"]: (restore(row["caption"] or ""), restore(row["path"] or "")) for row in rows
        }
    except (csv.Error, KeyError) as error:
        raise UserError(
            f"{path}: not a table of id, caption and path ({error}); {REMEDY}"
        ) from None


class DataRoot:
    """Names, captions and pictures of a data root's images, read when first asked for."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder) if folder and Path(folder).is_dir() else None
        self.labels = None

    def label(self, id: str) -> tuple[str, Path | None]:
        """Caption and picture of an image by its id; "" and None where they are not known."""
        if self.folder is None:
            return "", None
        if not id.startswith("laion/"):
            return "", self.folder / id
        if self.labels is None:
            indices, paths, captions = label_rows(self.folder)
            self.labels = {
                f"laion/{index:06d}": (
                    captions[row] if captions else "",
                    paths[row] if paths else None,
                )
                for row, index in enumerate(indices)
            }
        return self.labels.get(id, ("", None))


def find_picture(stored: str, id: str, root: DataRoot) -> Path | None:
    """An image's picture: where influence.csv says, else in the data root."""
    if stored and os.path.isfile(stored):
        return Path(stored)
    return root.label(id)[1]


def compare_ranks(result_dir: Path, query: str, ids: list[str]) -> tuple[str | None, dict]:
    """The first similarity that tells images of this query apart, in words, and its rank of each id;
    images that are as similar as others share the last of their ranks."""
    name = Path(query).with_suffix("").as_posix()
    for method, words in SIMILARITIES.items():
        folder = find_named_result(Path(result_dir) / "baselines" / method, name)
        remedy = "make it anew: python -m unlearn baselines with --overwrite"
        try:
            arrays = read_influence(folder / "influence.npz", remedy)
        except NotThere:
            continue
        scores = arrays["influence"]
        rank = len(scores) - np.searchsorted(np.sort(scores), scores)
        ranks = dict(zip(arrays["ids"].tolist(), rank.tolist()))
        if set(ids) == ranks.keys() and len(set(ranks.values())) > 1:
            return words, ranks
    return None, {}


def read_intervals(path: Path, num_images: int) -> dict[str, np.ndarray]:
    """The intervals of an influence file's scores, {} where it has none. Raises UserError where
    they are of another length or not finite."""
    found = read_npz(path, OF_INTERVALS, REMEDY)
    for name, values in found.items():
        if values.shape != (num_images,) or not np.isfinite(values).all():
            raise UserError(f"{path}: {name}: expected {num_images} finite numbers; {REMEDY}")
    return found


def read_known(path: Path, scores: np.ndarray) -> StandingOut | None:
    """What an influence file says of which images stand out, None where it says nothing."""
    known = read_npz(path, OF_BOUND, REMEDY)
    bound, count = known.get("bound"), known.get("num_attributable")
    if bound is None or count is None or not np.isfinite(bound) or count < 0:
        return None
    return read_attributable(scores, float(bound), int(count))


def make_rows(
    arrays: dict[str, np.ndarray],
    index: dict[str, np.ndarray],
    intervals: dict[str, np.ndarray],
    labels: dict[str, tuple[str, str]],
    root: DataRoot,
    ranks: dict,
) -> list[Row]:
    """The Rows of a ranking, most influential first."""
    order = arrays["rank"]
    ids = [str(arrays["ids"][number]) for number in order]
    is_exemplar = arrays["is_exemplar"][order]
    rescored = index["rescored"][order] if "rescored" in index else np.ones(len(order), bool)
    paths = [labels[id][1] if id in labels else str(root.label(id)[1] or "") for id in ids]
    names = name_images(ids, paths, is_exemplar)
    fields = {"low": "low", "high": "high", "rank_first": "first", "rank_last": "last"}
    known = {fields[name]: values for name, values in intervals.items()}
    return [
        Row(
            id=id,
            name=name,
            caption=labels[id][0] if id in labels else root.label(id)[0],
            score=float(arrays["influence"][number]),
            is_exemplar=bool(mask),
            path=find_picture(path, id, root),
            is_estimate=not scored,
            other_rank=ranks.get(id),
            group=group,
            **{name: values[number].item() for name, values in known.items()},
        )
        for number, id, name, path, mask, scored, group in zip(
            order, ids, names, paths, is_exemplar, rescored, group_images(names, is_exemplar)
        )
    ]


def name_originals(rows: list[Row], dataroot: Path | None) -> list[Row]:
    """The rows of a data root that was made of a folder, with the names and groups that its
    pictures have there."""
    return [
        replace(row, name=found.name, group=found.group or row.group) if found else row
        for row, found in zip(rows, find_originals([row.path for row in rows], dataroot))
    ]


def read_report(
    result_dir: Path, query: str, dataroot: str | None = None, task: Task | None = None
) -> Report:
    """The Report of one query of a folder of results. What an older folder does not hold is taken
    from the data root and the task given; where nothing says it, the report's notes do.

    Raises UserError where the result is damaged.
    """
    folder = Path(result_dir) / "influence" / query
    path = folder / "influence.npz"
    arrays, record = read_influence(path, REMEDY), read_record(path, REMEDY)
    ids = arrays["ids"].tolist()
    index, intervals = read_npz(path, OF_INDEX, REMEDY), read_intervals(path, len(ids))
    found = record.get("circumstances")
    found = found if isinstance(found, dict) else {}
    root_name = dataroot or text_of(found, "dataroot") or names_of(record).get("data root")
    root = DataRoot(root_name)
    known = describe_query(record, task, query)
    picture = find_query(root, known.get("picture"), query)
    comparison, ranks = compare_ranks(result_dir, query, ids)
    rows = make_rows(arrays, index, intervals, read_labels(folder / "influence.csv"), root, ranks)
    rows = name_originals(rows, root.folder)
    notes = list_missing(root_name, root, known, picture, comparison)
    if {*OF_INDEX} <= index.keys():
        audit = {name: index[name].item() for name in OF_INDEX if name != "rescored"}
        notes.insert(0, describe_recall(**audit))
    return Report(
        name=query,
        rows=rows,
        picture=picture,
        prompt=known.get("prompt"),
        facts=[(name, str(known[name])) for name in ("model", "seed") if name in known],
        method=METHODS.get(scoring_of(record) or "", METHOD),
        settings=list(list_settings(record, arrays)),
        cautions=[*warnings_of(arrays), *texts_of(found, "notes")],
        notes=notes,
        comparison=comparison,
        groups=share_groups(rows, read_groups(path, ids, rows)),
        chosen=read_set(path, ids, rows),
        command=text_of(found, "command"),
        known=read_known(path, arrays["influence"]),
        box=box_of(record),
        remarks=texts_of(found, "remarks"),
    )


def find_query(root: DataRoot, picture: str | None, query: str) -> Path | None:
    """The query's picture in a data root, None where it is not there. Without the name of its file,
    it is looked for where task files' pictures stand."""
    if root.folder is None:
        return None
    names = [f"{folder}{query}{suffix}" for folder in ("synth/", "") for suffix in ("", ".png")]
    names = [picture] if picture else names
    paths = [root.folder / name for name in names]
    return next((path for path in paths if path.is_file()), None)


def list_missing(
    root_name: str | None, root: DataRoot, known: dict, picture: Path | None, comparison: str | None
) -> list[str]:
    """What the page lacks, and how it is got."""
    notes = []
    if root.folder is None:
        notes.append(
            f"The data root {root_name} is not there: give --dataroot, where it stands now."
            if root_name
            else "The result does not say where its pictures are: give --dataroot."
        )
    if "prompt" not in known:
        notes.append("The result does not hold its prompt: give --dataroot and --task_json.")
    if picture is None and root.folder is not None:
        notes.append("The query's picture was not found: give --dataroot and --task_json.")
    if comparison is None:
        notes.append(
            "No similarity stands beside this result; python -m unlearn baselines makes one "
            "to compare with."
        )
    return notes
