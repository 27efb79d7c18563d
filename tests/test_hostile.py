"""Generated bad inputs, by the hundred here and by the thousand in the slow test: no traceback, no
hang, nothing half done, and no code of theirs is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "bad_inputs.py"


def run(*flags):
    done = subprocess.run(
        [sys.executable, PROGRAM, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_a_hundred_bad_inputs_end_in_one_line_and_leave_nothing():
    run("--count", "100")


@pytest.mark.slow
def test_seven_thousand_bad_inputs_and_fifty_as_processes_end_in_one_line_and_leave_nothing():
    run("--count", "7000", "--subprocesses", "50")
