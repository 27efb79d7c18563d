"""Which images do the same, and which none of several pictures uses."""

import numpy as np
import pytest

from unlearn.attribution.likeness import compare_images, group_alike
from unlearn.attribution.usage import find_unused


def in_blocks(features, size=3):
    return lambda: (features[start : start + size] for start in range(0, len(features), size))


def compare_directly(features, ridge):
    """The definition, with the matrix inverted in the space of features."""
    count, num_timesteps, num_rows, size = features.shape
    total = np.zeros((count, count))
    for timestep in range(num_timesteps):
        rows = features[:, timestep].reshape(-1, size)
        damping = ridge * np.square(rows).sum() / len(rows)
        hat = rows @ np.linalg.inv(rows.T @ rows + damping * np.eye(size)) @ rows.T
        shared = np.array(
            [
                [
                    np.trace(
                        hat[
                            first * num_rows : (first + 1) * num_rows,
                            second * num_rows : (second + 1) * num_rows,
                        ]
                    )
                    for second in range(count)
                ]
                for first in range(count)
            ]
        )
        total += shared / np.sqrt(np.outer(shared.diagonal(), shared.diagonal()))
    return total / num_timesteps


@pytest.mark.parametrize("size", [64, 5])  # more columns than rows, and fewer
def test_likeness_is_the_correlation_of_what_fixes_predictions(size):
    features = np.random.default_rng(0).normal(size=(7, 2, 2, size))
    found = compare_images(in_blocks(features), 0.1)
    np.testing.assert_allclose(found, compare_directly(features, 0.1), atol=1e-10)
    np.testing.assert_allclose(found.diagonal(), 1)
    whole = compare_images(in_blocks(features, 7), 0.1)
    np.testing.assert_allclose(whole, found, atol=1e-12)  # blocks are a matter of memory


def test_copies_are_alike_and_images_that_share_nothing_are_not():
    own = np.eye(6)[:, None, None]
    features = np.concatenate([own, own[:2], own[:1]])  # 0, 6 and 8 are copies; so are 1 and 7
    likeness = compare_images(in_blocks(features), 0.1)
    assert likeness[0, 6] == pytest.approx(1) and likeness[0, 1] == pytest.approx(0)
    assert group_alike(likeness) == [[0, 6, 8], [1, 7]]
    seen = compare_images(in_blocks(features), 0.1, np.array([1, 4] + [1] * 7))
    assert seen[1, 7] == pytest.approx(1)


def test_an_image_without_features_is_like_none():
    features = np.zeros((3, 1, 1, 4))
    features[:2] = np.random.default_rng(0).normal(size=(2, 1, 1, 4))
    likeness = compare_images(in_blocks(features), 0.1)
    assert np.isfinite(likeness).all() and not likeness[2].any()


def test_groups_are_linked_by_likeness_and_alone_is_no_group():
    likeness = np.eye(5)
    likeness[0, 1] = likeness[1, 0] = likeness[1, 4] = likeness[4, 1] = 0.95
    likeness[2, 3] = likeness[3, 2] = 0.89
    assert group_alike(likeness, 0.9) == [[0, 1, 4]]
    assert group_alike(likeness, 0.96) == []
    assert group_alike(likeness, 0.8) == [[0, 1, 4], [2, 3]]


def test_an_image_is_unused_where_no_picture_has_it_above_the_average():
    scores = np.array([[0.1, 5.0, 0.1, 2.0], [4.0, 0.1, 0.1, 0.1]])
    np.testing.assert_array_equal(find_unused(scores), [False, False, True, False])
    assert not find_unused(np.ones((2, 3))).any()  # all are used alike


def test_of_images_that_do_the_same_what_they_do_together_decides():
    scores = np.array([[0.1, 5.0, 0.1, 2.0], [4.0, 0.1, 0.1, 0.1]])
    low, high = np.array([[0.1], [0.5]]), np.array([[0.1], [4.0]])
    assert find_unused(scores, [[2, 3]], low)[[2, 3]].all()
    for group_scores in high, None, np.full((2, 1), np.nan):
        assert not find_unused(scores, [[2, 3]], group_scores)[[2, 3]].any()
