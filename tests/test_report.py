"""The page of a result: safe to open, complete in itself, honest about what stands out, made of any
folder of results."""

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image
from test_bad_input import files, refused
from test_base_model_tasks import attribute, lent  # noqa: F401 (fixtures)

import compute_influence
from unlearn.commands import report as command
from unlearn.evaluation.stored_results import name_images, read_report
from unlearn.report import page
from unlearn.report.contents import Chosen, Report, Row, share_groups
from unlearn.report.page import write_report
from unlearn.report.plot import plot_scores, round_ticks
from unlearn.report.standing_out import (
    FEWEST,
    LEVEL,
    describe_standing_out,
    find_standing_out,
    measure_tail,
    weigh_gaps,
)
from unlearn.report.thumbnails import make_thumbnail
from unlearn.storage import records
from unlearn.storage.records import record_path, write_record

HOSTILE = "</script><script>window.hit=1</script>\"><img src=x onerror=window.hit=1>'`{{7*7}}\u202e"
VOID = {"meta", "img", "input", "br", "wbr", "link", "rect", "path", "circle"}
NOISE = {
    "normal": lambda draw, n: draw.normal(size=n),
    "uniform": lambda draw, n: draw.uniform(size=n),
    "laplace": lambda draw, n: draw.laplace(size=n),
    "exponential": lambda draw, n: draw.exponential(size=n),
    "larger of two": lambda draw, n: draw.normal(size=(2, n)).max(axis=0),
    "student's t, 3 degrees": lambda draw, n: draw.standard_t(3, size=n),
}


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)], and the text of its scripts and headings."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"{tag} is not closed where it should be"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        """Attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        """What is read on the page."""
        shown = [data for tag, data in self.texts.items() if tag not in ("script", "style")]
        return " ".join(" ".join(sum(shown, [])).split())

    @property
    def data(self):
        """What the page's script reads."""
        return json.loads(self.texts["script"][0])


def make_rows(scores, **more):
    """Rows of these scores."""
    return [
        Row(f"laion/{n:06d}", f"{n}.png", f"caption {n}", float(score), **more)
        for n, score in enumerate(sorted(scores, reverse=True))
    ]


def some_scores(count=100, seed=0):
    return np.random.default_rng(seed).normal(size=count)


@pytest.fixture
def picture(tmp_path):
    """A photograph with a comment and a place in its EXIF."""
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[271] = "the maker of a camera"
    path = tmp_path / "picture.jpg"
    Image.fromarray(noise).save(path, exif=exif, comment=b"where somebody lives")
    return path


@pytest.fixture
def results(tmp_path, root, monkeypatch):
    """A folder of results as an older version wrote it: two queries, no prompt in their records."""
    monkeypatch.setattr(records, "NAMES", {})
    folder = tmp_path / "results"
    for number in range(2):
        query = folder / f"influence/tiny/gpt/blob/samples/0000{number}.png"
        query.mkdir(parents=True)
        scores = np.r_[9.0, some_scores(60, number)]
        ids = ["exemplar/tiny/0.png", *(f"laion/{n:06d}" for n in range(60))]
        write_ranking(query / "influence.npz", ids, scores, np.arange(61) == 0)
    return folder


def write_ranking(path, ids, scores, is_exemplar, **more):
    """Writes an influence file and its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = np.argsort(-scores, kind="stable")
    arrays = {"ids": np.array(ids), "influence": scores, "rank": order, "is_exemplar": is_exemplar}
    np.savez(path, **arrays, **more)
    settings = {"unlearn_lr": 0.5, "unlearn_batch_size": 16, "unlearn_grad_accum_steps": 100}
    write_record(path, {"settings": settings})


# --- what stands out


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("count", [FEWEST, 150, 1500])
def test_of_random_scores_at_most_one_ranking_in_twenty_holds_an_image_that_stands_out(
    noise, count
):
    draw, trials = np.random.default_rng(count), 600
    called = [find_standing_out(NOISE[noise](draw, count)).count > 0 for _ in range(trials)]
    assert np.mean(called) <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


@pytest.mark.parametrize("count", [FEWEST, 1000])
def test_the_bound_of_an_exponential_tail_is_passed_as_often_as_it_says(count):
    draw, trials = np.random.default_rng(1), 3000
    far = parted = 0
    for _ in range(trials):
        falling = np.sort(draw.exponential(size=count))[::-1]
        tail = measure_tail(falling)
        allowed = tail.factor * tail.spread
        far += falling[0] > tail.start + allowed
        parted += weigh_gaps(falling, tail.num_upper).max() > allowed
    error = 4 * (LEVEL / 2 * (1 - LEVEL / 2) / trials) ** 0.5
    assert far / trials == pytest.approx(LEVEL / 2, abs=error)
    assert parted / trials == pytest.approx(LEVEL / 2, abs=error)


def test_a_group_that_a_gap_parts_from_the_others_stands_out():
    scores = np.r_[np.random.default_rng(0).uniform(-0.4, 0.5, 1400), np.linspace(0.8, 0.9, 9)]
    found = find_standing_out(scores)
    assert found.count == 9 and found.by_gap and 0.5 < found.bound < 0.8
    headline, explanation = describe_standing_out(found, 1409)
    assert headline == "9 of 1,409 images stand out clearly." and "The gap" in explanation
    assert find_standing_out(-scores).count == 0
    nearer = find_standing_out(np.where(scores > 0.7, scores - 0.14, scores))
    assert nearer.count == 9 and 1 < nearer.clarity < 2
    assert describe_standing_out(nearer, 1409)[0] == "9 of 1,409 images stand out as a group."


@pytest.mark.parametrize("planted", [1, 4])
def test_images_far_above_the_noise_stand_out_and_no_others(planted):
    scores = some_scores(500)
    scores[7 : 7 + planted] = 25 + np.arange(planted)
    found = find_standing_out(scores)
    assert found.count == planted and found.clarity >= 2
    headline, _ = describe_standing_out(found, 500)
    assert "out clearly" in headline and ("One of 500" in headline) == (planted == 1)


def test_what_stands_out_does_not_depend_on_the_scale_or_order_of_the_scores():
    scores = np.r_[some_scores(300), 14, 12]
    found = find_standing_out(scores)
    other = find_standing_out(scores[::-1] * 1e-6)
    assert found.count == other.count == 2 and found.clarity == pytest.approx(other.clarity)


def test_of_few_images_and_of_equal_scores_nothing_is_said_to_stand_out():
    few = find_standing_out(np.r_[some_scores(FEWEST - 2), 100.0])
    tied = find_standing_out(np.full(100, 0.25))
    assert few.count == tied.count == 0
    assert "cannot be told" in describe_standing_out(few, FEWEST - 1)[0]
    assert "same score" in describe_standing_out(tied, 100)[0]
    assert (
        "None of the 1,000" in describe_standing_out(find_standing_out(some_scores(1000)), 1000)[0]
    )


def test_the_plot_counts_every_image_and_its_dots_stand_at_their_scores():
    scores = np.sort(some_scores(1000))[::-1]
    plot = plot_scores(scores, 10, None)
    assert [dot["rank"] for dot in plot["dots"]] == list(range(1, 11))
    places = [dot["x"] for dot in plot["dots"]]
    assert places == sorted(places, reverse=True) and places[0] == plot["right"]
    assert sum(dot["is_named"] for dot in plot["dots"]) >= 1 and plot["bound"] is None
    assert all(0 <= bar["x"] <= plot["width"] and bar["height"] > 0 for bar in plot["bars"])
    assert plot_scores(np.ones(9), 3, None) is None


def test_the_levels_of_the_plot_are_the_numbers_of_images_at_their_bars_heights():
    scores = np.repeat([3.0, 2.0, 1.0], [1, 10, 150])  # three bars
    plot = plot_scores(scores, 1, None)
    assert [level["text"] for level in plot["levels"]] == ["1", "10", "100"]
    heights = sorted(bar["height"] for bar in plot["bars"])
    levels = [round(plot["axis"] - level["y"], 1) for level in plot["levels"]]
    assert levels[:2] == heights[:2] and levels[1] < levels[2] < heights[2]
    few = plot_scores(np.repeat([3.0, 1.0], [1, 7]), 1, None)
    assert [level["text"] for level in few["levels"]] == ["1", "2", "5"]


@pytest.mark.parametrize("low, high", [(-1e-3, 2e-2), (0, 1), (-3e5, 2), (0.99, 1.0), (1e-9, 3e-9)])
def test_ticks_are_few_and_within_the_scores(low, high):
    ticks = round_ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 6 and low - slack <= ticks[0] and ticks[-1] <= high + slack


# --- the page


@pytest.fixture
def hostile(tmp_path, picture):
    """The page of a report all of whose texts are an attack."""
    rows = [
        Row(
            HOSTILE,
            HOSTILE,
            HOSTILE,
            float(score),
            is_exemplar=score > 1,
            path=picture,
            low=-1.0,
            high=1.0,
            is_estimate=True,
            other_rank=1,
            group=HOSTILE if score > 0 else "b",
        )
        for score in sorted([*some_scores(80), 30], reverse=True)
    ]
    report = Report(
        HOSTILE,
        rows,
        picture,
        HOSTILE,
        [(HOSTILE, HOSTILE)],
        HOSTILE,
        [(HOSTILE, HOSTILE)],
        [HOSTILE],
        [HOSTILE],
        HOSTILE,
        share_groups(rows),
        HOSTILE,
        chosen=[Chosen(rows[7], 8, 3.0), Chosen(rows[2], 3, 1.0)],
    )
    return write_report(tmp_path, report)


def test_a_caption_with_a_script_in_it_is_text(hostile):
    found = Page(hostile)
    assert len(found.all("script")) == 2 and not found.open
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "style" not in {name for _, attributes in found.elements for name in attributes}
    assert all(image["src"].startswith("data:image/") for image in found.all("img"))
    shown = HOSTILE.replace("\u202e", "\\u202e")  # what turns the writing round is named
    assert "\u202e" not in found.source and "{{7*7}}" in found.source
    assert shown in found.text.replace("/ ", "/") and found.data["rows"][0][:2] == [shown, shown]


def test_a_page_loads_nothing_and_runs_no_other_script(hostile):
    found = Page(hostile)
    addresses = [
        attributes[name]
        for _, attributes in found.elements
        for name in ("src", "href", "action", "srcset", "poster", "data")
        if name in attributes
    ]
    assert addresses and all(re.match("#[\\w-]+$|data:image/", address) for address in addresses)
    assert "@import" not in found.texts["style"][0] and "url(" not in found.texts["style"][0]
    assert not {"link", "iframe", "object", "base", "embed"} & {tag for tag, _ in found.elements}
    policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    _, script_hash = page.read_part("page.js")
    assert "default-src 'none'" in policy and f"script-src {script_hash}" in policy
    assert "unsafe" not in policy and found.texts["script"][1] == page.read_part("page.js")[0]


def test_every_picture_has_words_and_every_control_a_name(hostile):
    found = Page(hostile)
    assert len(found.all("img")) == 1 + 60 + 2 + 12 and all(
        image["alt"] for image in found.all("img")
    )
    assert all("width" in image and "height" in image for image in found.all("img"))
    links = [link for link in found.all("a") if "frame" in link.get("class", "")]
    assert links and all(link["aria-label"] for link in links)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {link["href"][1:] for link in found.all("a")}
    named = {
        attributes.get("aria-labelledby", "").split(" ")[0] for _, attributes in found.elements
    }
    assert targets | named - {""} <= set(ids)
    assert found.all("html")[0]["lang"] == "en" and len(found.all("h1")) == 1


def test_colours_of_text_contrast_with_the_page_in_both_looks():
    style = page.read_part("page.css")[0]
    looks = [dict(re.findall(r"--([\w-]+): (#\w+)", part)) for part in style.split("@media")[:2]]

    def luminance(colour):
        colour = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(text, "paper") for text in ("ink", "soft", "accent", "mark", "red")]
    for look in looks:
        for text, ground in [*pairs, ("red", "red-sheet"), ("red", "sheet"), ("soft", "sheet")]:
            light, dark = sorted((luminance(look[text]), luminance(look[ground])))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, look[text])


def test_thumbnails_are_small_and_keep_nothing_of_the_file_but_its_pixels(picture):
    found = make_thumbnail(picture, 256)
    data = base64.b64decode(found["src"].partition(",")[2])
    assert (found["width"], found["height"]) == (256, 192) and len(data) < 60_000
    assert found["src"].startswith("data:image/jpeg") and not found["is_tiny"]
    image = Image.open(io.BytesIO(data))
    assert not image.getexif() and "comment" not in image.info and b"somebody" not in data


def test_a_tiny_picture_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tiny.png")
    found = make_thumbnail(tmp_path / "tiny.png", 256)
    data = base64.b64decode(found["src"].partition(",")[2])
    assert found["is_tiny"] and np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


def test_pictures_that_cannot_be_read_are_left_out_and_counted(tmp_path, picture):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    paths = [picture, broken, tmp_path / "gone.png", None]
    rows = [
        Row(str(n), f"{n}.png", "", 1.0 - n, path=path) for n, path in enumerate(paths)
    ]  # two positive or zero, two negative
    found = Page(write_report(tmp_path, Report("query", rows)))
    assert "3 of 4 pictures could not be found or read" in found.text
    assert len(found.all("img")) == 1
    assert sum(span.get("role") == "img" for span in found.all("span")) == 3 + 1  # and the query


@pytest.mark.parametrize("count", [1, 5, 20, 73, 200])
def test_every_image_stands_on_the_page_and_none_on_two_cards(tmp_path, count):
    scores = some_scores(count)
    found = Page(write_report(tmp_path, Report("query", make_rows(scores))))
    cards = [attributes["id"] for attributes in found.all("li") if "id" in attributes]
    negative = int((scores < 0).sum())
    assert len(cards) == len(set(cards)) == min(60, count - min(12, negative)) + min(12, negative)
    assert len(found.data["rows"]) == count
    assert ("These held it back" in found.text) == bool(negative)


def test_a_page_of_very_many_images_lists_the_highest_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_ROWS", 50)
    found = Page(write_report(tmp_path, Report("query", make_rows(some_scores(120)))))
    assert len(found.data["rows"]) == 50 and "The highest 50 are listed here" in found.text


def test_shares_of_groups_sum_to_one_and_count_positive_scores_only():
    rows = [
        Row("a", "a", "", 3.0, group="x"),
        Row("b", "b", "", 1.0, group="y"),
        Row("c", "c", "", -5.0, group="x"),
    ]
    groups = share_groups(rows)
    assert [(group.name, group.share, group.num_images) for group in groups] == [
        ("x", 0.75, 2),
        ("y", 0.25, 1),
    ]
    assert sum(group.share_of_images for group in groups) == pytest.approx(1)
    assert share_groups([Row("a", "a", "", 1.0, group="x")]) == []


def test_an_interval_and_another_ranking_are_shown_where_they_are_known(tmp_path):
    rows = [
        Row(str(n), str(n), "", 2.0 - n, low=1.5 - n, high=2.5 - n, other_rank=50 - n)
        for n in range(24)
    ]
    found = Page(write_report(tmp_path, Report("q", rows, comparison="similarity of pixels")))
    assert "between +1.5 and +2.5" in found.text and "rank 50 by similarity of pixels" in found.text
    assert "Of the first 10, 0 are also among the first 10 by similarity of pixels" in found.text
    few = Page(write_report(tmp_path, Report("q", rows[:12], comparison="similarity of pixels")))
    assert "are also among the first" not in few.text  # of 12 nearly all are
    plain = Page(write_report(tmp_path, Report("q", make_rows(some_scores(12)))))
    assert "between" not in plain.text and "rank 50" not in plain.text


def test_cautions_stand_before_the_headline(tmp_path):
    report = Report("q", make_rows(some_scores(50)), cautions=["the weights moved by 0.1 %"])
    found = Page(write_report(tmp_path, report))
    assert found.text.index("the weights moved by 0.1 %") < found.text.index("None of the 50")


# --- the command


def test_a_result_says_of_its_query_what_the_page_shows(attribute, tmp_path, root, capsys):  # noqa: F811
    task = json.loads((PARITY / "fixture/tasks.json").read_text())[0]
    folder = attribute("results", [{**task, "seed": 5}])
    query = "tiny/gpt/blob/samples/00000.png"
    record = json.loads((folder / f"influence/{query}/influence.json").read_text())
    found = record["circumstances"]
    assert found["prompt"] == task["prompt"] and found["picture"] == task["synth_image_path"]
    assert (found["seed"], found["model"]) == (5, "tiny/blob")
    assert found["dataroot"] == str(root) and "prompt" not in record["identity"]
    command.main([str(folder)])
    path = folder / f"influence/{query}/report.html"
    assert f"Page: {path}" in capsys.readouterr().out and not (folder / "report.html").exists()
    shown = Page(path)
    assert task["prompt"] in shown.text and found["command"] in shown.text
    assert len(shown.data["rows"]) == 4 + 4 and "no picture" not in shown.text
    assert {group for group in shown.data["groups"]} == {"exemplars", "training images"}
    before = files(folder)
    words = shlex.split(found["command"])
    compute_influence.main(words[2:])  # runs as it is printed, and changes no result
    after = files(folder)
    name = folder / f"influence/{query}/influence.npz"
    assert before[name] == after[name]


def test_an_older_result_is_shown_as_far_as_it_is_known(results, root, capsys):
    command.main([str(results)])
    query = "tiny/gpt/blob/samples/00001.png"
    found = Page(results / "influence" / query / "report.html")
    assert "does not say where its pictures are: give --dataroot" in found.text
    assert "does not hold its prompt" in found.text
    assert len(found.data["rows"]) == 61 and "One of 61 images stands out" in found.text
    tasks = str(PARITY / "fixture/tasks.json")
    command.main([str(results), "--dataroot", str(root), "--task_json", tasks])
    found = Page(results / "influence" / query / "report.html")
    assert "a photo of <new1> blob 1" in found.text and "--dataroot" not in found.text
    captions = (root / "laion_subset/captions.txt").read_text().splitlines()
    assert set(captions) >= {row[1] for row in found.data["rows"][1:]} != {""}
    assert len(found.all("img")) == 1 + 61 - 12 + 12


def test_the_query_of_an_older_result_is_found_by_the_data_root_alone(results, root):
    query = "tiny/gpt/blob/samples/00000.png"
    found = read_report(results, query, str(root))
    assert found.picture == root / "synth" / query and found.prompt is None
    record = results / "influence" / query / "influence.json"
    content = json.loads(record.read_text())
    content["circumstances"]["names"] = {
        "data root": str(root),
        "query": f'synth/{query} with the prompt "a "very" old\nprompt"',
    }
    record.write_text(json.dumps(content))
    found = read_report(results, query)
    assert found.prompt == 'a "very" old\nprompt' and found.picture is not None
    other = query.replace("00000", "00001")
    content["circumstances"]["names"]["query"] = f'synth/{other} with the prompt "another"'
    record.write_text(json.dumps(content))
    assert read_report(results, query).prompt is None  # of the query that was unlearned last


def test_the_ranks_of_a_similarity_stand_beside_the_scores_of_the_same_images(results):
    query = "tiny/gpt/blob/samples/00000.png"
    ids = [row.id for row in read_report(results, query).rows]
    for method in "pixel", "similarity":
        scores = np.arange(len(ids), dtype=float)
        path = results / "baselines" / method / query / "influence.npz"
        write_ranking(path, ids, scores, np.zeros(len(ids), bool))
    found = read_report(results, query)
    assert found.comparison == "similarity of text and latents"
    assert [row.other_rank for row in found.rows] == list(range(len(ids), 0, -1))
    shutil.rmtree(results / "baselines/similarity")
    write_ranking(path, ids[1:], scores[1:], np.zeros(len(ids) - 1, bool))  # of other images
    assert read_report(results, query).comparison == "similarity of pixels"
    assert read_report(results, query.replace("00000", "00001")).comparison is None


def test_estimates_of_an_index_are_marked_and_its_audit_told(results):
    query, ids = "tiny/gpt/blob/samples/00000.png", [f"laion/{n:06d}" for n in range(60)]
    rescored = np.arange(60) % 2 == 0
    audit = {"recall": 0.9, "recall_low": 0.8, "recall_k": 10, "num_audited": 100}
    path = results / "influence" / query / "influence.npz"
    write_ranking(path, ids, some_scores(60), np.zeros(60, bool), rescored=rescored, **audit)
    command.main([str(results)])
    found = read_report(results, query)
    assert [row.is_estimate for row in found.rows] == [
        int(row.id[-6:]) % 2 == 1 for row in found.rows
    ]
    shown = Page(path.with_name("report.html"))
    assert "the shortlist holds about 90%, and hardly less than 80%" in shown.text
    assert sum(span.get("class") == "tag plain" for span in shown.all("span")) == 30
    assert ("noise draws of a Newton step", "1,600") in found.settings


def test_what_makes_a_result_doubtful_stands_on_its_page_and_in_the_index(results):
    query, ids = "tiny/gpt/blob/samples/00001.png", [f"laion/{n:06d}" for n in range(60)]
    path = results / "influence" / query / "influence.npz"
    figures = {"relative_weight_change": 0.001, "query_loss_before": 0.2, "query_loss_after": 0.1}
    write_ranking(path, ids, some_scores(60), np.zeros(60, bool), **figures)
    command.main([str(results)])
    shown = Page(path.with_name("report.html")).text
    assert "the weights moved by 0.1 %" in shown and "the query's own loss did not rise" in shown
    assert Page(results / "report.html").text.count("may mean little") == 1


@pytest.mark.parametrize(
    "paths, names",
    [
        (["d/a/1.png", "d/b/2.png"], ["a/1.png", "b/2.png"]),
        (["d/a/1.png", "/d/2.png"], None),
        (["d/a/1.png", ""], ["1.png", "id 1"]),
        (["", ""], ["id 0", "id 1"]),
    ],
)
def test_images_are_named_by_their_paths_below_the_folder_that_they_share(paths, names):
    found = name_images(["id 0", "id 1"], paths, np.zeros(2, bool))
    assert found == names if names else all(path.endswith(".png") for path in found)
    assert name_images(["id 0", "id 1"], paths, np.ones(2, bool)) == ["id 0", "id 1"]


def test_several_queries_have_an_index_whose_links_lead_to_their_pages(results, root, capsys):
    command.main([str(results), "--dataroot", str(root)])
    assert f"Page: {results / 'report.html'}" in capsys.readouterr().out
    found = Page(results / "report.html")
    links = [link["href"] for link in found.all("a")]
    assert len(links) == 2 and all((results / link).is_file() for link in links)
    assert len(found.all("img")) == 2 * 5 and all(image["alt"] for image in found.all("img"))


def test_a_folder_name_with_every_kind_of_sign_makes_a_link_that_leads_there(results, root):
    odd = results / 'influence/a #1 "?%41&<b>'
    shutil.copytree(results / "influence/tiny/gpt/blob/samples/00000.png", odd)
    command.main([str(results), "--dataroot", str(root)])
    links = [link["href"] for link in Page(results / "report.html").all("a")]
    assert all((results / unquote(link)).is_file() for link in links) and len(links) == 3
    assert not any(set('#?"<> ') & set(link) for link in links)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: shutil.rmtree(folder / "influence"), "no folder influence in it"),
        (
            lambda folder: [record_path(path).unlink() for path in folder.rglob("*.npz")],
            "no complete result in it",
        ),
        (
            lambda folder: (
                folder / "influence/tiny/gpt/blob/samples/00001.png/influence.npz"
            ).write_bytes(b"PK"),
            "00001.png/influence.npz: its content is not what its record says",
        ),
        (
            lambda folder: (
                folder / "influence/tiny/gpt/blob/samples/00001.png/influence.csv"
            ).write_text("rank,id\n1,a\n"),
            "00001.png/influence.csv: not a table of id, caption and path",
        ),
    ],
)
def test_a_folder_without_whole_results_is_refused(results, damage, said, capsys):
    damage(results)
    before = files(results)
    assert said in refused(capsys, command.main, [str(results)])
    assert files(results) == before


@pytest.mark.parametrize(
    "given, said",
    [
        (["--dataroot", "nowhere"], "--dataroot nowhere: no such folder"),
        (["--task_json", "tasks.json"], "give its data root too, by --dataroot"),
    ],
)
def test_flags_that_lead_nowhere_are_refused(results, given, said, capsys):
    before = files(results)
    assert said in refused(capsys, command.main, [str(results), *given])
    assert files(results) == before


def test_images_that_a_similarity_cannot_tell_apart_have_no_better_rank_for_their_place(results):
    query = "tiny/gpt/blob/samples/00000.png"
    ids = [row.id for row in read_report(results, query).rows]
    path = results / "baselines/similarity" / query / "influence.npz"
    for scores, expected in (
        ([2.0, 1.0] + [0.0] * (len(ids) - 2), [1, 2] + [len(ids)] * (len(ids) - 2)),
        ([0.0] * len(ids), [None] * len(ids)),
    ):
        write_ranking(path, ids, np.array(scores), np.zeros(len(ids), bool))
        found = read_report(results, query)
        assert [row.other_rank for row in found.rows] == expected
    assert found.comparison is None
