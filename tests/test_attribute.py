"""One command from a picture, a model and a folder to a page: whatever convention the folder
follows, whatever is asked next, whenever it is killed, whoever else is at it."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from test_folders import CONVENTIONS
from test_roots import mixed_pictures, run_together

import compute_influence
import compute_training_loss
import unlearn
from unlearn import UserError, front
from unlearn.attribution import estimation, scoring
from unlearn.attribution.names import FRONT_SCORINGS
from unlearn.attribution.removal import FeatureMaker
from unlearn.commands import attribute as command
from unlearn.commands import encode
from unlearn.front import cautions, costs, loading
from unlearn.front.models import find_model
from unlearn.report.results import find_strange
from unlearn.storage import artifacts

ROOT = Path(__file__).parent.parent
EMOJI = str(ROOT / "data/emoji/pipeline")
SOURCE = PARITY / "fixture/abc"
QUERY = SOURCE / "synth/tiny/gpt/blob/samples/00000.png"
PROMPT = "a blob on a table"


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """A curvature of few samples: what is tested here does not depend on it."""
    monkeypatch.setattr(estimation, "FEWEST_SAMPLES", 40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The miniature pipeline as one of smaller pictures, which costs less."""
    folder = Path(shutil.copytree(PARITY / "fixture/sd-tiny", tmp_path_factory.mktemp("m") / "m"))
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "sample_size": 4}))
    return str(folder)


@pytest.fixture
def ask(tiny):
    """`attribute` of pictures, the miniature query unless others are given."""

    def call(folder, out, *pictures, **more):
        settings = {"prompt": PROMPT, "device": "cpu", "model": tiny, **more}
        return unlearn.attribute(pictures or QUERY, images=folder, out=out, **settings)

    return call


@pytest.fixture
def refusal(ask):
    """What `ask` says as it refuses."""

    def call(*args, **more):
        with pytest.raises(UserError) as error:
            ask(*args, **more)
        assert "\n" not in str(error.value)
        return str(error.value)

    return call


def make_folder(folder, count=8):
    """The first pictures of the miniature data root, with captions beside them."""
    folder.mkdir()
    captions = (SOURCE / "laion_subset/captions.txt").read_text().splitlines()
    for path, caption in zip(sorted((SOURCE / "laion_subset/images").iterdir())[:count], captions):
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(caption)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "mine")


def other_query(path, number=1):
    """Another picture, each number its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turned = Image.open(QUERY.with_name("00001.png")).convert("RGB").rotate(90 * number)
    turned.save(path, {".jpg": "JPEG"}.get(path.suffix, "PNG"))
    return path


def count_sweeps(monkeypatch):
    """{name of the sweep: noisy samples scored}, filled as things run."""
    counts, real = Counter(), scoring.cache_columns

    def counted(sweep, model, paths, *args, **more):
        score = sweep.score

        def score_counted(model, rows, *rest):
            counts[Path(paths[0]).stem] += len(rows)
            return score(model, rows, *rest)

        sweep.score = score_counted
        return real(sweep, model, paths, *args, **more)

    monkeypatch.setattr("unlearn.attribution.caches.cache_columns", counted)
    monkeypatch.setattr(scoring, "cache_columns", counted)
    return counts


def contents(out):
    """{file: what must not differ}: of records the identity, of npz their arrays, of pages and
    other files nothing but that they are there; without claims and locks."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        value = path.read_bytes().replace(str(out).encode(), b"OUT")
        if path.suffix == ".json" and (record := json.loads(value)) and "identity" in record:
            value = record["identity"]
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                value = {key: arrays[key].tolist() for key in arrays.files}
        elif path.suffix in (".html", ".lock", ".claim") or name.endswith("originals.json"):
            value = None
        if path.suffix not in (".lock", ".claim"):
            found[name] = value
    return found


def test_one_command_ends_in_table_csv_picture_and_page(folder, tmp_path, capsys, tiny):
    out = tmp_path / "out"
    words = [str(QUERY), "--prompt", PROMPT, "--model", tiny, "--images", str(folder)]
    command.main([*words, "--out", str(out), "--device", "cpu", "--top_k", "3"])
    shown = capsys.readouterr().out
    result = out / "results/influence/00000.png"
    header = shown.splitlines()[2].split("  ")
    assert [cell.strip() for cell in header if cell] == [
        "rank",
        "score",
        "stands out",
        "by similarity",
        "image",
        "caption",
    ]
    for name in ("influence.csv", "visualization.jpg", "report.html"):
        assert f"{result / name}" in shown and (result / name).stat().st_size > 500
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith("With 8 images it cannot be told whether one stands out.")
    with open(result / "influence.csv", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and rows[0]["image"].endswith(".png")
    ranks = [int(row["similarity_rank"]) for row in rows]  # those that are alike share the last
    assert min(ranks) == 1 and max(ranks) == 8
    table = [line.split() for line in shown.splitlines() if re.match(r"\d+ +[+-]", line)]
    assert [line[3] for line in table] == [row["image"] for row in rows[:3]]
    assert [int(line[2]) for line in table] == ranks[:3]
    page = (result / "report.html").read_text()
    assert PROMPT in page and "python -m unlearn attribute" in page
    shown_root = re.search(r"<dt>data root</dt><dd>(.*?)</dd>", page)[1].replace("<wbr>", "")
    assert shown_root == str(out / "root") and (out / "root/dataset.json").is_file()


@pytest.mark.parametrize(
    "scoring",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "output")) for name in FRONT_SCORINGS],
)
def test_several_pictures_share_all_but_their_own_part_and_have_an_index(
    scoring, folder, tmp_path, monkeypatch, ask
):
    counts, second = count_sweeps(monkeypatch), other_query(tmp_path / "b.png")
    answers = ask(folder, tmp_path / "out", QUERY, second, scoring=scoring)
    # Before unlearning, and after: both in one sweep.
    assert counts["laion_loss"] == {"exact": 16 * 2, "output": 16, "removal": 0}[scoring]
    assert counts["laion_change"] == (16 if scoring == "output" else 0)
    assert [answer.folder.name for answer in answers] == ["00000.png", "b.png"]
    assert not np.array_equal(answers[0].scores, answers[1].scores)
    index = (tmp_path / "out/results/report.html").read_text()
    assert answers[0].index == tmp_path / "out/results/report.html"
    assert "influence/00000.png/report.html" in index and "influence/b.png/report.html" in index
    alone = ask(folder, tmp_path / "alone", second, scoring=scoring)
    np.testing.assert_array_equal(alone[0].scores, answers[1].scores)


def test_a_second_picture_costs_its_own_part_only(folder, tmp_path, monkeypatch, ask):
    ask = partial(ask, scoring="exact")
    first = ask(folder, tmp_path / "out")
    counts = count_sweeps(monkeypatch)
    monkeypatch.setattr(estimation, "accumulate", None)
    monkeypatch.setattr("unlearn.datasets.encoding.encode_images", None)
    ask(folder, tmp_path / "out", other_query(tmp_path / "b.png"))
    assert counts["laion_loss"] == 16
    counts.clear()
    again = ask(folder, tmp_path / "out")
    assert not counts
    np.testing.assert_array_equal(again[0].scores, first[0].scores)


def test_a_second_picture_is_scored_by_the_features_that_are_there(
    folder, tmp_path, monkeypatch, ask
):
    first = ask(folder, tmp_path / "out")
    made, real = [], FeatureMaker.make

    def counted(maker, images, rows, *more):
        rows = list(rows)
        made.extend(images.ids[row] for row in rows)
        return real(maker, images, rows, *more)

    monkeypatch.setattr(FeatureMaker, "make", counted)
    ask(folder, tmp_path / "out", other_query(tmp_path / "b.png"))
    assert made == ["synth/b.png"]
    again = ask(folder, tmp_path / "out")
    np.testing.assert_array_equal(again[0].scores, first[0].scores)


def test_removal_needs_no_curvature_and_no_losses(folder, tmp_path, ask):
    [answer] = ask(folder, tmp_path / "out")
    assert (answer.scores > 0).all()
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "features.txt" in names
    assert not names & {"sd_fisher.safetensors", "laion_loss.npy", "weight_change.safetensors"}
    page = (answer.folder / "report.html").read_text()
    assert "how much less certain the model would be of this picture" in page
    assert "unlearned" not in page and "weights moved" not in page
    assert "way of scoring" in page and "removal" in page


def test_the_published_way_is_asked_for_by_name_and_its_page_says_so(folder, tmp_path, ask):
    by_removal = ask(folder, tmp_path / "out")[0].scores
    [answer] = ask(folder, tmp_path / "out", scoring="exact")
    assert not np.array_equal(answer.scores, by_removal)
    page = (answer.folder / "report.html").read_text()
    assert "how much worse the model explains" in page and "weights moved by" in page
    np.testing.assert_array_equal(ask(folder, tmp_path / "out")[0].scores, by_removal)


def test_repeats_of_kohyas_folders_count_where_that_is_asked_for(folder, tmp_path, ask, refusal):
    shutil.move(folder, tmp_path / "4_blob")
    (tmp_path / "top").mkdir()
    top = Path(shutil.move(tmp_path / "4_blob", tmp_path / "top"))
    once = top.parent / "1_blob"
    once.mkdir()
    for path in sorted(top.iterdir())[:4]:
        shutil.move(path, once)
    untold, told = (
        ask(top.parent, tmp_path / "out", use_repeats=use)[0].scores for use in (False, True)
    )
    assert not np.allclose(untold, told)
    said = refusal(top.parent, tmp_path / "out", use_repeats=True, scoring="exact")
    assert "--use_repeats: means nothing to --scoring exact, only to removal; leave it out" in said


def test_a_way_of_scoring_that_is_none_is_refused(folder, tmp_path, refusal):
    said = refusal(folder, tmp_path / "out", scoring="best")
    assert "--scoring best: expected one of removal, exact, output" in said
    assert "expected x0 y0 x1 y1" in refusal(folder, tmp_path / "out", box=(9, 0, 0, 9))


def test_a_boxs_answer_stands_beside_that_of_the_whole_picture_and_says_its_box(
    folder, tmp_path, ask, capsys
):
    out, box = tmp_path / "out", (0, 0, 256, 512)
    [whole] = ask(folder, out)
    before = (whole.folder / "influence.npz").read_bytes()
    [part] = ask(folder, out, box=box)
    assert re.fullmatch(r"00000-[0-9a-f]{8}\.png", part.folder.name)
    assert (whole.folder / "influence.npz").read_bytes() == before
    assert not np.allclose(part.scores, whole.scores)
    assert len(json.loads((out / "tasks.json").read_text())) == 2
    assert part.summary.startswith("In the box 0 0 256 512: with 8 images it cannot be told")
    part.show(2)
    assert '00000.png, in the box 0 0 256 512: "a blob' in capsys.readouterr().out
    page, other = (each.folder.joinpath("report.html").read_text() for each in (part, whole))
    assert "<h1>In the box 0 0 256 512: with 8 images" in page
    width, height = Image.open(QUERY).size
    assert f'viewBox="0 0 {width} {height}" role="img" aria-label="Only the box' in page
    assert 'x="0" y="0" width="256" height="512"' in page
    assert "In the box" not in other and 'class="region"' not in other


def test_of_a_picture_that_is_made_here_a_box_has_its_own_answer_with_its_exact_latent(
    folder, tmp_path, tiny
):
    out, how = tmp_path / "out", {"seed": 5, "steps": 1, "guidance": 1.0, "device": "cpu"}
    [whole] = unlearn.attribute((), tiny, folder, PROMPT, out, **how)
    [part] = unlearn.attribute((), tiny, folder, PROMPT, out, box=(0, 0, 64, 64), **how)
    assert whole.folder != part.folder and whole.folder.is_dir()
    tasks = json.loads((out / "tasks.json").read_text())
    assert len({task["synth_image_path"] for task in tasks}) == 2
    assert len({task["latents"] for task in tasks}) == 1


def test_a_box_outside_the_picture_is_refused_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, refusal
):
    monkeypatch.setattr(loading, "load_model", None)
    width, height = Image.open(QUERY).size
    said = refusal(folder, tmp_path / "out", box=(0, 0, width + 1, height))
    assert f"--box 0 0 {width + 1} {height}: reaches out of {QUERY}" in said
    assert f"which has {width} x {height} pixels" in said and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_five_conventions_of_forty_mixed_pictures_give_the_same_top_ten(tmp_path, ask):
    pairs = mixed_pictures(tmp_path / "pictures")
    tops = []
    for name in ("lines", "jsonl", "csv", "sidecars", "coco"):
        folder = Path(shutil.copytree(tmp_path / "pictures", tmp_path / name))
        CONVENTIONS[name](folder, list(pairs.items()))
        [answer] = ask(folder, tmp_path / f"out {name}", model=EMOJI)
        tops.append([(row["image"], row["score"]) for row in answer.table(10)])
    assert len(tops[0]) == 10 and all(top == tops[0] for top in tops)


def test_python_returns_an_object_with_scores_table_warnings_and_files(
    folder, tmp_path, capsys, ask
):
    [answer] = ask(folder, tmp_path / "out")
    assert answer.scores.shape == (8,) and answer.scores.dtype == np.float64
    table = answer.table()
    assert [row["score"] for row in table] == sorted(answer.scores.tolist(), reverse=True)
    assert [row["rank"] for row in table] == list(range(1, 9))
    assert {1, 8} <= {row["similarity_rank"] for row in table} <= set(range(1, 9))
    assert all(row["path"].is_file() for row in table)
    assert isinstance(answer.warnings, list)
    answer.show(2)
    assert table[0]["image"] in capsys.readouterr().out
    saved = answer.save(tmp_path / "elsewhere")
    assert sorted(path.name for path in saved.iterdir()) == sorted(front.answers.FILES)


@pytest.mark.parametrize("scoring", FRONT_SCORINGS)
def test_what_it_leaves_is_an_ordinary_root_on_which_the_scripts_find_all_done(
    scoring, folder, tmp_path, ask
):
    out = tmp_path / "out"
    ask(folder, out, prompt="a black cat", scoring=scoring)  # of which nothing is to be warned
    files = {
        "exact": (*FILES, "influence/00000.png/laion_loss.npy"),
        "output": (*FILES, "influence/00000.png/laion_change.npy"),
        "removal": ("removal/base/laion/features.txt",),
    }[scoring]
    before = contents(out)
    flags = ["--dataroot", str(out / "root"), "--task_json", str(out / "tasks.json")]
    flags += ["--result_dir", str(out / "results"), "--device", "cpu"]
    times = [(out / f"results/{name}").stat().st_mtime_ns for name in files]
    if scoring == "exact":
        compute_training_loss.main(flags)
    few = ["--removal_timesteps", "350", "350", "--probes", "1"] if scoring == "removal" else []
    compute_influence.main([*flags, "--scoring", scoring, *few])
    assert times == [(out / f"results/{name}").stat().st_mtime_ns for name in files]
    after = contents(out)
    assert after.keys() == before.keys()
    name = "results/influence/00000.png/influence.npz"
    assert after[name] == before[name]


FILES = (
    "orig_loss/base/laion_loss.npy",
    "influence/00000.png/weight_change.safetensors",
)


def test_a_picture_of_the_folder_itself_is_said_in_the_table_and_on_the_page(folder, tmp_path, ask):
    own = folder / "000003.png"
    [answer] = ask(folder, tmp_path / "out", own)
    assert any("is a training image itself (000003.png)" in text for text in answer.warnings)
    assert "is a training image itself (000003.png)" in (answer.folder / "report.html").read_text()
    assert "is a training image itself" in (answer.folder / "influence.csv").read_text()
    elsewhere = tmp_path / "the same.bmp"
    Image.open(own).convert("RGB").save(elsewhere)
    [answer] = ask(folder, tmp_path / "out", elsewhere)
    assert any("is a training image itself (000003.png)" in text for text in answer.warnings)
    [answer] = ask(folder, tmp_path / "out")
    assert not any("training image itself" in text for text in answer.warnings)


def test_a_prompt_without_the_word_that_all_captions_have_is_said(folder, tmp_path, ask):
    for path in folder.glob("*.txt"):
        path.write_text(f"a photo of sks {path.read_text()}")
    said = cautions.find_missing_words("a photo of a dog", ["a photo of sks dog"] * 3)
    assert said == ["sks"]
    [answer] = ask(folder, tmp_path / "out", prompt="a blob")
    assert any('nearly all captions have "sks"' in text for text in answer.warnings)
    [answer] = ask(folder, tmp_path / "out", prompt="a sks blob")
    assert not any("captions have" in text for text in answer.warnings)


def test_one_image_no_images_and_no_captions_are_refused_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch, refusal
):
    monkeypatch.setattr(loading, "load_model", None)
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "empty: no pictures" in refusal(tmp_path / "empty", out)
    assert "no such folder" in refusal(tmp_path / "missing", out)
    one = make_folder(tmp_path / "one", 1)
    assert "only 1 training image, which leaves nothing to rank" in refusal(one, out)
    for path in folder.glob("*.txt"):
        path.unlink()
    assert "8 pictures, none with a caption" in refusal(folder, out)
    (folder / "captions.txt").write_text("one\ntwo\n")
    assert "captions.txt" in refusal(folder, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "more, said",
    [
        ({"prompt": None}, "its file does not say its prompt; give it: --prompt"),
        ({"prompt": "  "}, "--prompt: expected some words, found none"),
        ({"prompt": "a\0b"}, "--prompt: expected text without NUL"),
        ({"seed": -1}, "--seed -1: expected a whole number"),
        ({"steps": 3}, "--steps: says how a picture is to be made, and one is given"),
        ({"prompt": "a <new7> blob"}, "<new7>"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(more, said, folder, tmp_path, refusal):
    assert said in refusal(folder, tmp_path / "out", **more)
    assert not (tmp_path / "out/results").exists()


def test_pictures_that_are_none_are_refused_by_name(folder, tmp_path, refusal):
    (tmp_path / "no.png").write_text("no picture")
    assert "no.png" in refusal(folder, tmp_path / "out", tmp_path / "no.png")
    assert "gone.png" in refusal(folder, tmp_path / "out", tmp_path / "gone.png")
    assert "found a folder" in refusal(folder, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_the_prompt_is_read_from_the_file_and_kept_with_its_seed(folder, tmp_path, ask):
    notes = PngImagePlugin.PngInfo()
    notes.add_text("parameters", f"{PROMPT}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 99")
    Image.open(QUERY).save(tmp_path / "noted.png", pnginfo=notes)
    [answer] = ask(folder, tmp_path / "out", tmp_path / "noted.png", prompt=None)
    assert (answer.question.prompt, answer.question.seed) == (PROMPT, 99)
    [task] = json.loads((tmp_path / "out/tasks.json").read_text())
    assert (task["prompt"], task["seed"], task["num_inference_steps"]) == (PROMPT, 99, 20)


def test_pictures_of_one_name_and_one_picture_with_two_prompts_stay_apart(folder, tmp_path, ask):
    out = tmp_path / "out"
    pictures = [
        QUERY,
        other_query(tmp_path / "a/00000.png"),
        other_query(tmp_path / "b/00000.jpg", 2),
    ]
    answers = ask(folder, out, *pictures)
    answers += ask(folder, out, prompt="another prompt")
    names = [answer.folder.name for answer in answers]
    assert names[0] == "00000.png" and len(set(names)) == 4
    assert all(name.startswith("00000") for name in names)
    assert len(json.loads((out / "tasks.json").read_text())) == 4
    again = ask(folder, out, *pictures)
    assert [answer.folder.name for answer in again] == names[:3]
    for first, second in zip(answers, again):
        np.testing.assert_array_equal(first.scores, second.scores)


@pytest.mark.parametrize("name", ["=1+1.png", " a\nb.png", ".hidden.png", "é" * 100 + ".png"])
def test_odd_names_of_pictures_are_no_obstacle(name, folder, tmp_path, ask):
    [answer] = ask(folder, tmp_path / "out", other_query(tmp_path / name))
    assert (answer.folder / "report.html").is_file()


def test_a_prompt_and_a_seed_make_the_picture_and_its_exact_latent(folder, tmp_path, tiny):
    out, how = tmp_path / "out", {"seed": 5, "steps": 3, "guidance": 2.0}
    [answer] = unlearn.attribute((), tiny, folder, PROMPT, out, device="cpu", **how)
    [task] = json.loads((out / "tasks.json").read_text())
    assert (task["seed"], task["num_inference_steps"], task["guidance_scale"]) == (5, 3, 2.0)
    latents = np.load(out / "root" / task["latents"])
    assert latents.shape == (1, 4, 4, 4) and task["row"] == 0
    picture = out / "root" / task["synth_image_path"]
    before = picture.read_bytes()
    [again] = unlearn.attribute((), tiny, folder, PROMPT, out, device="cpu", **how)
    assert picture.read_bytes() == before
    np.testing.assert_array_equal(again.scores, answer.scores)
    [other] = unlearn.attribute((), tiny, folder, PROMPT, out, device="cpu", **{**how, "seed": 6})
    assert not np.array_equal(other.scores, answer.scores)
    assert len(json.loads((out / "tasks.json").read_text())) == 2


def test_no_picture_needs_prompt_and_seed(folder, tmp_path, tiny):
    for more in {"seed": 1, "prompt": None}, {"seed": None}, {"seed": 1, "steps": 0}:
        with pytest.raises(UserError, match="--prompt|--num_inference_steps|--steps"):
            unlearn.attribute(
                (), tiny, folder, out=tmp_path / "out", device="cpu", **{"prompt": PROMPT, **more}
            )


def test_a_dry_run_tells_the_cost_and_writes_nothing(folder, tmp_path, capsys, ask):
    out = tmp_path / "out"
    assert ask(folder, out, dry_run=True) == [] and not out.exists()
    shown = capsys.readouterr().out
    assert "16 backward passes" in shown and "1 x 2 backward passes" in shown
    assert re.search(r"In all about \d+ s, and \d+ MB on the disk", shown)
    ask(folder, out)
    before = contents(out)
    assert ask(folder, out, dry_run=True) == [] and contents(out) == before
    assert capsys.readouterr().out.count("is there already") == 2


def test_a_plan_tells_what_another_model_has_to_do_again_and_the_run_says_so(
    folder, tmp_path, capsys, caplog, ask, tiny
):
    out, other = tmp_path / "out", shutil.copytree(tiny, tmp_path / "other")
    path = other / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 1.01 * value for name, value in load_file(path).items()}, path)
    [first] = ask(folder, out)
    ask(folder, out, dry_run=True)
    assert capsys.readouterr().out.count("is there already") == 2
    ask(folder, out, dry_run=True, model=other)
    shown = capsys.readouterr().out
    assert shown.count("is there already") == 1 and "16 backward passes" in shown
    caplog.set_level("INFO")
    [second] = ask(folder, out, model=other)
    assert f"was made with another model, {tiny}" in caplog.text
    [again] = ask(folder, out)
    np.testing.assert_array_equal(again.scores, first.scores)
    assert not np.array_equal(second.scores, first.scores)


def test_a_corrupt_picture_names_a_command_that_runs_and_lets_the_next_try_go_on(
    folder, tmp_path, ask, refusal, tiny
):
    path = folder / "000003.png"
    path.write_bytes(path.read_bytes()[:200])
    (folder / "000004.txt").unlink()
    for ending in (
        ".png",
        ".txt",
    ):  # an image that another is the same as, to be named as it is known
        shutil.copy(folder / f"000005{ending}", folder / f"a copy{ending}")
    said = refusal(folder, tmp_path / "out")
    assert f"image {path}: cannot be read" in said  # the user's own file
    words = shlex.split(said[said.index("leave them out: ") + len("leave them out: ") :])
    assert words[:4] == ["python", "-m", "unlearn", "encode"]
    encode.main([*words[4:], "--device", "cpu"])
    [answer] = ask(folder, tmp_path / "out")
    assert len(answer.table()) == 7
    note, same = answer.notes
    assert "000005.png, a copy.png" in same
    assert note.startswith("2 of 9 images were left out") and "000003.png (cannot be read" in note
    assert "000004.png (without a caption" in note
    assert (answer.folder / "report.html").read_text().count("2 of 9 images were left out") == 1


def test_a_question_that_is_refused_leaves_no_task(folder, tmp_path, ask, refusal):
    assert "--model FOLDER --base MODEL" in refusal(folder, tmp_path / "out", prompt="a <new7>")
    assert not (tmp_path / "out/tasks.json").exists()
    ask(folder, tmp_path / "out")
    refusal(folder, tmp_path / "out", prompt="a <new7>")
    assert len(json.loads((tmp_path / "out/tasks.json").read_text())) == 1


def test_each_step_says_what_is_left_in_all_and_it_falls(folder, tmp_path, ask):
    lines = []
    ask(folder, tmp_path / "out", on_step=lines.append)
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [f"step {n} of 4" for n in range(1, 5)]
    left = [int(re.search(r"about (\d+) s left in all", line)[1]) for line in steps]
    assert left == sorted(left, reverse=True)


def test_the_pace_is_that_of_the_size_that_fills_the_device_whatever_disturbs_a_pass(monkeypatch):
    now, disturbed = [0.0], [True]

    def run(size):  # 10 ms to start, 2 ms each; the first counted one is disturbed
        now[0] += 0.010 + 0.002 * size + (0.05 if disturbed.pop() else 0)
        disturbed.append(len(sizes) == 0)
        sizes.append(size)
        return torch.zeros(size)

    sizes = []
    monkeypatch.setattr(costs.time, "perf_counter", lambda: now[0])
    alone, each = costs.time_one(run, 200)
    assert sizes[:2] == [1, 1] and sizes[-1] == 200
    assert alone == pytest.approx(0.062) and each == pytest.approx(0.002 + 0.01 / 200)


def test_what_was_there_already_tells_nothing_of_the_pace(monkeypatch):
    steps = [costs.Step("a", "", 50.0), costs.Step("b", "", 20.0)]
    lines, now = [], [0.0]
    monkeypatch.setattr(costs.time, "monotonic", lambda: now[0])
    clock = costs.Clock(steps, lines.append)
    with clock.step("a"):
        now[0] += 0.1
    with clock.step("b"):
        pass
    assert "about 70 s left" in lines[0] and "about 20 s left" in lines[1]


def test_what_is_left_follows_the_pace_of_what_was_done(monkeypatch):
    steps = [costs.Step("a", "", 10.0), costs.Step("b", "", 20.0), costs.Step("c", "", 40.0)]
    lines, now = [], [0.0]
    monkeypatch.setattr(costs.time, "monotonic", lambda: now[0])
    clock = costs.Clock(steps, lines.append)
    with clock.step("a"):
        now[0] += 30
    with clock.step("b"):
        pass
    assert "about 70 s left" in lines[0] and "about 3 min left" in lines[1]


def test_the_counts_of_a_plan_are_those_of_the_passes_that_run(folder, tmp_path, monkeypatch, ask):
    counts = count_sweeps(monkeypatch)
    ask(folder, tmp_path / "out", scoring="exact")
    plan = costs.Counts(8, 8, 10, 40, 160, 1, 0)
    assert plan.sweep == 160 and counts["laion_loss"] * 10 == 2 * plan.sweep


def test_too_little_room_is_said_before_anything_is_written(folder, tmp_path, monkeypatch, refusal):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "its disk has 0 MB left; free some space" in refusal(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_picture_that_the_model_explains_worse_than_any_image_is_said():
    before = {"exemplar": np.array([0.3, 0.4]), "laion": np.array([0.1, 0.2])}
    [said] = find_strange(0.71, before)
    assert "far worse than any training image (loss 0.71, theirs at most 0.4)" in said
    assert find_strange(0.69, before) == [] == find_strange(0.71, {})


def test_noise_is_explained_worse_than_any_image_and_the_answer_says_so(folder, tmp_path, ask):
    world = ROOT / "data/emoji/laion_subset"
    captions = (world / "captions.txt").read_text().splitlines()
    for path, source, caption in zip(
        sorted(folder.glob("*.png")), sorted((world / "images").iterdir()), captions
    ):
        shutil.copy(source, path)
        path.with_suffix(".txt").write_text(caption)
    pixels = 255 * np.random.default_rng(0).integers(0, 2, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    [answer] = ask(folder, tmp_path / "out", tmp_path / "noise.png", model=EMOJI)
    assert any("another model may have made it" in text for text in answer.warnings)


def run_killed_before(step, work):
    """Runs `work` in a fork that dies before it gives its `step`-th file the final name; returns
    whether it finished."""
    child = os.fork()
    if child == 0:
        replace, count = os.replace, [0]

        def replace_or_die(*args):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        artifacts.os.replace = replace_or_die
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    "stride, scoring, fewest",
    [
        pytest.param(5, "removal", 3, id="some"),
        pytest.param(0, "removal", 16, id="every", marks=pytest.mark.slow),
        pytest.param(0, "exact", 21, id="every, exact", marks=pytest.mark.slow),
    ],
)
def test_killed_before_files_and_run_again_it_leaves_what_an_uninterrupted_run_leaves(
    stride, scoring, fewest, tiny, tmp_path, ask, monkeypatch
):
    """stride 0: before every one; else every so many files later than the last time."""
    monkeypatch.setattr(costs, "measure_pace", lambda *args: costs.Pace(1e-3, 1e-3, 1e-3, 1e-3))
    loaded = loading.load_model(tiny, "cpu")
    monkeypatch.setattr(loading, "load_model", lambda *args, **more: loaded)
    folder, out, whole = make_folder(tmp_path / "mine", 3), tmp_path / "out", tmp_path / "whole"
    ask(folder, whole, scoring=scoring)
    step, kills, before = 1, 0, None
    while not run_killed_before(step, lambda: ask(folder, out, scoring=scoring)):
        kills += 1
        # A run that only did again what the last one did: the next kill comes one file later.
        found = contents(out) if out.exists() else {}
        # The parts of files are named after the process that was killed.
        now = {name: value for name, value in found.items() if not name.endswith(".part")}
        step += stride or now == before
        before = now
    assert kills >= fewest
    expected, found = contents(whole), contents(out)
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.startswith(("root/dataset", "tasks")):
            assert found[name] == expected[name], name


def test_two_runs_into_one_folder_at_the_same_moment_give_both_answers(folder, tmp_path, ask):
    for number in range(2):
        out = tmp_path / f"out {number}"
        others = [other_query(tmp_path / f"{letter}/x.png") for letter in "ab"[: number + 1]]
        works = [
            lambda pictures=pictures: ask(folder, out, *pictures)
            for pictures in ((), others[:1], others[-1:])
        ]
        assert run_together(*works) == [0] * 3
        entries = json.loads((out / "tasks.json").read_text())
        assert len(entries) == 2
        answers = ask(folder, out, QUERY, others[0])
        assert len({answer.folder for answer in answers}) == 2
        alone = ask(folder, tmp_path / f"alone {number}", others[0])
        np.testing.assert_array_equal(answers[1].scores, alone[0].scores)
        assert not list(out.rglob("*.part")) and not list(out.rglob("*.claim"))


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(tmp_path):
    words = [sys.executable, "-m", "unlearn", "attribute", "--model", "x", "--images", "data"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: no picture: name one, or have it made: --prompt")


def as_pipeline(tiny, folder, change):
    """A copy of the miniature pipeline, changed."""
    shutil.copytree(tiny, folder)
    change(folder)
    return folder


def give_variant(folder):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))


def give_bin(folder):
    for path in folder.glob("*/*.safetensors"):
        name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()


def name_absent_parts(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))


def hash_of(name, base=None, place=None):
    """The weights that a model is loaded with."""
    source, loaded = loading.load_source(name, base, place, "cpu")
    assert source.unet or loaded.pipeline.unet.config.sample_size == 4
    return loaded.weights_hash


@pytest.mark.parametrize("change", [give_variant, give_bin, name_absent_parts])
def test_what_people_have_of_a_pipeline_loads_with_the_same_weights(change, tiny, tmp_path):
    mine = as_pipeline(tiny, tmp_path / "mine", change)
    assert hash_of(mine, None, tmp_path / "place") == hash_of(tiny)
    [made] = (tmp_path / "place").iterdir()
    if change is give_variant:
        weights = made / "unet/diffusion_pytorch_model.safetensors"
        assert weights.is_symlink()
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    hash_of(mine, None, tmp_path / "place")
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


def test_a_folder_of_the_hubs_cache_is_its_main_snapshot(tiny, tmp_path):
    cache = tmp_path / "models--me--mine"
    shutil.copytree(tiny, cache / "snapshots/abc")
    (cache / "snapshots/def").mkdir()
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    assert find_model(cache, None, tmp_path / "place").pipeline == str(cache / "snapshots/abc")
    shutil.rmtree(cache / "refs")
    (cache / "snapshots/def").rmdir()
    assert find_model(cache, None, tmp_path / "place").pipeline == str(cache / "snapshots/abc")


def test_the_unet_of_a_training_run_takes_its_other_parts_from_the_base(
    tiny, tmp_path, folder, ask
):
    run = tmp_path / "run"
    for number in (500, 1000):
        shutil.copytree(f"{tiny}/unet", run / f"checkpoint-{number}/unet")
    path = run / "checkpoint-1000/unet/diffusion_pytorch_model.safetensors"
    weights = {name: 1.01 * value for name, value in load_file(path).items()}
    save_file(weights, path)
    with pytest.raises(UserError, match="has a UNet .*checkpoint-1000.* --base MODEL"):
        find_model(run, None, tmp_path / "place")
    changed, plain = hash_of(run, tiny, tmp_path / "place"), hash_of(tiny)
    assert changed != plain
    shutil.copytree(f"{tiny}/unet", tmp_path / "alone")
    assert hash_of(tmp_path / "alone", tiny, tmp_path / "place") == plain
    shutil.copy(f"{tiny}/scheduler/scheduler_config.json", tmp_path / "alone")
    source = find_model(tmp_path / "alone", tiny, tmp_path / "place")
    assert (source.pipeline, source.unet) == (tiny, str(tmp_path / "alone"))
    [answer] = ask(folder, tmp_path / "out", model=run, base=tiny)
    assert len(answer.table()) == 8


def test_a_data_root_is_the_model_that_its_settings_say(tiny, tmp_path, lora):
    root = tmp_path / "root"
    shutil.copytree(f"{tiny}/unet", root / "unet")
    shutil.copytree(tiny, root / "pipeline")
    shutil.copy(f"{tiny}/scheduler/scheduler_config.json", root / "unet")
    shutil.copy(lora, root / "own.safetensors")
    settings = {"pipeline": "pipeline", "unet": "unet", "lora": ["own.safetensors:0.5"]}
    (root / "dataset.json").write_text(json.dumps({**settings, "resolution": 64}))
    source = find_model(root, None, tmp_path / "place")
    assert (source.pipeline, source.unet) == (str(root / "pipeline"), str(root / "unet"))
    assert source.lora == (f"{root}/own.safetensors:0.5",) and source.side == 64


def test_a_picture_is_asked_about_a_data_roots_model_with_its_lora_and_size(
    tiny, folder, tmp_path, lora, ask
):
    root = tmp_path / "root"
    root.mkdir()
    settings = {"pipeline": tiny, "lora": [f"{lora}:0.5"]}
    (root / "dataset.json").write_text(json.dumps(settings))
    [answer] = ask(folder, tmp_path / "out", model=root)
    [expected] = ask(folder, tmp_path / "other", model=tiny, lora=f"{lora}:0.5")
    np.testing.assert_array_equal(answer.scores, expected.scores)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "lora.safetensors",
            {"lora_unet.a": 1},
            "a LoRA file; give the model that it was trained on",
        ),
        ("xl.safetensors", {"conditioner.embedders.0.a": 1}, "of Stable Diffusion XL's refiner"),
        ("vae.safetensors", {"encoder.a": 1}, "expected a Stable Diffusion checkpoint"),
        ("sd.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("sd.safetensors", b"damaged", "not a whole safetensors file"),
        ("sd.gguf", b"GGUF", "quantized and exported models cannot be used"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_with_the_way_on(
    name, content, said, folder, tmp_path, refusal
):
    path = tmp_path / name
    if isinstance(content, dict):
        save_file({key: torch.ones(size) for key, size in content.items()}, path)
    else:
        path.write_bytes(content)
    text = refusal(folder, tmp_path / "out", model=path)
    assert said in text and name in text and not (tmp_path / "out/root").exists()


def test_folders_that_are_no_pipeline_are_refused_with_the_way_on(tiny, tmp_path):
    def said(folder, base=None):
        with pytest.raises(UserError) as error:
            find_model(folder, base, tmp_path / "place")
        return str(error.value)

    (tmp_path / "a").mkdir()
    assert "no model_index.json); there: nothing" in said(tmp_path / "a")
    (tmp_path / "a/sd.ckpt").write_bytes(b"")
    assert f"give that: --model {tmp_path / 'a/sd.ckpt'}" in said(tmp_path / "a")
    (tmp_path / "a/pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "a LoRA file" in said(tmp_path / "a")
    empty = as_pipeline(
        tiny, tmp_path / "b", lambda f: next((f / "unet").glob("*.safetensors")).unlink()
    )
    assert "its unet has no weights" in said(empty) and "there: config.json" in said(empty)
    (empty / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs")
    assert "git lfs pull" in said(empty)
    assert "no such file or folder" in said("/nowhere/model")
    assert "no such file or folder" in said("model.safetensors")


# Names of a diffusers pipeline's weights -> those of the original program's single file, for UNets of
# two blocks with one layer each and VAEs of six blocks. Source: the two programs' model definitions.
UNET_NAMES = [
    (r"^time_embedding\.linear_1", "time_embed.0"),
    (r"^time_embedding\.linear_2", "time_embed.2"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.0\.resnets\.0", "input_blocks.1.0"),
    (r"^down_blocks\.0\.attentions\.0", "input_blocks.1.1"),
    (r"^down_blocks\.0\.downsamplers\.0\.conv", "input_blocks.2.0.op"),
    (r"^down_blocks\.1\.resnets\.0", "input_blocks.3.0"),
    (r"^mid_block\.resnets\.0", "middle_block.0"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^mid_block\.resnets\.1", "middle_block.2"),
    (r"^up_blocks\.0\.resnets\.(\d)", r"output_blocks.\1.0"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.1.conv"),
    (r"^up_blocks\.1\.resnets\.0", "output_blocks.2.0"),
    (r"^up_blocks\.1\.attentions\.0", "output_blocks.2.1"),
    (r"^up_blocks\.1\.resnets\.1", "output_blocks.3.0"),
    (r"^up_blocks\.1\.attentions\.1", "output_blocks.3.1"),
    (r"(?<!transformer_)(blocks?\.\d+(?:\.0)?)\.norm1\.(?=weight|bias)", r"\1.in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"(?<!transformer_)(blocks?\.\d+(?:\.0)?)\.norm2\.(?=weight|bias)", r"\1.out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
]
VAE_NAMES = [
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda found: f"up.{5 - int(found[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{5 - int(found[1])}.upsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]


def rename(tensors, patterns, prefix):
    """Tensors under the names that patterns make of theirs."""
    found = {}
    for name, value in tensors.items():
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        found[prefix + name] = value
    return found


def to_checkpoint(folder):
    """The miniature pipeline's weights as the original program's single file has them."""
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    vae = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
    text = load_file(folder / "text_encoder/model.safetensors")
    text = {f"text_model.{name.removeprefix('text_model.')}": text[name] for name in text}
    return {
        **rename(unet, UNET_NAMES, "model.diffusion_model."),
        **{
            name: value[..., None, None] if "attn_1" in name and value.ndim == 2 else value
            for name, value in rename(vae, VAE_NAMES, "first_stage_model.").items()
        },
        **rename(text, [], "cond_stage_model.transformer."),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_gives_the_weights_of_its_pipeline(suffix, tiny, tmp_path):
    path, tensors = tmp_path / f"sd{suffix}", to_checkpoint(Path(tiny))
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(
        {"state_dict": tensors}, path
    )
    source = find_model(path, tiny, tmp_path / "place")
    parts = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
    for part in parts:
        expected, found = (
            load_file(f"{folder}/{part}.safetensors") for folder in (tiny, source.pipeline)
        )
        assert all(torch.equal(found[name], value) for name, value in expected.items()), part
    before = Path(source.pipeline, "model_index.json").stat().st_mtime_ns
    assert find_model(path, tiny, tmp_path / "place") == source
    assert Path(source.pipeline, "model_index.json").stat().st_mtime_ns == before
    loading.load_source(path, tiny, tmp_path / "place", "cpu")


def test_a_checkpoint_that_would_run_code_is_refused(tiny, tmp_path):
    ran, path = tmp_path / "ran", tmp_path / "sd.ckpt"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"state_dict": Hostile()}, path)
    with pytest.raises(UserError, match="cannot be converted|never unpickled"):
        find_model(path, tiny, tmp_path / "place")
    assert not ran.exists()


def test_a_checkpoint_that_diffusers_cannot_convert_is_refused_with_both_ways_on(tiny, tmp_path):
    path = tmp_path / "sd.safetensors"
    save_file({"model.diffusion_model.strange": torch.ones(1)}, path)
    with pytest.raises(UserError, match="cannot be converted .*--base MODEL"):
        find_model(path, None, tmp_path / "place")
    with pytest.raises(UserError, match="from_single_file.*--model converted"):
        find_model(path, tiny, tmp_path / "place")
    assert not list((tmp_path / "place").glob("sd-*"))


@pytest.fixture
def lora(tiny, tmp_path):
    """A kohya LoRA of the miniature pipeline that was trained on four pictures of one caption."""
    layer, width = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 32
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{layer}.lora_up.weight": torch.randn(width, 2, generator=generator),
        f"{layer}.alpha": torch.tensor(2.0),
    }
    header = {
        "ss_resolution": "(160, 160)",
        "ss_dataset_dirs": json.dumps({"3_sks blob": {"n_repeats": 3, "img_count": 4}}),
        "ss_tag_frequency": json.dumps({"3_sks blob": {"sks blob": 4}}),
    }
    save_file(tensors, tmp_path / "tuned.safetensors", header)
    return tmp_path / "tuned.safetensors"


def test_of_a_model_with_a_lora_its_own_matrices_are_unlearned(folder, tmp_path, lora, ask, caplog):
    for path in folder.glob("*.txt"):
        path.unlink()
    out = tmp_path / "out"
    caplog.set_level("INFO", "unlearn")
    [answer] = ask(folder, out, lora=f"{lora}:0.7", prompt="sks blob")
    record = json.loads((answer.folder / "influence.json").read_text())["identity"]
    assert record["settings"]["weight_selection"] == "lora" and record["lora"][0][1] == 0.7
    settings = json.loads((out / "root/dataset.json").read_text())
    assert settings["lora"] == [f"{lora}:0.7"] and settings["resolution"] == 160
    assert 'all images had the caption "sks blob"' in caplog.text
    assert "trained at 160 x 160 pixels" in caplog.text
    assert (
        "trained on 4 images by its header, here are 8"
        in (answer.folder / "report.html").read_text()
    )
    assert {row["caption"] for row in answer.table()} == {"sks blob"}
    flags = ["--task_json", str(out / "tasks.json"), "--dataroot", str(out / "root")]
    flags += ["--result_dir", str(out / "results"), "--device", "cpu"]
    few = ["--removal_timesteps", "350", "350", "--probes", "1"]
    compute_influence.main([*flags, "--scoring", "removal", *few])  # takes what is there
    [again] = ask(folder, out, lora=f"{lora}:0.7", prompt="sks blob")
    np.testing.assert_array_equal(again.scores, answer.scores)


def test_a_lora_that_cannot_be_used_is_refused_before_anything_is_written(
    folder, tmp_path, lora, refusal
):
    broken = lora.with_name("broken.safetensors")
    save_file({"x.lokr_w1": torch.ones(2)}, broken)
    text = refusal(folder, tmp_path / "out", lora=broken)
    assert "LoKr" in text and not (tmp_path / "out").exists()


def test_a_folder_s_groups_are_each_removed_as_a_whole(tmp_path, ask):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, count in ("cats", 3), ("others", 4):
        make_folder(folder / name, count)
    [answer] = ask(folder, tmp_path / "out", groups="folder")
    scores = {group.name: group.together.score for group in answer.report.groups}
    assert scores.keys() == {"cats", "others"}
    stored = dict(np.load(answer.folder / "influence.npz"))
    for number, name in enumerate(stored["group_names"]):
        images = [row for row in answer.report.rows if row.group == name]
        assert (stored["group_of"] == number).sum() == len(images)
        assert scores[name] > max(row.score for row in images)
    page = (answer.folder / "report.html").read_text()
    assert "without all of its images together" in page

    # And images are chosen together: all but one of so few.
    chosen, table = answer.chosen_set, answer.table()
    assert len({each["image"] for each in chosen}) == len(chosen) == 6
    assert (chosen[0]["rank"], chosen[0]["adds"]) == (1, pytest.approx(table[0]["score"]))
    with open(answer.folder / "influence.csv", encoding="utf-8-sig") as file:
        places = {row["image"]: row["set_place"] for row in csv.DictReader(file)}
    assert sorted(places.values()) == ["", "1", "2", "3", "4", "5", "6"]
    assert places[chosen[2]["image"]] == "3"
    assert "Missed most together" in page and page.count("adds +") in (0, 6)
    assert "No image stands out here, so that this" in page  # of seven none can
