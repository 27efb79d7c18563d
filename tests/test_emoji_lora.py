"""The world of LoRA fine-tunes: twelve small folders as people have them, and what is planted in
them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.emoji_builder import lora, lora_answers, lora_results
from unlearn.datasets.captions import read_lines
from unlearn.datasets.folders import read_folder
from unlearn.datasets.repeats import read_repeats
from unlearn.datasets.settings import read_settings
from unlearn.models.lora_files import read_lora
from unlearn.models.lora_names import parse_name

REPOSITORY = Path(__file__).parent.parent
ROOT = REPOSITORY / "data/emoji_lora"
SPLIT = json.loads((ROOT / "folders.json").read_text())
FOLDERS = SPLIT["tuning"] + SPLIT["reported"]


def plan_of(name):
    return next(plan for plan in lora.PLANS if plan.name == name)


def test_settings_are_chosen_on_other_folders_than_are_reported():
    assert len(FOLDERS) == len(set(FOLDERS)) == 12 == len(lora.PLANS)
    assert len(SPLIT["tuning"]) == 4
    assert sum(bool(plan.trigger) for plan in lora.PLANS) == 6


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_as_people_have_them(name):
    plan, images = plan_of(name), ROOT / name / "laion_subset/images"
    found = read_folder(images)
    captions = [entry.captions for entry in found.entries]
    lines = read_lines(ROOT / name / "laion_subset/metadata.jsonl")
    assert [[json.loads(line)["text"]] for line in lines] == captions
    repeats = read_repeats(ROOT / name, len(captions)) or (1,) * len(captions)
    assert [entry.repeats for entry in found.entries] == list(repeats)
    assert set(repeats) == set(plan.repeats) and 12 <= len(captions) <= 60
    assert (len(set(map(tuple, captions))) == 1) == bool(plan.trigger)


@pytest.mark.parametrize("name", FOLDERS)
def test_planted_pictures_are_those_of_the_plan(name):
    plan, root = plan_of(name), ROOT / name
    spoiled = json.loads((root / "spoiled.json").read_text())
    expected = {"copies": 9, "captions": 3, "marks": 6, "": 0}[plan.fault]
    assert len(spoiled) == expected
    files = [root / "laion_subset/images" / file for file in spoiled]
    if plan.fault == "copies":
        captions = Counter(file.with_suffix(".txt").read_text() for file in files)
        assert set(captions.values()) == {lora.COPIES}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_lora_is_one_by_diffusers_own_saver_for_the_base_model(name):
    settings = read_settings(ROOT / name)
    [path] = settings["lora"]
    found = read_lora(parse_name(path))
    assert Path(path).stat().st_size < 200_000
    assert "lora_adapter_metadata" in found.header
    assert {pair.scale for pair in found.pairs.values()} == {1.0}
    assert {part for part, _ in found.pairs} == {"unet"}
    assert max(len(pair.down) for pair in found.pairs.values()) == lora.RANK
    tasks = json.loads((REPOSITORY / f"tasks/emoji_lora/{name}.json").read_text())
    assert len(tasks) == lora.NUM_QUERIES


def test_measures_of_scores_that_know_everything_are_one_and_of_their_opposite_minus_one():
    rng = np.random.default_rng(0)
    rises = rng.random(8)
    halves = np.array([rng.permutation(8) < 4 for _ in range(40)])
    losses = (~halves) @ rises
    best = lora_results.measure(rises, rises, halves, losses, [int(np.argmax(rises))])
    assert best == pytest.approx({"leave-one-out": 1, "first": 1, "LDS": 1, "planted": 1})
    worst = lora_results.measure(-rises, rises, halves, losses, [int(np.argmax(rises))])
    assert worst == pytest.approx({"leave-one-out": -1, "first": 0, "LDS": -1, "planted": 0})


def test_scores_that_know_which_images_spoil_tell_them_apart_and_others_do_not():
    rises = np.random.default_rng(0).normal(size=40)
    assert lora_answers.separate(rises, rises < 0) == 1
    assert lora_answers.separate(-rises, rises < 0) == 0
    assert lora_answers.separate(np.zeros(40), rises < 0) == 0.5
    assert np.isnan(lora_answers.separate(rises, np.zeros(40, bool)))


def test_the_committed_answers_are_those_of_the_committed_files(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    written = json.loads((REPOSITORY / lora_answers.EVIDENCE / "answers.json").read_text())
    scores = json.loads((REPOSITORY / lora_answers.EVIDENCE / "scores.json").read_text())
    assert written["tuning"]["folders"] + written["reported"]["folders"] == FOLDERS
    folders = [lora_answers.open_folder(name, scores[name]) for name in SPLIT["tuning"]]
    for question, judge in lora_answers.JUDGES.items():
        assert json.loads(json.dumps(judge(folders))) == written["tuning"][question]


def test_sets_that_are_left_out_were_chosen_by_scores_alone(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    scores = json.loads((REPOSITORY / lora_answers.EVIDENCE / "scores.json").read_text())
    for name in FOLDERS:
        folder = lora_answers.open_folder(name, scores[name])
        quarter, highest = folder.usage.shape[1] // 4, folder.usage.max(axis=0)
        for kind, sign in ("low", 1), ("high", -1):
            chosen = np.argsort(sign * highest)[:quarter]
            assert sorted(chosen.tolist()) == folder.rows[kind]
        for rows in lora_answers.list_copies(name):
            assert rows in folder.rows.values() and len(rows) == lora.COPIES
