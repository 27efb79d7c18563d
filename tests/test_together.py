"""What several pictures say together of the training images: which none uses, which do the same."""

import csv
import html
import shutil

import numpy as np
import pytest
from test_attribute import PROMPT, QUERY, make_folder, other_query, tiny  # noqa: F401

import unlearn
from unlearn.commands import attribute as command
from unlearn.commands import report
from unlearn.errors import UserError
from unlearn.front.together import KEPT
from unlearn.report.page import write_index
from unlearn.report.together import Together, describe_same


def make_together(**changed):
    given = {
        "names": ["a.png", "=1+1.png", "<b>c</b>.png", "d.png"],
        "captions": ["one", "=2+2", "<i>three</i>", "four"],
        "paths": [None] * 4,
        "pictures": ["p.png", "q.png"],
        "scores": np.array([[0.1, 2.0, 0.3, 0.2], [1.5, 0.1, 0.1, 0.3]]),
        "unused": np.array([False, False, True, True]),
        "groups": [[0, 1]],
        "group_scores": np.array([[2.5], [1.5]]),
        "is_doubtful": False,
    }
    return Together(**{**given, **changed})


def read_table(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))


def test_the_table_says_of_each_image_which_picture_uses_it_most_and_what_does_the_same(tmp_path):
    rows = read_table(make_together().write_table(tmp_path / "images.csv"))
    assert [row["image"] for row in rows] == ["'=1+1.png", "a.png", "<b>c</b>.png", "d.png"]
    assert [row["picture"] for row in rows] == ["p.png", "q.png", "p.png", "q.png"]
    assert [row["used_by"] for row in rows] == ["1", "1", "0", "0"]
    assert [row["unused"] for row in rows] == ["", "", "yes", "yes"]
    assert [row["same_group"] for row in rows] == ["1", "1", "", ""]


def test_names_and_captions_on_the_index_are_text(tmp_path):
    page = write_index(tmp_path, [], make_together()).read_text()
    assert "2 of 4 images are used by none of the 2 pictures." in page
    assert "<b>c" not in page and "<i>three" not in page
    assert "&lt;b&gt;c" in page and "These do the same" in page


def test_that_every_image_is_used_is_said_and_doubts_are_too(capsys):
    make_together(
        unused=np.zeros(4, bool), groups=[], is_doubtful=True, group_scores=np.zeros((2, 0))
    ).show()
    said = capsys.readouterr().out
    assert "Each of the 4 images is used by one of the 2 pictures." in said
    assert "may mean little" in said and "do the same" not in said


def test_a_remark_names_a_few_of_many_groups():
    [remark] = describe_same([[f"{group}-{each}.png" for each in range(7)] for group in range(8)])
    assert "0-4.png and 2 more; 1-0.png" in remark and "and 3 more groups" in remark
    assert "0-5.png" not in remark and "5-0.png" not in remark
    assert describe_same([]) == []


@pytest.fixture(scope="module")
def asked(tmp_path_factory, tiny):
    """Two pictures and ten images, of which two are copies."""
    place = tmp_path_factory.mktemp("together")
    folder = make_folder(place / "mine", 9)
    [first, *_] = sorted(folder.glob("*.png")) or sorted(folder.glob("*.jpg"))
    for suffix in (first.suffix, ".txt"):
        shutil.copy(first.with_suffix(suffix), folder / f"copy{suffix}")
    answers = unlearn.attribute(
        [QUERY, other_query(place / "other.png")],
        tiny,
        folder,
        PROMPT,
        place / "out",
        device="cpu",
    )
    return first, answers


def test_of_several_pictures_copies_are_found_and_count_by_what_they_do_together(asked):
    first, answers = asked
    together = answers[0].together
    assert together is answers[1].together
    groups = [{together.names[row] for row in group} for group in together.groups]
    assert {first.name, "copy.png"} in groups
    same = [row for group in together.groups for row in group]
    for number, rows in enumerate(together.groups):
        joint = together.group_scores[:, number]
        assert (joint > together.scores[:, rows].sum(axis=1)).all()  # copies hide each other
        is_low = joint.max() < together.scores.mean()
        assert (together.unused[rows] == is_low).all()
        assert together.describe_group(number) in html.unescape(answers[0].index.read_text())
    highest = np.max([answer.scores for answer in answers], axis=1)
    assert np.isfinite(highest).all() and together.scores.shape == (2, 10)
    for answer, scores in zip(answers, together.scores):  # in the unit of each picture
        np.testing.assert_allclose(
            scores / scores.max(), answer.scores / answer.scores.max(), rtol=1e-12
        )
        assert any("do the same" in note for note in answer.notes)
        assert "copy.png" in (answer.folder / "report.html").read_text()
    table = read_table(answers[0].index.with_name("images.csv"))
    assert len(table) == 10 and sum(row["same_group"] != "" for row in table) == len(same)
    page = html.unescape(answers[0].index.read_text())
    assert together.describe_unused() in page and "These do the same" in page


def test_the_command_ends_with_what_the_pictures_say_together(asked, capsys, monkeypatch, tiny):
    _, answers = asked
    monkeypatch.setattr("unlearn.front.attribute", lambda **given: answers)
    images = str(answers[0].ranking.paths[0].parent)
    command.main([str(QUERY), "--images", images, "--model", tiny])
    said = capsys.readouterr().out
    assert answers[0].together.describe_unused() in said and "These do the same:" in said


def test_a_page_made_again_says_the_same_until_a_result_is_another(asked, tmp_path):
    _, answers = asked
    results = tmp_path / "results"
    shutil.copytree(answers[0].index.parent, results)
    page = results / "report.html"
    before = page.read_text()
    page.unlink()
    report.main([str(results)])
    said = answers[0].together.describe_unused()
    assert said in html.unescape(page.read_text()) and "These do the same" in page.read_text()
    assert before.count("<img") == page.read_text().count("<img")
    shutil.rmtree(next((results / "influence").rglob("influence.npz")).parent)
    (results / "influence" / "gone").mkdir()
    report.main([str(results)])
    assert said not in html.unescape(page.read_text())


def test_a_damaged_file_of_what_pictures_say_together_is_told(asked, tmp_path):
    _, answers = asked
    results = tmp_path / "results"
    shutil.copytree(answers[0].index.parent, results)
    (results / KEPT).write_bytes(b"PK")
    with pytest.raises(UserError, match="together.npz: not such a file .*; remove it"):
        report.main([str(results)])
