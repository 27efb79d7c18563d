"""`accelerate launch` of both scripts: processes share the work, the bits are those of one process,
and one that is killed takes only its chunk with it. With --device cpu --multi_gpu starts them as it
would on GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import PARITY
from kill_and_resume import contents, differences

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.commands import encode
from unlearn.runtime import programs

ROOT = Path(__file__).parent.parent
COMMON = [
    "--task_json",
    str(PARITY / "fixture/tasks.json"),
    "--dataroot",
    str(PARITY / "fixture/abc"),
    "--sd_version",
    str(PARITY / "fixture/sd-tiny"),
    "--device",
    "cpu",
]
LOSSES = ["--time_samples", "5"]  # two chunks, of 32 and 28 images, of a second or more each
INFLUENCE = [
    "--loss_time_samples",
    "5",
    "--unlearn_lr",
    "100",
    "--unlearn_steps",
    "1",
    "--unlearn_batch_size",
    "2",
    "--unlearn_grad_accum_steps",
    "2",
]
LAUNCH = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


def launch(script, results, *flags):
    """Starts two processes of a script; what they print is read at the end."""
    return subprocess.Popen(
        [*LAUNCH, f"{script}.py", *COMMON, "--result_dir", str(results), *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def kill_a_claims_owner(results, launched):
    """Kills the process that is at the training images' first chunk to be seen in work."""
    while launched.poll() is None:
        for claim in results.glob("orig_loss/tiny/blob/.laion_loss-*/0*.claim"):
            try:
                os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
                return
            except (OSError, ValueError):
                pass  # it was not written yet, or is gone
        time.sleep(0.01)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("expected")
    compute_training_loss.main([*COMMON, *LOSSES, "--result_dir", str(folder)])
    compute_influence.main([*COMMON, *INFLUENCE, "--result_dir", str(folder)])
    return contents(folder)


def test_two_processes_of_each_script_one_of_them_killed_and_started_again_leave_the_bits_of_one(
    expected, tmp_path
):
    first = launch("compute_training_loss", tmp_path, *LOSSES)
    kill_a_claims_owner(tmp_path, first)
    assert first.wait() != 0, first.stdout.read()
    assert not (tmp_path / "orig_loss/tiny/blob/laion_loss.json").exists()
    for script, flags in ("compute_training_loss", LOSSES), ("compute_influence", INFLUENCE):
        again = launch(script, tmp_path, *flags)
        text, _ = again.communicate()
        assert again.returncode == 0 and "[1/2]" in text and "[2/2]" in text, text
    assert differences(expected, contents(tmp_path)) == []


VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PTY_PORT",
)


def set_variables(monkeypatch, text):
    """Sets the variables of launchers to `NAME=value NAME=value`, and no others."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, _, value in (word.partition("=") for word in text.split()):
        monkeypatch.setenv(name, value)


SRUN = "SLURM_PROCID=2 SLURM_LOCALID=2 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4"
SHARES = {  # what launchers set -> (share, device among four)
    "": ((0, 1), "cuda:0"),
    "RANK=2 WORLD_SIZE=4 LOCAL_RANK=1": ((2, 4), "cuda:1"),
    "RANK= WORLD_SIZE= LOCAL_RANK=": ((0, 1), "cuda:0"),
    "RANK=5 WORLD_SIZE=8 LOCAL_RANK=5": ((5, 8), "cuda:1"),  # twice as many processes as devices
    SRUN: ((2, 4), "cuda:2"),
    "SLURM_PROCID=2 SLURM_LOCALID=2 SLURM_NTASKS=4": ((2, 4), "cuda:2"),
    f"{SRUN} WORLD_SIZE=4": ((2, 4), "cuda:2"),  # as job scripts export it for other programs
    f"{SRUN} RANK=0 WORLD_SIZE=1 LOCAL_RANK=0": (
        (0, 1),
        "cuda:0",
    ),  # each task has a launcher of its own
    "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4": ((0, 1), "cuda:0"),  # a batch script
    "SLURM_NTASKS=4": ((0, 1), "cuda:0"),  # a shell of salloc on the login node
    "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4 SLURM_PTY_PORT=4321": (
        (0, 1),
        "cuda:0",
    ),  # srun --pty bash
    "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4": ((0, 4), "cuda:0"),
}


@pytest.mark.parametrize("variables", SHARES)
def test_share_and_device_are_those_of_the_launcher_or_of_the_task_that_srun_started(
    variables, monkeypatch
):
    set_variables(monkeypatch, variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (programs.process_share(), str(programs.choose_device())) == SHARES[variables]


def test_a_task_that_sees_one_device_alone_takes_that(monkeypatch):
    set_variables(monkeypatch, SRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(programs.choose_device()) == "cuda:0"


@pytest.mark.parametrize(
    "variables, said",
    [
        (
            "RANK=x WORLD_SIZE=2",
            "RANK: expected a whole number, as launchers set it, found 'x'; unset RANK",
        ),
        ("WORLD_SIZE=two", "WORLD_SIZE: expected a whole number"),
        ("RANK=-1 WORLD_SIZE=2", "RANK: expected a whole number"),
        ("RANK=2 WORLD_SIZE=2", "RANK: expected at most 1, as WORLD_SIZE is 2, found 2"),
        ("SLURM_PROCID=?", "SLURM_PROCID: expected a whole number"),
        (
            "SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=1.5",
            "SLURM_STEP_NUM_TASKS: expected a whole number",
        ),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_named_and_help_works_all_the_same(
    variables, said, monkeypatch, capsys
):
    set_variables(monkeypatch, variables)
    with pytest.raises(SystemExit) as end:
        programs.run(encode.main, ["--dataroot", "nowhere"])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and said in lines[0], lines
    with pytest.raises(SystemExit) as end:
        programs.run(encode.main, ["--help"])
    assert end.value.code == 0 and "--vae_batch_size" in capsys.readouterr().out


def test_a_local_rank_that_is_no_number_is_named(monkeypatch):
    set_variables(monkeypatch, "LOCAL_RANK=gpu1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="LOCAL_RANK: expected a whole number"):
        programs.choose_device()


def test_an_empty_setting_of_cublas_is_an_unset_one(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    programs.set_precision("fp32")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
