"""Rules of the house: who imports whom (import-linter, by pyproject.toml's contracts), who parses
arguments, who chooses a device."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["compute_training_loss", "compute_influence"]
MAY_PARSE = {"unlearn.commands", *SCRIPTS}
MAY_ASK_FOR_CUDA = "unlearn.runtime"


def module_name(path):
    """unlearn/noise.py -> unlearn.noise; unlearn/models/__init__.py -> unlearn.models;
    compute_influence.py -> compute_influence."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {
    module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path))
    for path in [
        *sorted((ROOT / "unlearn").rglob("*.py")),
        *(ROOT / f"{name}.py" for name in SCRIPTS),
    ]
}


def is_within(name, packages):
    """Whether a module is one of some packages or modules, or within one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def imports(name):
    """Absolute names of what a module imports, wherever the import stands: `from .. import noise`
    -> unlearn.noise."""
    is_package = (ROOT / name.replace(".", "/") / "__init__.py").exists()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*package[: len(package) - node.level + 1], *filter(None, [node.module])]
                if node.level
                else node.module.split(".")
            )
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def dotted(node):
    """`torch.cuda.is_available` of a syntax tree, '' where a node is no such chain."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def roots(name):
    """Top-level packages that a module imports."""
    return {imported.split(".")[0] for imported in imports(name)}


def test_the_syntax_trees_of_the_whole_house_are_read():
    assert {
        "unlearn",
        "unlearn.noise",
        "unlearn.storage",
        "unlearn.commands.fisher",
        "unlearn.__main__",
        *SCRIPTS,
    } <= TREES.keys()
    assert {"unlearn.storage.chunks", "unlearn.attribution.losses"} <= set(
        imports("unlearn.attribution.newton")
    )
    assert "unlearn.noise" in set(imports("unlearn.attribution.draws"))
    assert {"unlearn.errors"} <= set(imports("unlearn"))


def test_a_package_imports_only_packages_below_it():
    """The layers stand in pyproject.toml; lint-imports names the import that breaks one."""
    finished = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("words", (["check"], ["format", "--check"]), ids=" ".join)
def test_linter_and_formatter_find_nothing(words):
    finished = subprocess.run(
        [Path(sys.executable).with_name("ruff"), *words, "--no-cache", ROOT],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_type_checker_finds_nothing():
    """By [tool.pyright] in pyproject.toml, against the packages of the Python that runs the tests."""
    pyright = shutil.which("pyright", path=Path(sys.executable).parent) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed: pip install '.[test]'")
    try:  # without its extra nodejs it downloads Node.js at its first use
        subprocess.run([pyright, "--version"], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"pyright does not start ({error}); it needs Node.js: pip install '.[test]'")
    finished = subprocess.run(
        [pyright, "--pythonpath", sys.executable], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("name", TREES)
def test_public_functions_say_their_types(name):
    """Of every parameter, and of what they return; those of an overriding method too."""
    bare = [
        f"{function.name}, line {function.lineno}"
        for holder in ast.walk(TREES[name])
        if isinstance(holder, ast.Module | ast.ClassDef)
        for function in holder.body
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_")
        if function.returns is None
        or any(
            parameter.annotation is None
            for parameter in (*function.args.args, *function.args.kwonlyargs)
            if parameter.arg not in ("self", "cls")
        )
    ]
    assert not bare, f"{name}: {bare}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_no_other_script_and_no_command(name):
    commands = {
        f"unlearn.commands.{path.stem}"
        for path in (ROOT / "unlearn/commands").glob("*.py")
        if "def main(" in path.read_text(encoding="utf-8")
    }
    assert not roots(name) & set(SCRIPTS) and not set(imports(name)) & commands


@pytest.mark.parametrize("name", [name for name in TREES if name not in SCRIPTS])
def test_the_package_never_imports_a_script(name):
    assert not roots(name) & set(SCRIPTS)


@pytest.mark.parametrize("name", ["attribute", "convert", "doctor", "report"])
@pytest.mark.parametrize("words, status", [(["--help"], 0), (["--no_such_flag"], 2)], ids=str)
def test_what_newcomers_call_shows_help_and_mistakes_without_what_takes_seconds(
    name, words, status
):
    code = (
        "import sys; from unlearn.__main__ import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'numpy', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == status and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert not status or len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", TREES)
def test_only_scripts_and_commands_parse_arguments(name):
    assert "argparse" not in roots(name) or is_within(name, MAY_PARSE)


def takes_flags(tree):
    """Lines of a module's own functions that take, or of its code that names, `args`: flags as
    argparse gives them. *args is something else."""
    starred = {
        node.args.vararg.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.Lambda) and node.args.vararg
    }
    names = [
        (node.lineno, node.arg if isinstance(node, ast.arg) else node.id)
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.Name)
    ]
    return [line for line, name in names if name == "args" and name not in starred]


@pytest.mark.parametrize("name", [name for name in TREES if not is_within(name, MAY_PARSE)])
def test_only_scripts_and_commands_see_the_command_line(name):
    """Below them are settings and numbers; command lines that messages name are handed down."""
    assert not takes_flags(TREES[name])


@pytest.mark.parametrize(
    "name", [name for name in TREES if not is_within(name, {MAY_ASK_FOR_CUDA})]
)
def test_only_runtime_asks_whether_there_is_a_cuda_device(name):
    asked = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute)
        and dotted(node) in ("torch.cuda.is_available", "torch.cuda.device_count")
    ]
    assert not asked, f"{name}, lines {asked}"


@pytest.mark.parametrize("name", TREES)
def test_no_pickle_is_ever_read(name):
    """Neither by pickle, nor by NumPy or torch on a file's behalf; torch.load always says
    weights_only=True."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "dill", "joblib"):
            assert not {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}, (
                node.lineno
            )
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        assert called not in (
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "joblib.load",
            "dill.load",
        ), node.lineno
        if "allow_pickle" in keywords:
            assert ast.unparse(keywords["allow_pickle"]) == "False", node.lineno
        if called == "torch.load":
            assert "weights_only" in keywords, node.lineno
        if "weights_only" in keywords:
            assert ast.unparse(keywords["weights_only"]) == "True", node.lineno


NUMPY_ONLY = (
    "unlearn.attribution.influence",
    "unlearn.evaluation.metrics",
    "unlearn.evaluation.datamodels",
)


@pytest.mark.parametrize("name", NUMPY_ONLY)
def test_rankings_and_metrics_need_only_numpy(name):
    within = {
        imported
        for imported in imports(name)
        if imported in TREES and (ROOT / f"{imported.replace('.', '/')}.py").exists()
    }
    # collections.abc: in annotations
    assert roots(name) <= {"numpy", "unlearn", "collections"} and within <= set(NUMPY_ONLY)


def test_the_core_imports_no_extra():
    """Plots, fonts and comparisons are extras: the core does without them."""
    core = {
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "numpy",
        "PIL",
        "tqdm",
        "safetensors",
        "tokenizers",
        "huggingface_hub",
        "psutil",
        "packaging",
        "jinja2",
        "markupsafe",  # jinja2's own
    }
    extras = {  # imported where a plot is drawn, and only if it is there; else for annotations only
        f"unlearn.evaluation.{name}": {"matplotlib"}
        for name in ("plots", "plot_styles", "removal_plots")
    }
    extras["unlearn.datasets.hub"] = {"datasets"}  # imported only if it is there
    extras["unlearn.models.architectures"] = {"peft"}  # where what a LoRA needs is counted
    extras["unlearn.models.lora"] = {"peft"}  # likewise
    for name in TREES:
        assert roots(name) <= core | extras.get(name, set()) | {"unlearn"} | set(
            sys.stdlib_module_names
        ), name
