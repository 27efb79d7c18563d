"""Manners of the command line: version, near misses, one line for a mistake, defaults that are shown."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compute_influence
import compute_training_loss
from unlearn import UserError, __version__
from unlearn.commands import attribute, baselines
from unlearn.commands.parsing import GROUPS

ROOT = Path(__file__).parent.parent


def call(*words):
    return subprocess.run(
        [sys.executable, "-m", "unlearn", *words], cwd=ROOT, capture_output=True, text=True
    )


def help_of(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["--version"], 0, __version__),
        (["atribute"], 2, "error: unknown command atribute; did you mean attribute?"),
        (["nonsense"], 2, "error: unknown command nonsense; expected one of attribute,"),
        (
            ["attribute", "--model", "m", "--images", "i", "--promt", "x"],
            2,
            "unrecognized arguments: --promt; did you mean --prompt?; see python -m unlearn",
        ),
    ],
)
def test_version_and_mistakes_are_one_line(words, status, said):
    start = time.monotonic()
    done = call(*words)
    taken = time.monotonic() - start
    assert done.returncode == status
    [line] = (done.stderr or done.stdout).splitlines()
    assert said in line and taken < 5  # 0.2 s where nothing else runs


@pytest.mark.parametrize(
    "picture, images, model, said",
    [
        ("gone.png", "data", "m", "image gone.png: no such file"),
        ("data", "data", "m", "data: expected a picture, found a folder"),
        ("README.md", "gone", "m", "gone: expected a folder of pictures, found no such folder"),
        ("README.md", "README.md", "m", "expected a folder of pictures, found a file; unpack it"),
        ("README.md", "EMPTY", "m", ": no pictures, the folder is empty; give the folder of all"),
        ("README.md", "data", "./gone", "--model ./gone: no such file or folder"),
    ],
)
def test_what_is_not_there_is_told_before_anything_slow_is_imported(
    picture, images, model, said, tmp_path
):
    images = images.replace("EMPTY", str(tmp_path))
    words = ["attribute", picture, "--images", images, "--model", model]
    code = (
        f"import sys\nsys.argv = ['unlearn', *{words!r}]\nfrom unlearn.__main__ import main\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and said in line
    assert done.stdout == "False\n"


def test_without_a_command_and_with_help_all_commands_are_listed():
    plain, helped = call(), call("--help")
    assert plain.stdout == helped.stdout and plain.returncode == helped.returncode == 0
    assert re.findall(r"^  (\w+) ", plain.stdout, re.MULTILINE)[0] == "attribute"


@pytest.mark.parametrize("command", [compute_influence, compute_training_loss, attribute])
def test_flags_stand_in_groups_and_the_defaults_that_decide_the_answer_are_shown(command, capsys):
    shown = help_of(command, capsys)
    titles = re.findall(r"^(\w+):$", shown, re.MULTILINE)
    assert len(set(titles) & set(GROUPS)) >= 4
    for flag in {"--unlearn_lr", "--num_train", "--damping", "--steps", "--guidance", "--out"}:
        if found := re.search(rf"^  {flag} .*\n(?:    .*\n)*", shown, re.MULTILINE):
            assert "default" in found[0], flag


def test_one_quantity_keeps_both_its_flags(capsys):
    assert "--loss_time_samples" in help_of(compute_influence, capsys)
    assert "--time_samples" in help_of(compute_training_loss, capsys)


def test_a_mistake_in_a_script_is_one_line_that_names_the_nearest_flag():
    with pytest.raises(UserError, match="did you mean --task_json"):
        compute_influence.main(["--task_json", "x", "--task_jsn", "y"])
    with pytest.raises(UserError, match="did you mean --methods"):
        baselines.main(["--task_json", "x", "--method_s", "vae"])
