"""Rules of the house, held over the syntax trees: who imports whom, who parses arguments, who chooses a device."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["compute_training_loss", "compute_influence"]
LEVELS = {  # a module imports lower levels only, and at levels 2 and 3 siblings, without cycles
    "unlearn": -2, "hashes": -1, "printing": -1,
    "stopping": -0.5, "pictures": 0, "artifacts": 0, "reading": 0, "noise": 0, "runtime": 0,
    "annotations": 0.5, "unets": 0.5, "text_attention": 0.5, "passes": 0.5, "soundness": 0.5,  # datasets read the first, models the others
    "chunks": 0.5, "settings": 0.6, "advice": 0.7, "records": 0.5, "claims": 0.5, "sharing": 0.6, "tasks": 1, "datasets": 1, "models": 1, "encoders": 1, "customization": 1.5,
    "losses": 2, "encoding": 2, "curvature": 2, "newton": 2, "influence": 2, "inputs": 2, "metrics": 2, "baselines": 2, "rankings": 2,
    "queries": 2, "generation": 2, "training": 2, "measures": 2,
    "datamodels": 2, "scores": 2, "retrained": 2, "removal": 2, "tables": 2,
    "projection": 2, "gradients": 2, "sweeps": 2, "derivatives": 2, "compression": 2, "index": 2, "shortlist": 2, "meters": 2, "published": 2,
    "figures": 3, "results": 3, "plans": 3, "plots": 3, "goldstandard": 3, "methods": 3, "scoring": 3,
    "unlearning": 3.5, "retraining": 3, "examination": 3, "inventory": 3, "architectures": 3, "benchmark": 3, "procedures": 3, "scaling": 3, "draws": 3,
}
COMMANDS, MAIN = 4, 5
MAY_PARSE = {"inputs", *SCRIPTS}


def module_name(path):
    """unlearn/noise.py -> noise; unlearn/commands/fisher.py -> commands.fisher; unlearn/__init__.py -> unlearn."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "unlearn" if parts == ("unlearn", "__init__") else ".".join(parts[1:] if parts[0] == "unlearn" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
         for path in [*sorted((ROOT / "unlearn").rglob("*.py")), *(ROOT / f"{name}.py" for name in SCRIPTS)]}


def level(name):
    if name in LEVELS:
        return LEVELS[name]
    if name.startswith("commands."):
        return COMMANDS
    if name == "__main__" or name in SCRIPTS:
        return MAIN
    raise AssertionError(f"unlearn/{name}.py stands in no level of DESIGN.md section 1; give it one, here and there")


def imports(name, tree):
    """Absolute names of what a module imports, wherever the import stands: `from . import noise` -> unlearn.noise."""
    package = ["unlearn", *name.split(".")[:-1]] if name not in ("unlearn", *SCRIPTS) else ["unlearn"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[:len(package) - node.level + 1], *filter(None, [node.module])] if node.level else node.module.split(".")
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def siblings(name):
    """Modules of the package that a module imports, by their name here."""
    found = {imported.removeprefix("unlearn.") for imported in imports(name, TREES[name]) if imported.startswith("unlearn.")}
    return {module for module in found if module in TREES and module != name}


def dotted(node):
    """`torch.cuda.is_available` of a syntax tree, '' where a node is no such chain."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def roots(name):
    """Top-level packages that a module imports."""
    return {imported.split(".")[0] for imported in imports(name, TREES[name])}


def find_cycle(name, trail=()):
    """A ring of imports through `name`, or None."""
    if name in trail:
        return [*trail[trail.index(name):], name]
    return next(filter(None, (find_cycle(other, (*trail, name)) for other in sorted(siblings(name)))), None)


def test_the_syntax_trees_of_the_whole_house_are_read():
    assert {"unlearn", "losses", "commands.fisher", "__main__", *SCRIPTS} <= TREES.keys()
    assert siblings("newton") == {"noise", "chunks", "hashes", "losses", "models", "runtime", "derivatives",
                                  "text_attention", "settings"}
    assert siblings("commands.fisher") >= {"noise", "artifacts", "curvature", "inputs"}
    assert siblings("compute_influence") >= {"noise", "results", "newton"}


@pytest.mark.parametrize("name", TREES)
def test_a_module_imports_only_lower_levels(name):
    own = level(name)
    for other in siblings(name):
        allowed = level(other) < own or (level(other) == own and own in (2, 3))
        assert allowed, f"{name} (level {own}) imports {other} (level {level(other)})"


@pytest.mark.parametrize("name", TREES)
def test_no_imports_go_in_a_circle(name):
    assert find_cycle(name) is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_never_import_each_other_nor_a_command(name):
    assert not roots(name) & set(SCRIPTS)
    assert not any(other.startswith("commands") for other in siblings(name))


@pytest.mark.parametrize("name", [name for name in TREES if name not in SCRIPTS])
def test_the_package_never_imports_a_script(name):
    assert not roots(name) & set(SCRIPTS)


@pytest.mark.parametrize("name", TREES)
def test_only_scripts_commands_and_inputs_parse_arguments(name):
    assert "argparse" not in roots(name) or name in MAY_PARSE or name.startswith("commands.")


@pytest.mark.parametrize("name", [name for name in TREES if name != "runtime"])
def test_only_runtime_asks_whether_there_is_a_cuda_device(name):
    asked = [node.lineno for node in ast.walk(TREES[name])
             if isinstance(node, ast.Attribute) and dotted(node) in ("torch.cuda.is_available", "torch.cuda.device_count")]
    assert not asked, f"{name}, lines {asked}"


@pytest.mark.parametrize("name", TREES)
def test_no_pickle_is_ever_read(name):
    """Neither by pickle, nor by NumPy or torch on a file's behalf; torch.load always says weights_only=True."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib"):
            assert not {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}, node.lineno
        if not isinstance(node, ast.Call):
            continue
        called, keywords = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"), node.lineno
        if "allow_pickle" in keywords:
            assert ast.unparse(keywords["allow_pickle"]) == "False", node.lineno
        if called == "torch.load":
            assert "weights_only" in keywords, node.lineno
        if "weights_only" in keywords:
            assert ast.unparse(keywords["weights_only"]) == "True", node.lineno


NUMPY_ONLY = "influence", "metrics", "datamodels"


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_rankings_and_metrics_need_only_numpy(name):
    assert roots(name) <= {"numpy", "unlearn"} and siblings(name) <= set(NUMPY_ONLY)


def test_the_core_imports_no_extra():
    """Plots, fonts and comparisons are extras: the core does without them."""
    core = {"torch", "diffusers", "transformers", "accelerate", "numpy", "PIL", "tqdm", "safetensors", "tokenizers", "huggingface_hub",
            "psutil", "packaging"}  # the last two come with accelerate
    extras = {"plots": {"matplotlib"}}  # imported where a plot is drawn, and only if it is there
    for name in TREES:
        assert roots(name) <= core | extras.get(name, set()) | {"unlearn"} | set(sys.stdlib_module_names), name
