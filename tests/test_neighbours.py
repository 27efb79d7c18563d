"""Runs at the same moment in one folder: none finds what another has half written."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from test_attribute import ask, folder, other_query, tiny  # noqa: F401 (fixtures)
from test_roots import run_together

from unlearn import UserError
from unlearn.baselines.saving import score_tasks
from unlearn.baselines.similarity_methods import Similarity
from unlearn.commands import report as command
from unlearn.evaluation import stored_results
from unlearn.front import costs, jobs, loading, planning
from unlearn.front.assembly import finish_folder
from unlearn.models.weights import INDEX
from unlearn.report import results
from unlearn.storage import leases, records, sharing
from unlearn.storage.artifacts import write_bytes
from unlearn.storage.records import keep_complete, record_path, write_record
from unlearn.storage.sharing import turn


@pytest.fixture
def quick(tiny, monkeypatch):  # noqa: F811
    """A model that is loaded once, and whose pace nobody asks for."""
    monkeypatch.setattr(costs, "measure_pace", lambda *args: costs.Pace(1e-3, 1e-3, 1e-3, 1e-3))
    loaded = loading.load_model(tiny, "cpu")
    monkeypatch.setattr(loading, "load_model", lambda *args, **more: loaded)


def wait_for(seconds, *paths):
    """Whether one of some files appears within so many seconds."""
    end = time.monotonic() + seconds
    while not (found := any(path.exists() for path in paths)) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def call_first(do, function):
    """A function that has `do()` called before it."""

    def call(*args, **more):
        do()
        return function(*args, **more)

    return call


def test_an_answer_is_read_before_another_run_writes_it_anew(
    folder,  # noqa: F811
    tmp_path,
    ask,  # noqa: F811
    quick,
    monkeypatch,
):
    saved, waiting, begun = (tmp_path / name for name in ("saved", "waiting", "begun"))
    [expected] = ask(folder, tmp_path / "out")

    create_claim = sharing.create_claim

    def read_late():  # not before the other run is writing, or waits for this one
        saved.touch()
        assert wait_for(60, begun, waiting)
        wait_for(0.2, begun)

    def claim(path):
        is_mine = create_claim(path)
        if path.name == "influence.claim" and not is_mine:
            waiting.touch()
        return is_mine

    def write_slowly():
        begun.touch()
        time.sleep(0.5)

    def first():
        monkeypatch.setattr(jobs, "read_attribution", call_first(read_late, jobs.read_attribution))
        [answer] = ask(folder, tmp_path / "out")
        np.testing.assert_array_equal(answer.scores, expected.scores)

    def second():
        assert wait_for(60, saved)
        monkeypatch.setattr(sharing, "create_claim", claim)
        # The old record is removed by then, and the new one not written.
        monkeypatch.setattr(results, "whole_file", call_first(write_slowly, results.whole_file))
        ask(folder, tmp_path / "out")

    assert run_together(first, second) == [0, 0]
    assert begun.exists()


def test_what_another_run_has_written_by_now_stays_for_its_readers(
    folder,
    tmp_path,
    ask,
    quick,
    monkeypatch,  # noqa: F811
):
    real, stamps = Similarity.scores, []
    record = tmp_path / "out/results/baselines/similarity/00000.png/influence.json"

    def score_late(method, run):
        monkeypatch.setattr(Similarity, "scores", real)
        score_tasks(run, "similarity", method, 10, is_shown=False)  # the other run's
        stamps.append((record.stat().st_ino, record.stat().st_mtime_ns))
        return real(method, run)

    monkeypatch.setattr(Similarity, "scores", score_late)
    ask(folder, tmp_path / "out")
    assert stamps == [(record.stat().st_ino, record.stat().st_mtime_ns)]


def test_a_record_that_is_removed_as_it_is_looked_at_is_one_that_is_not_there(
    tmp_path, monkeypatch
):
    path, real = tmp_path / "a.npz", records.read_json

    def make():
        write_record(path, {"name": "a"}, content=write_bytes(path, b"content"))

    monkeypatch.setattr(
        records, "read_json", call_first(lambda: record_path(path).unlink(), records.read_json)
    )
    make()
    assert not keep_complete(path, {"name": "a"}, False, "")
    make()
    assert planning.read_part(path, "identity") == {}
    monkeypatch.setattr(records, "read_json", call_first(path.unlink, real))
    make()
    assert not keep_complete(path, {"name": "a"}, False, "")
    monkeypatch.setattr(records, "read_json", real)
    make()
    assert keep_complete(path, {"name": "a"}, False, "")
    record_path(path).write_text("{")  # a damaged one is told, as ever
    with pytest.raises(UserError, match="not valid JSON"):
        keep_complete(path, {"name": "a"}, False, "")


def test_a_page_is_made_of_a_result_that_is_being_written_once_it_is_whole(
    folder,
    tmp_path,
    ask,
    quick,
    monkeypatch,  # noqa: F811
):
    begun, [answer] = tmp_path / "begun", ask(folder, tmp_path / "out")
    path = answer.folder / "influence.npz"

    def write():
        with turn(path):
            record = record_path(path).read_bytes()
            record_path(path).unlink()
            begun.touch()
            time.sleep(0.3)
            write_bytes(record_path(path), record)

    def make_page():
        check = call_first(lambda: wait_for(60, begun), stored_results.check_result)
        monkeypatch.setattr(stored_results, "check_result", check)
        command.main([str(tmp_path / "out/results")])

    listed = stored_results.find_results(tmp_path / "out/results")
    monkeypatch.setattr(stored_results, "find_results", lambda folder: listed)
    assert run_together(write, make_page) == [0, 0]


def test_of_two_runs_that_put_a_model_together_the_first_ones_stays(tmp_path):
    for name in "first", "second":
        (tmp_path / name).mkdir()
        (tmp_path / name / INDEX).write_text(name)
        finish_folder(tmp_path / name, tmp_path / "model")
    assert (tmp_path / "model" / INDEX).read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "model" / INDEX).rename(tmp_path / "model/other")
    (tmp_path / "third").mkdir()
    with pytest.raises(OSError, match="not empty"):  # of what is no model nothing is taken for one
        finish_folder(tmp_path / "third", tmp_path / "model")


def mark_use(folder, owner, age=0.0):
    """The mark of a run on something else in a folder."""
    path = folder / ".in-use-0123456789abcdef-01234567-1.claim"
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_folder_is_refused_while_another_process_uses_it_for_something_else(tmp_path):
    parent = os.getppid()
    living = {**leases.describe_owner(), "pid": parent, "started": leases.start_of(parent)}
    elsewhere = {"host": "another", "pid": 7}
    mark_use(tmp_path, living)
    with pytest.raises(UserError) as error, sharing.occupy(tmp_path, "key", "give another --out"):
        pass
    assert f"in use by process {parent} on {living['host']}, for something else" in str(error.value)
    mark_use(tmp_path, elsewhere)
    with pytest.raises(UserError, match="process 7 on another"):
        with sharing.occupy(tmp_path, "key", ""):
            pass
    for owner, age in ({**living, "started": "0"}, 0.0), (elsewhere, leases.EXPIRY + 60.0):
        path = mark_use(tmp_path, owner, age)  # of one who is gone, or silent
        with sharing.occupy(tmp_path, "key", ""), sharing.occupy(tmp_path, "key", ""):
            assert not path.exists()
    assert not list(tmp_path.iterdir())


def test_of_uses_of_a_folder_each_has_a_mark_of_its_own_and_a_killed_one_s_is_removed(
    tmp_path, monkeypatch
):
    dead = {**leases.describe_owner(), "started": "0"}
    (tmp_path / ".in-use-key-01234567-1.claim").write_text(json.dumps(dead))
    with sharing.occupy(tmp_path, "key", ""):
        with sharing.occupy(tmp_path, "key", ""):
            assert len(list(tmp_path.iterdir())) == 2
        assert len(list(tmp_path.iterdir())) == 1
    create, folders = sharing.create_claim, []

    def remove_first(path):
        """What another process does that was first in the folder, and leaves it."""
        if not folders:
            path.parent.rmdir()
        folders.append(path.parent)
        return create(path)

    monkeypatch.setattr(sharing, "create_claim", remove_first)
    with sharing.occupy(tmp_path / "out", "key", ""):
        assert folders == [tmp_path / "out"] * 2


def test_a_run_on_other_images_is_refused_where_one_is_at_work(
    folder,
    tmp_path,
    ask,
    quick,
    monkeypatch,  # noqa: F811
):
    real = jobs.compare_similarity

    def meanwhile(*args):
        monkeypatch.setattr(jobs, "compare_similarity", real)
        before = (tmp_path / "out/root/originals.json").read_bytes()
        for ending in (".png", ".txt"):
            shutil.copy(folder / f"000005{ending}", folder / f"one more{ending}")
        with pytest.raises(UserError, match="out: is in use by process .* give another --out"):
            ask(folder, tmp_path / "out")
        assert (tmp_path / "out/root/originals.json").read_bytes() == before
        real(*args)

    monkeypatch.setattr(jobs, "compare_similarity", meanwhile)
    [answer] = ask(folder, tmp_path / "out")
    assert np.isfinite(answer.scores).all() and not list((tmp_path / "out").glob(".in-use*"))
