"""Resume is the same command: killed at any moment and run again, every program leaves the bits of
an uninterrupted run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.storage import reading
from unlearn.storage.artifacts import (
    STALE,
    own_part,
    remove_stale_parts,
    whole_file,
    write_array,
    write_json,
    write_tensors,
)
from unlearn.storage.hashes import hash_file
from unlearn.storage.reading import read_npz

PROGRAM = Path(__file__).parent / "kill_and_resume.py"


def kill_and_resume(*flags):
    done = subprocess.run(
        [sys.executable, PROGRAM, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every resumed run left what an uninterrupted one leaves" in done.stdout


def test_a_kill_at_a_random_moment_changes_no_bit_and_leaves_nothing_behind():
    kill_and_resume("--kills", "1", "--processes", "2", "--programs", "influence")


def test_kills_around_every_finished_file_change_no_bit_and_leave_nothing_behind():
    """Between an artefact and its record, and between a record and the removal of chunks, chance
    hardly ever falls."""
    kill_and_resume("--kills", "0", "--each_rename", "--programs", "loss")


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments_and_kills_around_every_file_change_no_bit_and_leave_nothing_behind():
    kill_and_resume("--kills", "14", "--processes", "1", "2", "4", "--each_rename")


def test_a_weight_change_killed_before_its_record_was_written_is_made_again(flags, tmp_path):
    tasks = tmp_path / "one.json"
    tasks.write_text(json.dumps(json.loads((PARITY / "fixture/tasks.json").read_text())[:1]))
    flags = [*flags, "--task_json", str(tasks), "--laion_subset_size", "1"]
    compute_training_loss.main([*flags, "--time_samples", "1"])
    influence = [
        *flags,
        "--loss_time_samples",
        "1",
        "--unlearn_lr",
        "100",
        "--unlearn_steps",
        "1",
        "--unlearn_batch_size",
        "1",
        "--unlearn_grad_accum_steps",
        "1",
    ]
    compute_influence.main(influence)
    change = (
        tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png/weight_change.safetensors"
    )
    expected = change.read_bytes()
    change.with_suffix(".json").unlink()
    compute_influence.main(influence)
    assert change.read_bytes() == expected and change.with_suffix(".json").exists()


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(KeyboardInterrupt):
        with whole_file(tmp_path / "a.json") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_what_a_killed_writer_left_is_removed_by_the_next_but_not_what_a_living_one_writes(
    tmp_path,
):
    child = os.fork()
    if child == 0:
        with whole_file(tmp_path / "a.json"):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("*.part"))) == 1
    with whole_file(tmp_path / "a.json") as file:
        file.write(b"1")
        assert len(list(tmp_path.glob("*.part"))) == 1
    with whole_file(tmp_path / "b.json") as file:
        file.write(b"1")
        (part,) = tmp_path.glob("b.json.*.part")
        remove_stale_parts(tmp_path / "b.json", own_part(tmp_path / "b.json"))
        assert part.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_what_other_machines_left_is_removed_when_nothing_was_written_there_for_long(tmp_path):
    old, young = (tmp_path / f"a.json.{name}.0123abcd.7.part" for name in ("gone", "slow"))
    for part, age in (old, 2 * STALE), (young, STALE / 2):
        part.write_text("half")
        os.utime(part, (time.time() - age,) * 2)
    write_json(tmp_path / "a.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", young.name]


def test_the_hash_of_what_was_written_is_known_whatever_another_process_writes_there(tmp_path):
    for write, value in (write_array, np.arange(5.0)), (write_tensors, {"a": torch.ones(3)}):
        assert write(tmp_path / "a", value) == hash_file(tmp_path / "a")


@pytest.mark.parametrize(
    "content, said",
    [
        ({"ids": np.array(["a"]), "scores": np.zeros(1)}, r"scores is \[1\] float64"),
        ({"ids": np.arange(3)}, r"ids is \[3\] int64"),
        ({"ids": np.array("a")}, r"ids is \[\] <U1"),
        (b"no archive", "not such a file"),
        (b"", "not such a file"),
    ],
)
def test_arrays_of_another_kind_or_a_damaged_archive_are_told_not_used(content, said, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content) if isinstance(content, bytes) else np.savez(path, **content)
    with pytest.raises(UserError, match=f"a.npz: .*{said}.*make it anew"):
        read_npz(path, {"ids": ("U", 1), "scores": ("f", 2)}, "make it anew")


def test_an_archive_that_would_fill_the_memory_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MOST_ARRAYS", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", ids=np.zeros(1 << 20))
    with pytest.raises(UserError, match="would unfold to more than it may"):
        read_npz(tmp_path / "a.npz", {"ids": ("f", 1)}, "")
