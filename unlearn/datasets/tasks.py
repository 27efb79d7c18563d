"""Task files: which synthesized images are to be attributed, and which model made them: a
customized one, with its exemplars, or the data root's own base model."""

import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import UserError
from ..runtime.programs import say
from ..storage.reading import check_keys, check_text, read_json, resolve_inside

FIELDS = {
    "synth_image_path": str,
    "prompt": str,
    "test_case": str,
    "test_case_ind": int,
    "model_path": str,
    "train_prompt": str,
    "category": (str, type(None)),
}
CUSTOMIZED_FIELDS = (
    "test_case",
    "test_case_ind",
    "model_path",
    "train_prompt",
)  # none of them: the base model made the query
OPTIONAL_FIELDS = {
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "latents": str,
    "embeddings": str,
    "row": int,
}
NEEDED_FIELDS = {"latents": "row", "row": "latents", "embeddings": "latents"}
PATH_FIELDS = ("synth_image_path", "model_path")  # results are written under these names
BASE = "base"  # folder of the base model's losses
LONGEST_PATH = 1000
LARGEST_FILE = 64 << 20  # bytes; 400 tasks take 150 KB


@dataclass(frozen=True)
class Task:
    """One query. Paths are relative to the data root, except the exemplars', which are resolved. A
    query of the base model has no test case, model path, train prompt and exemplars."""

    synth_image_path: str
    prompt: str
    test_case: str | None
    test_case_ind: int | None
    model_path: str | None
    train_prompt: str | None
    category: str | None
    exemplar_paths: tuple[Path, ...]
    seed: int | None = None  # with which the query was made; None where it cannot be made again
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    latents: str | None = (
        None  # .npy [n, C, h, w], scaled for the denoiser: the query as the model made it
    )
    embeddings: str | None = None  # .npy [n, tokens, features]
    row: int | None = None  # the query's, of both

    @property
    def result_name(self) -> str:
        """Folder of the query's results below `results/influence`, as published: its path less
        `synth/`, with the suffix `.png`."""
        return Path(self.synth_image_path).as_posix().removeprefix("synth/")

    @property
    def query_name(self) -> str:
        """What evidence of retrained models calls the query: `result_name` less the suffix."""
        return Path(self.result_name).with_suffix("").as_posix()

    @property
    def model_name(self) -> str:
        """Folder of the model's losses below `results/orig_loss`: its path less `models/`; that of
        the base model is `base`."""
        return BASE if self.model_path is None else self.model_path.removeprefix("models/")

    @property
    def image_sets(self) -> tuple[str, ...]:
        """Names of the candidates' losses, in the order of the results: exemplars first, where
        there are any."""
        return ("laion",) if self.model_path is None else ("exemplar", "laion")

    def exemplar_ids(self, dataroot: str | Path) -> list[str]:
        """Paths of the exemplars relative to the data root: unlike their names, they tell those of
        different models apart."""
        return [
            path.relative_to(os.path.realpath(dataroot)).as_posix() for path in self.exemplar_paths
        ]

    def model_dir(self, dataroot: str | Path) -> Path | None:
        """Folder of the customized model, None where it is the base model."""
        return None if self.model_path is None else Path(dataroot) / self.model_path


def strip_dataset(path: str | Path) -> str:
    """`dataset/exemplar/0.png` -> `exemplar/0.png`: only the first component, and only where it is
    `dataset`."""
    return str(path).removeprefix("dataset/")


def read_list(path: str | Path, item: str) -> list:
    """A JSON file that holds a list. Raises UserError where it does not, or is too large to be
    read."""
    entries = read_json(path, item, LARGEST_FILE)
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else type(entries).__name__
        raise UserError(f"{item} {path}: expected a list with at least one entry, found {found}")
    return entries


def read_test_case(dataroot: str | Path, name: str) -> list[dict]:
    """Entries of `json/NAME.json`, one a customized model. Raises UserError where it is missing or
    malformed."""
    path = resolve_inside(dataroot, f"json/{name}.json", f"test_case {name}")
    if not os.path.isfile(path):
        known = (
            ", ".join(sorted(found.stem for found in (Path(dataroot) / "json").glob("test_*.json")))
            or "none"
        )
        raise UserError(f"test_case {name}: no {path}; this data root has: {known}")
    entries = read_list(path, "test case")
    for number, entry in enumerate(entries):
        exemplars = entry.get("exemplar") if isinstance(entry, dict) else None
        if (
            not isinstance(exemplars, list)
            or not exemplars
            or not all(isinstance(exemplar, str) for exemplar in exemplars)
        ):
            raise UserError(
                f"test case {path}, entry {number}: expected an object with a list `exemplar` of "
                f"paths, found {entry!r:.80}"
            )
    return entries


def check_fields(item: str, values: object) -> dict:
    """Every field of a task, None where it is absent (or null) and may be: without any of
    CUSTOMIZED_FIELDS it is a task of the base model. Raises UserError, naming task and key, where
    one is missing, of another type, or none of a task's."""
    if not isinstance(values, dict):
        raise UserError(f"{item}: expected an object, found {type(values).__name__}")
    check_keys(item, values, {**FIELDS, **OPTIONAL_FIELDS})
    optional = {field for field in OPTIONAL_FIELDS if values.get(field) is None}
    if all(values.get(field) is None for field in CUSTOMIZED_FIELDS):
        optional |= {*CUSTOMIZED_FIELDS, *(["category"] if values.get("category") is None else [])}
    for field, kind in {**FIELDS, **OPTIONAL_FIELDS}.items():
        if field in optional:
            continue
        if field not in values:
            raise UserError(f"{item}: key {field} is missing")
        if not isinstance(values[field], kind) or isinstance(values[field], bool):
            expected = {int: "whole number", (int, float): "number"}.get(kind, "string")
            raise UserError(f"{item}: {field}: expected a {expected}, found {values[field]!r:.80}")
        if isinstance(values[field], str):
            check_text(f"{item}: {field}", values[field], is_path="path" in field)
    for field, needed in NEEDED_FIELDS.items():
        if field not in optional and needed in optional:
            raise UserError(f"{item}: key {needed} is missing, which {field} needs")
    return {
        field: None if field in optional else values[field]
        for field in {**FIELDS, **OPTIONAL_FIELDS}
    }


def plain_path(path: str, item: str) -> str:
    """The shortest spelling of a relative path: `./a//b/` -> `a/b`. Raises UserError where it is
    absolute or goes up."""
    if len(path) > LONGEST_PATH:
        raise UserError(
            f"{item}: expected a path of at most {LONGEST_PATH} characters, found {len(path)}: "
            f"{path:.80}..."
        )
    plain = PurePosixPath(path)
    if plain.is_absolute() or ".." in plain.parts:
        raise UserError(
            f"{item}: expected a path inside the data root, relative to it and without .., found "
            f"{path}"
        )
    return plain.as_posix()


def find_file(dataroot: str | Path, path: str, item: str) -> Path:
    """The existing file below the data root that `path` names, or UserError."""
    check_text(item, path)
    try:
        resolved = resolve_inside(dataroot, path, item)
    except RuntimeError:  # Python before 3.13
        raise UserError(f"{item}: {path}: a symlink that leads to itself") from None
    if not os.path.isfile(resolved):
        raise UserError(f"{item}: no such file: {resolved}")
    return resolved


def find_exemplars(
    item: str, values: dict, dataroot: str | Path, test_cases: dict[str, list[dict]]
) -> tuple[Path, ...]:
    """The exemplars of a customized model's task, resolved. Raises UserError where its test case
    has no such entry."""
    name, index = values["test_case"], values["test_case_ind"]
    if name not in test_cases:
        test_cases[name] = read_test_case(dataroot, name)
    if not 0 <= index < len(test_cases[name]):
        raise UserError(
            f"{item}: test_case_ind: expected 0 to {len(test_cases[name]) - 1} in {name}, found "
            f"{index}"
        )
    entry = test_cases[name][index]
    if "found" not in entry:  # once for all tasks of the model
        entry["found"] = tuple(
            find_file(dataroot, strip_dataset(path), f"{item}: exemplar")
            for path in entry["exemplar"]
        )
    return entry["found"]


def make_task(
    item: str, values: object, dataroot: str | Path, test_cases: dict[str, list[dict]]
) -> Task:
    """Checks one entry of a task file and finds its exemplars. `test_cases` caches the test cases
    read so far."""
    values = check_fields(item, values)
    values.update(
        {
            field: plain_path(values[field], f"{item}: {field}")
            for field in PATH_FIELDS
            if values[field] is not None
        }
    )
    paths = (
        find_exemplars(item, values, dataroot, test_cases)
        if values["model_path"] is not None
        else ()
    )
    find_file(dataroot, values["synth_image_path"], f"{item}: synth_image_path")
    if values["model_path"] is not None and not os.path.isdir(
        resolve_inside(dataroot, values["model_path"], f"{item}: model_path")
    ):
        raise UserError(
            f"{item}: model_path: no such folder: {Path(dataroot) / values['model_path']}"
        )
    return Task(**values, exemplar_paths=paths)


def load_tasks(task_json: str | Path, dataroot: str | Path) -> list[Task]:
    """Reads and checks a task file: a list of tasks in its order. Raises UserError naming task, key
    and value, also where two tasks would write to one folder."""
    if not Path(dataroot).is_dir():
        raise UserError(f"--dataroot {dataroot}: no such folder")
    entries, test_cases, first = read_list(task_json, "--task_json"), {}, {}
    tasks = [
        make_task(f"{task_json}, task {number}", values, dataroot, test_cases)
        for number, values in enumerate(entries)
    ]
    for number, task in enumerate(tasks):
        if not set(task.query_name.split("/")).isdisjoint(("", ".", "..")):
            raise UserError(
                f"{task_json}, task {number}: synth_image_path {task.synth_image_path}: its name "
                f"leaves no folder for results"
            )
        other = first.setdefault(task.query_name, number)
        if other != number:
            raise UserError(
                f"{task_json}, task {number}: synth_image_path {task.synth_image_path}: its "
                f"results would stand in the "
                f"folder of task {other} ({tasks[other].synth_image_path}): {task.query_name}"
            )
    check_nesting(first, f"{task_json}: synth_image_path")
    return tasks


def find_result(folder: str | Path, task: Task) -> Path:
    """Folder of a task's results below `folder`; an older one, named without the picture's suffix,
    where that alone is there."""
    path, older = Path(folder) / task.result_name, Path(folder) / task.query_name
    return older if older.is_dir() and not path.exists() else path


def find_named_result(folder: str | Path, query: str) -> Path:
    """Folder of a query's results below `folder`, by its `query_name`."""
    found = sorted(Path(folder).glob(f"{glob.escape(query)}.*"))
    older = Path(folder) / query
    return (
        older
        if older.is_dir() and not found
        else (found or [older.with_name(f"{older.name}.png")])[0]
    )


def tell_older_results(folder: str | Path, tasks: Collection[Task]) -> None:
    """Says, in one line, that results of some tasks stand in folders of older names."""
    older = [task for task in tasks if find_result(folder, task) == Path(folder) / task.query_name]
    if older and older[0].query_name != older[0].result_name:
        say(
            f"{len(older)} of {len(tasks)} queries have results in folders of an older name, without "
            f"the picture's suffix, first {Path(folder) / older[0].query_name}: they are used; "
            f"rename one to {Path(older[0].result_name).name} to have it as published"
        )


def check_nesting(names: Collection[str], item: str) -> None:
    """Raises UserError where one of these folders stands within another, among its files."""
    for name in names:
        for parent in PurePosixPath(name).parents:
            if str(parent) in names:
                raise UserError(f"{item}: the folder of {name} would stand within that of {parent}")


def group_by_model(tasks: Iterable[Task]) -> dict[str | None, list[Task]]:
    """Tasks by model, {path of the customized model, or None: [task, ...]}, in the order of first
    appearance. Raises UserError where two tasks of a model disagree on its exemplars or train
    prompt, or two models would share a folder of losses."""
    groups, paths = {}, {}
    for task in tasks:
        if (other := paths.setdefault(task.model_name, task.model_path)) != task.model_path:
            first, second = (path or "the base model" for path in (other, task.model_path))
            raise UserError(
                f"{second}: its losses would stand in the folder of {first}: {task.model_name}"
            )
        group = groups.setdefault(task.model_path, [])
        if group and (group[0].exemplar_paths, group[0].train_prompt) != (
            task.exemplar_paths,
            task.train_prompt,
        ):
            raise UserError(
                f"{task.model_path}: tasks {group[0].synth_image_path} and "
                f"{task.synth_image_path} name "
                "different exemplars or train prompts for one model"
            )
        group.append(task)
    check_nesting(paths, "model_path")
    return groups
