"""Task files: which synthesized images are to be attributed, and to which customized model and exemplars they belong."""

from dataclasses import dataclass
from pathlib import Path

from . import UserError
from .artifacts import read_json, resolve_inside

FIELDS = {"synth_image_path": str, "prompt": str, "test_case": str, "test_case_ind": int, "model_path": str,
          "train_prompt": str, "category": (str, type(None))}
LARGEST_TASK_FILE = 256 << 20  # bytes; 400 tasks take 150 KB


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


def read_test_case(dataroot, name):
    """Entries of `json/NAME.json`, one a customized model. Raises UserError where it is missing or malformed."""
    path = resolve_inside(dataroot, f"json/{name}.json", f"test_case {name}")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in (Path(dataroot) / "json").glob("test_*.json"))) or "none"
        raise UserError(f"test_case {name}: no {path}; this data root has: {known}")
    entries = read_json(path, "test case")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("exemplar"), list)
                                                and entry["exemplar"] for entry in entries):
        raise UserError(f"test case {path}: expected a list of objects, each with a list `exemplar` of paths")
    return entries


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


def find_file(dataroot, path, item):
    """The existing file below the data root that `path` names, or UserError."""
    resolved = resolve_inside(dataroot, path, item)
    if not resolved.is_file():
        raise UserError(f"{item}: no such file: {resolved}")
    return resolved


def make_task(item, values, dataroot, test_cases):
    """Checks one entry of a task file and finds its exemplars. `test_cases` caches the test cases read so far."""
    check_fields(item, values)
    name, index = values["test_case"], values["test_case_ind"]
    if name not in test_cases:
        test_cases[name] = read_test_case(dataroot, name)
    if not 0 <= index < len(test_cases[name]):
        raise UserError(f"{item}: test_case_ind: expected 0 to {len(test_cases[name]) - 1} in {name}, found {index}")
    exemplars = test_cases[name][index]["exemplar"]
    paths = tuple(find_file(dataroot, strip_dataset(path), f"{item}: exemplar") for path in exemplars)
    find_file(dataroot, values["synth_image_path"], f"{item}: synth_image_path")
    if not resolve_inside(dataroot, values["model_path"], f"{item}: model_path").is_dir():
        raise UserError(f"{item}: model_path: no such folder: {Path(dataroot) / values['model_path']}")
    return Task(**{field: values[field] for field in FIELDS}, exemplar_paths=paths)


def load_tasks(task_json, dataroot):
    """Reads and checks a task file: a list of tasks in its order. Raises UserError naming task, key and value."""
    if not Path(dataroot).is_dir():
        raise UserError(f"--dataroot {dataroot}: no such folder")
    if Path(task_json).is_file() and Path(task_json).stat().st_size > LARGEST_TASK_FILE:
        raise UserError(f"--task_json {task_json}: larger than {LARGEST_TASK_FILE >> 20} MB; not a task file")
    entries = read_json(task_json, "--task_json")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--task_json {task_json}: expected a list of at least one task")
    test_cases = {}
    return [make_task(f"{task_json}, task {number}", values, dataroot, test_cases) for number, values in enumerate(entries)]


def group_by_model(tasks):
    """Tasks by customized model, {model path: [task, ...]}, in the order of first appearance.
    Raises UserError where two tasks of a model disagree on its exemplars or train prompt."""
    groups = {}
    for task in tasks:
        group = groups.setdefault(task.model_path, [])
        if group and (group[0].exemplar_paths, group[0].train_prompt) != (task.exemplar_paths, task.train_prompt):
            raise UserError(f"{task.model_path}: tasks {group[0].synth_image_path} and {task.synth_image_path} name "
                            "different exemplars or train prompts for one model")
        group.append(task)
    return groups
