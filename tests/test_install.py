"""The package as `pip install .` leaves it: a wheel, without the checkout around it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what a wheel of this project installs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, for building leaves its traces
    shutil.copytree(
        ROOT / "unlearn", source / "unlearn", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "compute_influence.py",
        "compute_training_loss.py",
    ):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            folder,
            source,
        ],
        check=True,
        capture_output=True,
    )
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed, *words):
    """A command of the installed package, from a folder that is no checkout."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_a_wheel_holds_both_scripts_every_package_and_the_command(installed):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "unlearn").rglob("*.py")}
    assert modules <= {path.relative_to(installed).as_posix() for path in installed.rglob("*.py")}
    parts = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "unlearn/report").iterdir()
        if path.suffix in (".html", ".css", ".js")
    }
    assert len(parts) == 5 and all((installed / part).is_file() for part in parts)
    assert (installed / "unlearn/py.typed").is_file()  # else checkers do not look at its types
    assert (installed / "compute_influence.py").is_file() and (
        installed / "compute_training_loss.py"
    ).is_file()
    [entries] = installed.glob("*.dist-info/entry_points.txt")
    assert "unlearn = unlearn.__main__:main" in entries.read_text()


def test_the_doctor_of_an_installed_package_names_its_requirements(installed):
    ended = run(installed, "-m", "unlearn", "doctor", "--dataroot", str(ROOT / "data/emoji"))
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "torch " in ended.stdout and "psutil " in ended.stdout and "pytest" not in ended.stdout


def test_an_installed_script_is_found_by_the_commands_that_messages_print(installed):
    said = run(
        installed,
        "-c",
        "from unlearn.commands import advice; print(advice.find_program('compute_influence.py')[0]); "
        "print(advice.__file__)",
    )
    program, module = said.stdout.split()
    assert Path(program).is_file() and Path(module).is_relative_to(installed)
