"""What makes an answer doubtful softens every sentence that says that an image stands out."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from unlearn.datasets.entries import Entry, Found
from unlearn.evaluation.stored_results import read_labels
from unlearn.front.answers import Attribution
from unlearn.front.cautions import (
    check_copy,
    check_crop,
    check_crops,
    check_prompt,
    describe_left_out,
    list_left_out,
)
from unlearn.front.questions import Question
from unlearn.report.contents import Report, Row
from unlearn.report.page import index_entry, write_report
from unlearn.report.ranking import Ranking

CAPTIONS = ["a photo of two cats", "the red house", "赤い家"]


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a cat on a roof", False),
        ("RED", False),
        ("houses", False),
        ("家と空", False),
        ("a photo of a dog", True),
        ("犬", True),
        ("of the", False),  # no word that tells anything
    ],
)
def test_a_prompt_of_which_no_caption_has_a_word_is_said(prompt, said):
    found = check_prompt(prompt, CAPTIONS)
    assert [text.startswith("no caption has a word of the prompt") for text in found] == [
        True
    ] * said


def make_found(folder, sizes):
    folder.mkdir(exist_ok=True)
    entries = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.new("RGB", size, (number, 0, 0)).save(path)
        entries.append(Entry(path, path.name, ["a caption"]))
    return Found(str(folder), entries, "test")


@pytest.mark.parametrize(
    "sizes, cautions, remarks",
    [
        ([(8, 8), (8, 11)], 0, 0),
        ([(8, 8), (8, 12)], 0, 1),
        ([(8, 8), (8, 12), (30, 8)], 1, 0),
    ],
)
def test_cropped_images_are_a_remark_and_where_most_are_a_caution(
    sizes, cautions, remarks, tmp_path
):
    found = check_crops(make_found(tmp_path, sizes))
    assert [len(part) for part in found] == [cautions, remarks]
    assert all("only the square in their centre" in text for part in found for text in part)


def test_a_long_picture_is_a_caution_unless_the_model_made_it_here(tmp_path):
    Image.new("RGB", (30, 8)).save(tmp_path / "long.png")
    assert "long or tall" in check_crop(Question(tmp_path / "long.png", "p"))[0]
    assert check_crop(Question(tmp_path / "long.png", "p", latents="latents.npy")) == []


def test_a_copy_of_a_training_image_is_named(tmp_path):
    found = make_found(tmp_path / "images", [(8, 8), (8, 8)])
    (tmp_path / "copy.png").write_bytes(found.entries[1].path.read_bytes())
    [said] = check_copy(found, Question(tmp_path / "copy.png", "p"))
    assert "is a training image itself (1.png)" in said


@pytest.mark.parametrize(
    "skipped, said",
    [
        ({}, []),
        ({"a .txt file without a picture": ["a.txt"], "hidden": ["._b.png"]}, []),
        (
            {"without a caption": ["a.png", "b.png", "<c>.png", "d.png"], "it is gone": ["e.webp"]},
            [
                "5 of 7 images were left out and cannot appear in the ranking: a.png, b.png, <c>.png, ... "
                "(without a caption); e.webp (it is gone)."
            ],
        ),
        (
            {"a caption": ["row 4"]},
            ["1 of 3 images was left out and cannot appear in the ranking: row 4 (a caption)."],
        ),
    ],
)
def test_images_that_were_left_out_are_a_remark_with_names_and_reasons(skipped, said, tmp_path):
    found = make_found(tmp_path, [(8, 8), (8, 8)])
    found.skipped.update(skipped)
    names = [entry.name for entry in found.entries]

    def describe(kept):
        images = SimpleNamespace(paths=[tmp_path / "images" / name for name in kept])
        return describe_left_out(list_left_out(found, images, tmp_path), len(kept))

    assert describe(names) == said
    [unread] = describe(names[:1])
    assert "1.png (cannot be read)" in unread


def test_what_was_left_out_stands_escaped_at_the_top_of_the_page_and_at_the_end_of_the_table(
    tmp_path, capsys
):
    answer = make_answer(tmp_path, [])
    answer.report.remarks.append("1 of 61 images was left out: <b>.png (no caption).")
    page = write_report(tmp_path, answer.report).read_text(encoding="utf-8")
    assert page.index("left out: &lt;b&gt;.png") < page.index('<section id="images"')
    assert "stands out clearly" in read_heading(tmp_path / "report.html")
    answer.show(3)
    shown = capsys.readouterr().out
    assert "Note: 1 of 61 images was left out: <b>.png (no caption).\n" in shown
    assert "Warning" not in shown and answer.notes and not answer.warnings


def make_answer(folder, cautions, caption="a caption"):
    """An answer of 60 images of which 7.png stands out clearly, and what its folder needs."""
    scores = np.random.default_rng(0).normal(size=60)
    scores[7] = 30.0
    order = np.argsort(-scores)
    ids = [f"laion/{number:06d}" for number in range(60)]
    paths = [Path(f"/pictures/{number}.png") for number in range(60)]
    ranking = Ranking(
        ids, [caption] * 60, list(paths), scores, order, np.zeros(60, bool), list(cautions)
    )
    rows = [
        Row(ids[n], paths[n].name, caption, float(scores[n]), other_rank=int(n) + 1) for n in order
    ]
    return Attribution(
        Question(folder / "q.png", "p"), ranking, Report("q", rows, cautions=cautions), folder
    )


def read_heading(path):
    text = path.read_text(encoding="utf-8")
    return text[text.index("<h1>") : text.index("</h1>")]


def test_what_speaks_against_a_result_softens_the_sentence_on_screen_page_and_index(
    tmp_path, capsys
):
    plain, doubtful = (make_answer(tmp_path, cautions) for cautions in ([], ["it is a copy"]))
    assert plain.summary == "One of 60 images stands out clearly: 7.png."
    assert doubtful.summary == (
        "One of 60 images stands out, but the result may mean little. By the scores alone: 7.png."
    )
    assert "stands out clearly" in read_heading(write_report(tmp_path, plain.report))
    page = write_report(tmp_path, doubtful.report)
    assert "may mean little" in read_heading(page) and "clearly" not in page.read_text()
    assert index_entry("link", doubtful.report).headline.endswith("may mean little.")
    doubtful.show(3)
    shown = capsys.readouterr().out
    assert "Warning: it is a copy." in shown and "clearly" not in shown


def test_a_few_images_weak_evidence_is_said_in_the_same_words_on_screen_and_page(tmp_path, capsys):
    answer = make_answer(tmp_path, [])
    few = Attribution(
        answer.question,
        replace(answer.ranking, scores=answer.scores[:39]),
        replace(answer.report, rows=answer.report.rows[:39]),
        tmp_path,
    )
    few.show(3)
    shown = capsys.readouterr().out
    page = write_report(tmp_path, few.report).read_text(encoding="utf-8")
    assert "(stands out: needs at least 40 images)" in shown
    assert few.summary.endswith("The order is weak evidence.")
    assert "The order is weak evidence." in page
    assert "Only the images that were given can be found." in page
    answer.show(3)
    assert "needs at least" not in capsys.readouterr().out


def test_the_page_says_first_which_files_stand_out(tmp_path):
    page = write_report(tmp_path, make_answer(tmp_path, []).report).read_text(encoding="utf-8")
    assert "It is 7.png (“a caption”)." in page


def test_the_table_of_an_answer_has_a_column_for_every_number_and_its_captions_come_back(tmp_path):
    answer = make_answer(tmp_path, ["it is a copy"], caption="=1+1, a sum")
    answer.write_table()
    with open(tmp_path / "influence.csv", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["similarity_rank"]) for row in rows] == [
        row["similarity_rank"] for row in answer.table()
    ]
    assert float(rows[0]["stands_out"]) > 1 > float(rows[1]["stands_out"])
    assert {row["warning"] for row in rows} == {"it is a copy"}
    assert {row["caption"] for row in rows} == {"'=1+1, a sum"}  # no formula to a spreadsheet
    labels = read_labels(tmp_path / "influence.csv")
    assert {caption for caption, _ in labels.values()} == {"=1+1, a sum"}
