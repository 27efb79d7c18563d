"""Images that are chosen together: each next one is most missed where the others are gone."""

import numpy as np
import pytest

from data.emoji_builder import chosen_together as together
from unlearn.attribution.removal_groups import group_rises
from unlearn.attribution.removal_scores import score_draws


def test_what_is_left_open_is_the_dense_inverse_without_the_others():
    random = np.random.default_rng(0)
    images, query = random.normal(size=(6, 2, 4)), random.normal(size=(2, 4))
    grams = np.einsum("ndk,mdk->dnm", images, images)
    along, own = np.einsum("ndk,dk->dn", images, query), np.square(query).sum(axis=-1)
    rows, expected = [0, 2, 5], 0.0
    for draw in range(2):
        some = images[rows, draw]
        ridge = together.RIDGE * np.square(images[:, draw]).sum() / 6
        expected += query[draw] @ np.linalg.inv(some.T @ some + ridge * np.eye(4)) @ query[draw]
    assert together.left_open(grams, along, own, rows) == pytest.approx(expected, rel=1e-10)


def test_what_a_set_leaves_open_is_what_removal_says_of_it_as_a_group():
    random = np.random.default_rng(2)
    images, query = random.normal(size=(6, 2, 4)), random.normal(size=(2, 4))
    grams = np.einsum("ndk,mdk->dnm", images, images)
    given = grams, np.einsum("ndk,dk->dn", images, query), np.square(query).sum(axis=-1)
    gone, rises = [1, 4, 5], []

    def tell(draw, rows, inverse):
        take = lambda group: iter([images[group, draw][:, None]])
        rises.append(group_rises({"set": gone}, take, rows, inverse)[0, 0])

    score_draws(lambda: iter([images[:, :, None]]), query[None, :, None], together.RIDGE, tell=tell)
    found = together.left_open(*given, [0, 2, 3]) - together.left_open(*given, list(range(6)))
    assert found == pytest.approx(sum(rises), rel=1e-6)


def test_each_next_image_is_the_one_most_missed_where_the_others_are_gone():
    random = np.random.default_rng(1)
    images, query = random.normal(size=(7, 2, 4)), random.normal(size=(2, 4))
    grams = np.einsum("ndk,mdk->dnm", images, images)
    given = grams, np.einsum("ndk,dk->dn", images, query), np.square(query).sum(axis=-1)
    left, chosen = list(range(7)), together.choose(images, query, 4)
    for image in chosen:
        most = max(
            left, key=lambda gone: together.left_open(*given, [r for r in left if r != gone])
        )
        assert image == most
        left.remove(image)
    assert together.choose(images, query, 2) == chosen[:2]
