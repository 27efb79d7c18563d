"""Runs at the same moment in one folder: none finds what another has half written."""

import pytest
from test_attribute import ask, folder, other_query, tiny  # noqa: F401 (fixtures)

from unlearn import UserError
from unlearn.baselines.saving import score_tasks
from unlearn.baselines.similarity_methods import Similarity
from unlearn.front import costs, loading, planning
from unlearn.storage import records
from unlearn.storage.artifacts import write_bytes
from unlearn.storage.records import keep_complete, record_path, write_record


@pytest.fixture
def quick(tiny, monkeypatch):  # noqa: F811
    """A model that is loaded once, and whose pace nobody asks for."""
    monkeypatch.setattr(costs, "measure_pace", lambda *args: costs.Pace(1e-3, 1e-3, 1e-3, 1e-3))
    loaded = loading.load_model(tiny, "cpu")
    monkeypatch.setattr(loading, "load_model", lambda *args, **more: loaded)


def call_first(do, function):
    """A function that has `do()` called before it."""

    def call(*args, **more):
        do()
        return function(*args, **more)

    return call


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
