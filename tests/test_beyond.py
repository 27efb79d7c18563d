"""The ceiling of the linear datamodeling score, and scores beyond something simpler, on linear
datamodels whose answers are known."""

import numpy as np
import pytest

from unlearn.evaluation.beyond import (
    beyond_scores,
    beyond_top_image,
    scores_beyond,
    take_out,
)
from unlearn.evaluation.ceiling import additive_shares, highest_score, overlaps
from unlearn.evaluation.datamodels import datamodeling_scores

NUM_IMAGES, NUM_MODELS, NUM_QUERIES = 60, 64, 40


def halves(rng, num_models=NUM_MODELS):
    kept = np.zeros((num_models, NUM_IMAGES), bool)
    for row in kept:
        row[rng.permutation(NUM_IMAGES)[: NUM_IMAGES // 2]] = True
    return kept


def linear_world(rng, share, num_models=NUM_MODELS):
    """Effects [queries, N], halves, and losses of which `share` is additive."""
    kept = halves(rng, num_models)
    effects = rng.exponential(size=(NUM_QUERIES, NUM_IMAGES)) ** 2
    sums = effects @ kept.T
    spread = effects.std(axis=1, keepdims=True) * (NUM_IMAGES / 4) ** 0.5
    noise = rng.normal(size=sums.shape) * spread * ((1 - share) / share) ** 0.5
    return effects, kept, noise - sums


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_additive_share_of_a_linear_world_is_found_on_average(share):
    rng = np.random.default_rng(1)
    found = []
    for _ in range(40):
        _, kept, losses = linear_world(rng, share)
        found.append(additive_shares(losses, overlaps(kept)).mean())
    assert np.mean(found) == pytest.approx(share, abs=3 * np.std(found) / 40**0.5 + 0.02)


def test_losses_of_noise_alone_have_no_additive_share():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(40):
        kept = halves(rng)
        losses = rng.normal(size=(NUM_QUERIES, NUM_MODELS))
        found.append(additive_shares(losses, overlaps(kept)).mean())
    assert abs(np.mean(found)) < 4 * np.std(found) / 40**0.5 < 0.05


def test_interactions_of_images_are_not_additive():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(40):
        kept = halves(rng)
        pairs = rng.permutation(NUM_IMAGES)[: 2 * NUM_QUERIES // 2].reshape(2, -1)
        # The loss of "exactly one of two is there" is an interaction without main effects.
        losses = np.logical_xor(kept[:, pairs[0]], kept[:, pairs[1]]).T.astype(float)
        found.append(additive_shares(losses, overlaps(kept)).mean())
    assert np.mean(found) < 0.1


def test_the_interval_of_the_ceiling_holds_the_true_one_and_true_scores_reach_it():
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(20):
        effects, kept, losses = linear_world(rng, 0.6)
        value, low, high = highest_score(losses, kept)
        inside += low <= 0.6**0.5 <= high
        assert low <= value <= high
    assert inside >= 17
    reached = datamodeling_scores(effects, kept, losses).mean()
    assert reached == pytest.approx(0.6**0.5, abs=0.05)


def test_few_models_and_constant_losses_have_no_ceiling():
    rng = np.random.default_rng(5)
    _, kept, losses = linear_world(rng, 0.5, 7)
    assert np.isnan(highest_score(losses, kept)).all()
    kept = halves(rng)
    assert np.isnan(highest_score(np.ones((3, NUM_MODELS)), kept)).all()


def test_a_query_whose_losses_are_constant_does_not_enter_the_ceiling():
    rng = np.random.default_rng(6)
    _, kept, losses = linear_world(rng, 0.5)
    more = np.concatenate([losses, np.ones((1, NUM_MODELS))])
    assert highest_score(more, kept) == highest_score(losses, kept)


def test_what_is_left_has_nothing_of_what_was_taken_out():
    rng = np.random.default_rng(7)
    values, known = rng.normal(size=(2, 5, 30))
    left = take_out(values, known)
    assert np.abs((left * (known - known.mean(axis=1, keepdims=True))).sum(axis=1)).max() < 1e-12
    np.testing.assert_allclose(take_out(values + 3 * known + 7, known), left, atol=1e-12)


def test_a_constant_explains_nothing():
    values = np.random.default_rng(8).normal(size=(3, 20))
    left = take_out(values, np.ones((3, 20)))
    np.testing.assert_allclose(left, values - values.mean(axis=1, keepdims=True), atol=1e-15)


def test_nothing_is_left_of_a_prediction_beyond_itself():
    rng = np.random.default_rng(9)
    predictions, losses = rng.normal(size=(2, 4, 25))
    assert not scores_beyond(predictions, losses, 2 * predictions + 1).any()


def test_a_method_that_knows_the_top_image_alone_says_nothing_beyond_it():
    rng = np.random.default_rng(10)
    effects, kept, losses = linear_world(rng, 0.9)
    only = np.zeros_like(effects)
    only[np.arange(NUM_QUERIES), effects.argmax(axis=1)] = 1
    assert datamodeling_scores(only, kept, losses).mean() > 0.3
    assert not beyond_top_image(only, kept, losses).any()
    assert beyond_top_image(effects, kept, losses).mean() > 0.8


def test_beyond_other_scores_counts_what_they_do_not_know():
    rng = np.random.default_rng(11)
    first, second = rng.exponential(size=(2, NUM_QUERIES, NUM_IMAGES)) ** 2
    kept = halves(rng)
    losses = -(first + second) @ kept.T
    assert beyond_scores(first + second, first, kept, losses).mean() > 0.99
    assert not beyond_scores(first, first, kept, losses).any()
    assert abs(beyond_scores(rng.permuted(first, axis=1), first, kept, losses).mean()) < 0.1
