"""Hugging Face data sets as training images: the bytes that they hold, never decoded, and a plain
word where the library is missing."""

import sys

import pytest
from test_folders import draw, pairs_of, refusal

from unlearn import UserError
from unlearn.datasets.folders import read_folder
from unlearn.datasets.hub import is_dataset
from unlearn.datasets.roots import make_data_root

NAMES = ["a.png", "b.jpg", "c.webp", "a.png"]


def save(path, dictionary=False, **columns):
    """A data set of pictures on the disk, as save_to_disk writes it; returns the pictures' bytes."""
    datasets = pytest.importorskip("datasets", minversion="4.0")
    files = []
    for number, name in enumerate(NAMES):
        files.append(path.parent / f"sources {number}" / name)
        draw(files[-1], number)
    data = datasets.Dataset.from_dict({"picture": [str(file) for file in files], **columns})
    data = data.cast_column("picture", datasets.Image())
    (datasets.DatasetDict({"train": data, "test": data}) if dictionary else data).save_to_disk(path)
    return [file.read_bytes() for file in files]


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_saved_data_set_gives_its_own_bytes_and_captions(dictionary, tmp_path):
    content = save(tmp_path / "saved", dictionary, text=list("wxyz"), artist=["A", None, "B", "C"])
    assert is_dataset(tmp_path / "saved")
    found = read_folder(tmp_path / "saved", groups="artist", pictures=tmp_path / "pictures")
    assert pairs_of(found) == [
        ("000003.png", "z"),
        ("a.png", "w"),
        ("b.jpg", "x"),
        ("c.webp", "y"),
    ]
    assert [entry.path.read_bytes() for entry in found.entries] == [
        content[i] for i in (3, 0, 1, 2)
    ]
    assert [entry.group for entry in found.entries] == ["C", "A", None, "B"]
    made = make_data_root(found, tmp_path / "out", {})
    assert made.count == 4
    again = read_folder(tmp_path / "saved", groups="artist", pictures=tmp_path / "pictures")
    assert not make_data_root(again, tmp_path / "out", {}).changes


def test_columns_are_chosen_and_what_is_missing_is_named(tmp_path):
    save(tmp_path / "saved", story=[["1", "2"], ["3"], [], None], text=["x"] * 4)
    found = read_folder(tmp_path / "saved", captions="story", pictures=tmp_path / "pictures")
    assert [entry.captions for entry in found.entries] == [["1", "2"], ["3"]]
    assert found.skipped == {"a row without a caption": ["row 2", "row 3"]}
    said = refusal(tmp_path / "saved", captions="poem", pictures=tmp_path / "pictures")
    assert "--captions poem: " in said and "there: picture, story, text" in said


def test_one_caption_for_all_serves_a_data_set_without_captions(tmp_path):
    save(tmp_path / "saved", label=[1, 2, 3, 4])
    assert "no column text, caption, prompt; there: picture, label" in refusal(
        tmp_path / "saved", pictures=tmp_path / "pictures"
    )
    found = read_folder(tmp_path / "saved", caption="sks", pictures=tmp_path / "pictures")
    assert [entry.captions for entry in found.entries] == [["sks"]] * 4


def test_a_damaged_data_set_is_refused_in_one_line(tmp_path):
    save(tmp_path / "saved", text=list("wxyz"))
    (tmp_path / "saved/state.json").write_text("{")
    assert "cannot be loaded as a data set" in refusal(
        tmp_path / "saved", pictures=tmp_path / "pictures"
    )


@pytest.mark.parametrize("source", ["hf:lambdalabs/pokemon", "saved"])
def test_without_the_library_the_command_that_installs_it_is_said(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in "state.json", "dataset_info.json":
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="pip install 'datasets>=4.0'"):
        read_folder(source, pictures=tmp_path / "pictures")
