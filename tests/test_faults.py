"""Faults of disks, permissions and neighbours: each ends in one line, leaves nothing half done, and
the next run is as if it had not been. Runs are forks on the miniature root, as in
kill_and_resume.py, of one process a program."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

import pytest

KINDS = {  # program -> faults
    "loss": ["ENOSPC", "EACCES", "truncated", "flipped", "emptied", "record", "neighbour"],
    "influence": ["ENOSPC", "some", "truncated", "flipped", "emptied", "record", "neighbour"],
    "fisher": ["ENOSPC", "truncated", "flipped", "emptied", "record", "neighbour"],
    "gradient": ["ENOSPC"],
    "index": ["ENOSPC", "record"],
}
# The same writers and readers as the other programs', once more.
SLOW = {
    *((name, "ENOSPC") for name in ("influence", "fisher", "gradient", "index")),
    *((name, kind) for name in ("influence", "fisher") for kind in ("flipped", "emptied")),
    ("influence", "truncated"),
    *(("fisher", kind) for kind in ("truncated", "record", "neighbour")),
    *((name, "record") for name in ("influence", "index")),
}
TESTS = Path(__file__).parent


@cache
def inject(name, is_slow):
    """Runs this file on one program with its slow faults or the others, in a process of its own:
    {fault: how often, or what went wrong}."""
    kinds = [kind for kind in KINDS[name] if ((name, kind) in SLOW) == is_slow]
    done = subprocess.run(
        [sys.executable, __file__, name, *kinds],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def count(name, fault):
    found = inject(name, (name, fault) in SLOW)[fault]
    assert isinstance(found, int), found
    return found


def marked(names, faults):
    """Parameters (name, fault), the slow ones marked."""
    return [
        pytest.param(name, fault, marks=pytest.mark.slow if (name, fault) in SLOW else ())
        for fault in faults
        for name in names
    ]


@pytest.mark.parametrize("name,fault", marked(KINDS, ["ENOSPC"]))
def test_a_disk_that_is_full_at_any_write_costs_one_line_and_no_bit(name, fault):
    assert count(name, fault) >= 10


def test_a_disk_that_is_full_at_every_eighth_write_of_the_second_script_costs_one_line_and_no_bit():
    assert count("influence", "some") >= 3


def test_a_permission_that_is_lost_at_any_write_costs_one_line_and_no_bit():
    assert count("loss", "EACCES") >= 10


@pytest.mark.parametrize(
    "name,fault", marked(("loss", "influence", "fisher"), ("truncated", "flipped", "emptied"))
)
def test_a_damaged_chunk_or_checkpoint_is_told_removed_and_made_anew(name, fault):
    assert count(name, fault) == (2 if name == "influence" else 1)


@pytest.mark.parametrize(
    "name,fault", marked(("loss", "influence", "fisher", "index"), ("record",))
)
def test_a_flipped_bit_in_a_record_or_its_artefact_is_told_and_overwritten_only_when_asked(
    name, fault
):
    assert count(name, fault) >= 1


@pytest.mark.parametrize("name,fault", marked(("loss", "influence", "fisher"), ("neighbour",)))
def test_two_jobs_on_the_same_results_end_well_both_with_the_same_bits(name, fault):
    assert count(name, fault) == 2


class Fault:
    """The program under test, its folder, and what an uninterrupted run leaves in it."""

    def __init__(self, name, scratch):
        import kill_and_resume as runs

        runs.prepare()
        self.runs = runs
        self.name = name
        self.folder = scratch / "run"
        self.start = scratch / "start"
        self.first_chunk = {}  # after how many files there is one, of a pattern
        self.start.mkdir()
        if name == "influence":
            runs.run_child(runs.compute_training_loss.main, runs.loss_arguments(self.start))
        self.main, self.arguments = runs.PROGRAMS[name]
        self.reset()
        self.run()
        self.expected = runs.contents(self.folder)

    def reset(self):
        self.runs.reset(self.folder, self.start)

    def run(self, before=lambda: None, main=None, flags=(), processes=1):
        """Runs it as a script in a fork after `before()`: (status, what it printed)."""
        from unlearn.runtime import programs

        def changed(arguments):
            before()
            try:
                programs.run(main or self.main, arguments)
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code)

        return self.runs.run_forks(changed, [*self.arguments(self.folder), *flags], processes)

    def check_good_run(self, *flags):
        [status], text = self.run(flags=flags)
        assert status == 0, text
        assert not self.runs.differences(self.expected, self.runs.contents(self.folder)), text

    def unfinished(self):
        """Names of files half written, and of claims."""
        return {
            path.relative_to(self.folder)
            for path in self.folder.rglob("*")
            if path.name.endswith((".part", ".claim"))
        }

    def check_error(self, outcome, *words, before=frozenset()):
        """One line of error that has these words, and no file half written or claimed but those of
        one killed before, `before`."""
        [status], text = outcome
        assert status == 2 and "Traceback" not in text, text
        assert all(word in text for word in words), text
        assert self.unfinished() <= before, self.unfinished()


def fail_new_write(failed, code, every=1):
    """Makes this process's first write to a file that is not named in the text file `failed` fail,
    and names it there: of a file as it is flushed, of a claim as it is written, of a folder as it
    is made. every: of the files as they are named, those that fail."""
    from unlearn.storage.artifacts import this_machine

    def failing(function):
        def call(where, *args):
            path = (
                os.readlink(f"/proc/self/fd/{where}")
                if isinstance(where, int)
                else os.fspath(where)
            )
            name = path.removesuffix(f".{this_machine()}.{os.getpid()}.part")
            if (
                not os.path.isdir(path)
                and str(failed.parent) in path
                and name not in failed.read_text().splitlines()
            ):
                with failed.open("a") as file:
                    print(name, file=file)
                if len(failed.read_text().splitlines()) % every == 0:
                    raise OSError(code, os.strerror(code), path)
            return function(where, *args)

        return call

    os.fsync, os.write, os.mkdir = map(failing, (os.fsync, os.write, os.mkdir))


def fail_every_write(fault, code, every=1):
    """Every file that a run writes, or of so many one, fails once, the first time that it is written: each run gets one
    file further than the one before, and the last leaves what an uninterrupted one does. Returns
    how many files failed."""
    fault.reset()
    failed = fault.folder.with_name("failed.txt")
    failed.write_text("")
    for number in range(1000):
        outcome = fault.run(lambda: fail_new_write(failed, code, every))
        if outcome[0] == [0]:
            fault.check_good_run()
            return number
        fault.check_error(
            outcome, "run the same command again" if code == errno.ENOSPC else os.strerror(code)
        )


def damage(path, how):
    """Damages a file as disks do."""
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[-40] ^= 1
    path.write_bytes(
        content[: len(content) // 2] if how == "truncated" else b"" if how == "emptied" else content
    )


def result_of(chunk):
    """The record of what a chunk or checkpoint is a part of:
    `.laion_loss-0123456789abcdef/000001-of-000004.npy` -> `laion_loss.json`,
    `weight_change.safetensors.0123456789abcdef.checkpoint` -> `weight_change.json`."""
    if chunk.suffix == ".checkpoint":
        return chunk.with_name(chunk.name.partition(".")[0] + ".json")
    return chunk.parent.with_name(chunk.parent.name[1:].rpartition("-")[0] + ".json")


def damage_chunk(fault, how):
    """A run is killed when it has some chunks, or a checkpoint, of something unfinished, one of
    which is then damaged."""
    count = 0
    for pattern in "*-of-*", "*.checkpoint":
        for renames in range(fault.first_chunk.get(pattern, 1), 12):
            fault.reset()
            fault.runs.run_child(fault.main, fault.arguments(fault.folder), renames=renames)
            chunks = [
                path
                for path in fault.folder.rglob(pattern)
                if path.suffix != ".claim" and not result_of(path).exists()
            ]
            if chunks or pattern != "*-of-*" and fault.name != "influence":
                break
        if chunks:
            fault.first_chunk[pattern] = renames
            damage(chunks[0], how)
            killed = (
                fault.unfinished()
            )  # claims in the folders of queries that are not reached again
            fault.check_error(
                fault.run(), chunks[0].name, "damaged", "run the same command again", before=killed
            )
            fault.check_good_run()
            count += 1
    return count


def damage_records(fault):
    """A bit of each record's identity, and one of each artefact, is flipped."""
    records = [
        name
        for name in fault.expected
        if name.endswith(".json")
        and "influence.json" not in name
        and "orig_loss" not in name
        or name.endswith(".json")
        and fault.name == "loss"
    ]
    for name in records:
        for kind in "record", "artefact":
            fault.run()
            path = fault.folder / name
            artefact = next(other for other in path.parent.glob(f"{path.stem}.*") if other != path)
            if kind == "record":
                record = json.loads(path.read_bytes())
                text = json.dumps(record).replace('"format_version": 1', '"format_version": 3', 1)
                path.write_text(text)
            else:
                damage(artefact, "flipped")
            fault.check_error(fault.run(), artefact.stem)
            fault.check_good_run("--overwrite")
    return len(records)


def run_neighbours(fault):
    """Two jobs that know nothing of each other."""
    fault.reset()
    statuses, text = fault.run(processes=-2)
    assert statuses == [0, 0], text
    assert not fault.runs.differences(fault.expected, fault.runs.contents(fault.folder)), text
    return 2


def run_kind(fault, kind):
    """Injects one kind of fault: how often."""
    if kind in ("ENOSPC", "EACCES"):
        return fail_every_write(fault, getattr(errno, kind))
    if kind == "some":
        return fail_every_write(fault, errno.ENOSPC, every=8)
    return (
        damage_records(fault)
        if kind == "record"
        else run_neighbours(fault)
        if kind == "neighbour"
        else damage_chunk(fault, kind)
    )


def main(name, *kinds):
    """Injects faults into a program; prints how often each, or what went wrong."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        fault = Fault(name, Path(scratch))
        for kind in kinds:
            try:
                fault.reset()
                found[kind] = run_kind(fault, kind)
            except AssertionError as error:
                found[kind] = f"{traceback.format_exc()[-1500:]} {str(error)[-1500:]}"
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main(*sys.argv[1:])
