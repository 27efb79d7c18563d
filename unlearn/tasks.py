"""Task files: which synthesized images are to be attributed, and to which customized model and exemplars they belong."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import UserError
from .artifacts import read_json, resolve_inside

FIELDS = {"synth_image_path": str, "prompt": str, "test_case": str, "test_case_ind": int, "model_path": str,
          "train_prompt": str, "category": (str, type(None))}
PATH_FIELDS = ("synth_image_path", "model_path")  # results are written under these names
LONGEST_PATH = 1000
LARGEST_FILE = 256 << 20  # bytes; 400 tasks take 150 KB


@dataclass(frozen=True)
class Task:
    """One query. Paths are relative to the data root, except the exemplars', which are resolved."""

    synth_image_path: str
    prompt: str
    test_case: str
    test_case_ind: int
    model_path: str
    train_prompt: str
    category: str | None
    exemplar_paths: tuple[Path, ...]

    @property
    def result_name(self):
        """Folder of the query's results below `results/influence`: its path less `synth/` and the suffix `.png`."""
        return Path(self.synth_image_path).with_suffix("").as_posix().removeprefix("synth/")

    @property
    def model_name(self):
        """Folder of the model's losses below `results/orig_loss`: its path less `models/`."""
        return self.model_path.removeprefix("models/")


def strip_dataset(path):
    """`dataset/exemplar/0.png` -> `exemplar/0.png`: only the first component, and only where it is `dataset`."""
    return str(path).removeprefix("dataset/")


def read_list(path, item):
    """A JSON file that holds a list. Raises UserError where it does not, or is too large to be read."""
    if os.path.isfile(path) and os.path.getsize(path) > LARGEST_FILE:
        raise UserError(f"{item} {path}: larger than {LARGEST_FILE >> 20} MB; not such a file")
    entries = read_json(path, item)
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else type(entries).__name__
        raise UserError(f"{item} {path}: expected a list with at least one entry, found {found}")
    return entries


def read_test_case(dataroot, name):
    """Entries of `json/NAME.json`, one a customized model. Raises UserError where it is missing or malformed."""
    path = resolve_inside(dataroot, f"json/{name}.json", f"test_case {name}")
    if not os.path.isfile(path):
        known = ", ".join(sorted(found.stem for found in (Path(dataroot) / "json").glob("test_*.json"))) or "none"
        raise UserError(f"test_case {name}: no {path}; this data root has: {known}")
    entries = read_list(path, "test case")
    for number, entry in enumerate(entries):
        exemplars = entry.get("exemplar") if isinstance(entry, dict) else None
        if not isinstance(exemplars, list) or not exemplars or not all(isinstance(exemplar, str) for exemplar in exemplars):
            raise UserError(f"test case {path}, entry {number}: expected an object with a list `exemplar` of paths, found {entry!r:.80}")
    return entries


def check_text(item, text):
    """Raises UserError where a string holds what neither a path nor a prompt can: NUL or half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{item}: expected Unicode text, found {text!a:.80}") from None
    if "\0" in text:
        raise UserError(f"{item}: expected text without NUL, found {text!a:.80}")


def check_fields(item, values):
    """Raises UserError where a task lacks a key or a value is of another type, naming task and key."""
    if not isinstance(values, dict):
        raise UserError(f"{item}: expected an object, found {type(values).__name__}")
    for field, kind in FIELDS.items():
        if field not in values:
            raise UserError(f"{item}: key {field} is missing")
        if not isinstance(values[field], kind) or isinstance(values[field], bool):
            expected = "whole number" if kind is int else "string"
            raise UserError(f"{item}: {field}: expected a {expected}, found {values[field]!r:.80}")
        if isinstance(values[field], str):
            check_text(f"{item}: {field}", values[field])


def plain_path(path, item):
    """The shortest spelling of a relative path: `./a//b/` -> `a/b`. Raises UserError where it is absolute or goes up."""
    if len(path) > LONGEST_PATH:
        raise UserError(f"{item}: expected a path of at most {LONGEST_PATH} characters, found {len(path)}: {path:.80}...")
    plain = PurePosixPath(path)
    if plain.is_absolute() or ".." in plain.parts:
        raise UserError(f"{item}: expected a path inside the data root, relative to it and without .., found {path}")
    return plain.as_posix()


def find_file(dataroot, path, item):
    """The existing file below the data root that `path` names, or UserError."""
    check_text(item, path)
    try:
        resolved = resolve_inside(dataroot, path, item)
    except RuntimeError:  # Python before 3.13
        raise UserError(f"{item}: {path}: a symlink that leads to itself") from None
    if not os.path.isfile(resolved):
        raise UserError(f"{item}: no such file: {resolved}")
    return resolved


def make_task(item, values, dataroot, test_cases):
    """Checks one entry of a task file and finds its exemplars. `test_cases` caches the test cases read so far."""
    check_fields(item, values)
    values = {**values, **{field: plain_path(values[field], f"{item}: {field}") for field in PATH_FIELDS}}
    name, index = values["test_case"], values["test_case_ind"]
    if name not in test_cases:
        test_cases[name] = read_test_case(dataroot, name)
    if not 0 <= index < len(test_cases[name]):
        raise UserError(f"{item}: test_case_ind: expected 0 to {len(test_cases[name]) - 1} in {name}, found {index}")
    exemplars = test_cases[name][index]["exemplar"]
    paths = tuple(find_file(dataroot, strip_dataset(path), f"{item}: exemplar") for path in exemplars)
    find_file(dataroot, values["synth_image_path"], f"{item}: synth_image_path")
    if not os.path.isdir(resolve_inside(dataroot, values["model_path"], f"{item}: model_path")):
        raise UserError(f"{item}: model_path: no such folder: {Path(dataroot) / values['model_path']}")
    return Task(**{field: values[field] for field in FIELDS}, exemplar_paths=paths)


def load_tasks(task_json, dataroot):
    """Reads and checks a task file: a list of tasks in its order. Raises UserError naming task, key and value, also
    where two tasks would write to one folder."""
    if not Path(dataroot).is_dir():
        raise UserError(f"--dataroot {dataroot}: no such folder")
    entries, test_cases, first = read_list(task_json, "--task_json"), {}, {}
    tasks = [make_task(f"{task_json}, task {number}", values, dataroot, test_cases) for number, values in enumerate(entries)]
    for number, task in enumerate(tasks):
        other = first.setdefault(task.result_name, number)
        if other != number:
            raise UserError(f"{task_json}, task {number}: synth_image_path {task.synth_image_path}: its results would stand in the "
                            f"folder of task {other} ({tasks[other].synth_image_path}): {task.result_name}")
    return tasks


def group_by_model(tasks):
    """Tasks by customized model, {model path: [task, ...]}, in the order of first appearance.
    Raises UserError where two tasks of a model disagree on its exemplars or train prompt, or two models would share a
    folder of losses."""
    groups, paths = {}, {}
    for task in tasks:
        if (other := paths.setdefault(task.model_name, task.model_path)) != task.model_path:
            raise UserError(f"{task.model_path}: its losses would stand in the folder of {other}: {task.model_name}")
        group = groups.setdefault(task.model_path, [])
        if group and (group[0].exemplar_paths, group[0].train_prompt) != (task.exemplar_paths, task.train_prompt):
            raise UserError(f"{task.model_path}: tasks {group[0].synth_image_path} and {task.synth_image_path} name "
                            "different exemplars or train prompts for one model")
        group.append(task)
    return groups
