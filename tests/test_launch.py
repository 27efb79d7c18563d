"""`accelerate launch` of both scripts: processes share the work, the bits are those of one process, and one that is killed
takes only its chunk with it. With --device cpu --multi_gpu starts them as it would on GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PARITY
from kill_and_resume import contents, differences

import compute_influence
import compute_training_loss

ROOT = Path(__file__).parent.parent
COMMON = ["--task_json", str(PARITY / "fixture/tasks.json"), "--dataroot", str(PARITY / "fixture/abc"),
          "--sd_version", str(PARITY / "fixture/sd-tiny"), "--device", "cpu"]
LOSSES = ["--time_samples", "5"]  # two chunks, of 32 and 28 images, of a second or more each
INFLUENCE = ["--loss_time_samples", "5", "--unlearn_lr", "100", "--unlearn_steps", "1", "--unlearn_batch_size", "2",
             "--unlearn_grad_accum_steps", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def launch(script, results, *flags):
    """Starts two processes of a script; what they print is read at the end."""
    return subprocess.Popen([*LAUNCH, f"{script}.py", *COMMON, "--result_dir", str(results), *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


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


def test_two_processes_of_each_script_one_of_them_killed_and_started_again_leave_the_bits_of_one(expected, tmp_path):
    first = launch("compute_training_loss", tmp_path, *LOSSES)
    kill_a_claims_owner(tmp_path, first)
    assert first.wait() != 0, first.stdout.read()
    assert not (tmp_path / "orig_loss/tiny/blob/laion_loss.json").exists()
    for script, flags in ("compute_training_loss", LOSSES), ("compute_influence", INFLUENCE):
        again = launch(script, tmp_path, *flags)
        text, _ = again.communicate()
        assert again.returncode == 0 and "[1/2]" in text and "[2/2]" in text, text
    assert differences(expected, contents(tmp_path)) == []
