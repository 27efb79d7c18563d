"""The world that similarity cannot pass: what looks and reads most like a query is not what taught
it."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.emoji_builder import shared, shared_queries
from unlearn.datasets.captions import read_lines
from unlearn.datasets.repeats import read_repeats

REPOSITORY = Path(__file__).parent.parent
ROOT = REPOSITORY / "data/emoji_shared"
CAPTIONS = read_lines(ROOT / "laion_subset/captions.txt")


def prompts(name):
    tasks = json.loads((REPOSITORY / f"tasks/{name}.json").read_text())
    return [task["prompt"] for task in tasks]


def test_every_picture_has_a_caption_and_one_or_four_repeats():
    images = list((ROOT / "laion_subset/images").iterdir())
    repeats = read_repeats(ROOT, len(images))
    assert len(images) == len(CAPTIONS) == len(repeats)
    assert Counter(repeats) == {4: len(images) // 2, 1: len(images) // 2}


def test_each_emoji_stands_on_two_squares_unequally_often():
    pictures, _ = shared.plan_pictures(np.random.default_rng(0))
    by_emoji = {}
    for emoji, _, square, repeats in pictures:
        by_emoji.setdefault(emoji, []).append((square, repeats))
    assert all(len({square for square, _ in found}) == 2 for found in by_emoji.values())
    assert all(sorted(repeats for _, repeats in found) == [1, 4] for found in by_emoji.values())


def test_no_query_asks_for_a_pair_that_a_picture_has():
    reported, tuning = prompts("emoji_shared"), prompts("emoji_shared_tuning")
    assert (len(reported), len(tuning)) == (60, 20)
    assert not set(reported + tuning) & set(CAPTIONS)
    for prompt in reported + tuning:
        square, *_, category = prompt.split()
        assert any(caption.startswith(f"{square} ") for caption in CAPTIONS)
        assert any(caption.endswith(f" {category}") for caption in CAPTIONS)


def test_queries_are_the_candidates_that_are_least_like_any_picture_at_most_two_of_a_prompt():
    prompts_of = [f"prompt {number // 10}" for number in range(900)]
    like = np.random.default_rng(0).permutation(900) / 900
    reported, tuning = shared_queries.choose(prompts_of, like)
    chosen = sorted(reported + tuning)
    assert (len(reported), len(set(chosen))) == (60, 80)
    of_prompt = Counter(prompts_of[row] for row in chosen)
    assert max(of_prompt.values()) == 2
    for row in set(range(900)) - set(chosen):  # left out for one that is less like
        others = [other for other in chosen if prompts_of[other] == prompts_of[row]]
        assert len(others) == 2 and like[others].max() < like[row] or like[chosen].max() < like[row]


def test_reported_and_tuning_queries_are_different_pictures():
    seeds = [
        {(task["prompt"], task["seed"]) for task in json.loads(path.read_text())}
        for path in (REPOSITORY / "tasks").glob("emoji_shared*.json")
    ]
    assert len(seeds) == 2 and not seeds[0] & seeds[1]


def test_what_training_starts_from_has_seen_none_of_the_emoji():
    seen = set(read_lines(REPOSITORY / "data/emoji_small/laion_subset/captions.txt"))
    assert not seen & {name for names in shared.CATEGORIES.values() for name in names}


@pytest.mark.parametrize("square", ["red", "black"])
def test_an_emoji_is_cut_out_of_its_white_paper(square):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste((0, 128, 255), (20, 20, 44, 44))
    picture.paste("white", (28, 28, 36, 36))  # white inside of it stays
    composed = np.asarray(shared.compose(picture, square)).astype(int)
    assert (
        np.abs(composed[[0, 0, -1, -1, 12], [0, -1, 0, -1, 32]] - shared.SQUARES[square]).max() == 0
    )
    assert composed[32, 32].min() > 240
    assert composed[25, 25, 2] > 200 and composed[25, 25, 0] < 60
