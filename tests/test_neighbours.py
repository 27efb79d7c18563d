"""Runs at the same moment in one folder: none finds what another has half written."""

import pytest
from test_attribute import ask, folder, other_query, tiny  # noqa: F401 (fixtures)

from unlearn import UserError
from unlearn.front import planning
from unlearn.storage import records
from unlearn.storage.artifacts import write_bytes
from unlearn.storage.records import keep_complete, record_path, write_record


def call_first(do, function):
    """A function that has `do()` called before it."""

    def call(*args, **more):
        do()
        return function(*args, **more)

    return call


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
