"""Pairs of a trained picture and a never-trained one that are alike, and the share that a score
tells."""

import numpy as np
import pytest

from data.emoji_builder import never_trained

RANDOM = np.random.default_rng(0)
TRAINED = RANDOM.permutation(64) < 32
SIMILARITY = RANDOM.normal(size=64) + TRAINED  # trained ones are the more similar
PAIRS = never_trained.find_pairs(SIMILARITY, TRAINED)


def test_a_pair_is_a_trained_picture_of_the_first_and_a_never_trained_one_beside_it():
    order = np.argsort(-SIMILARITY)
    first, never = set(order[: never_trained.FIRST]), order[~TRAINED[order]]
    ranks = np.argsort(order)
    assert len(PAIRS) and len(np.unique(PAIRS, axis=0)) == len(PAIRS)
    for trained, twin in PAIRS:
        assert TRAINED[trained] and not TRAINED[twin] and trained in first
        low, high = sorted(ranks[[trained, twin]])
        assert not set(never) & set(order[low + 1 : high])


def test_similarity_and_what_follows_from_it_tell_nothing_of_pairs_though_much_of_all():
    assert never_trained.separate(SIMILARITY, ~TRAINED) > 0.6
    for scores in SIMILARITY, np.exp(3 * SIMILARITY), -SIMILARITY, np.zeros(64):
        assert never_trained.share_right(scores, PAIRS) == 0.5


def test_a_score_that_knows_which_pictures_were_trained_tells_all_pairs():
    assert never_trained.share_right(SIMILARITY + 10 * TRAINED, PAIRS) == 1
    assert never_trained.share_right(-1.0 * TRAINED, PAIRS) == 0


def test_pictures_without_a_twin_on_each_side_make_no_pair():
    similarity = np.arange(64.0)
    pairs = never_trained.find_pairs(similarity, similarity >= 32)
    assert pairs.shape == (0, 2) and np.isnan(never_trained.share_right(similarity, pairs))


def test_the_table_has_means_and_errors_over_models():
    shares = [{"mine": (0.5, 0.6, 1)}, {"mine": (0.7, 0.6, 0)}]
    [row] = never_trained.summarise([(shares[0], 3), (shares[1], 4)])
    assert row[:2] == ("mine", 7) and row[-1] == 2
    assert row[2:8] == pytest.approx((0.6, 0.1, 0.6, 0, 0.5, 0.5))


def test_a_model_is_measured_by_pairs_by_all_images_and_by_the_first():
    scores = {"similarity": SIMILARITY[None], "knows": TRAINED[None] + 0.0}
    shares, num_pairs = never_trained.measure(scores, TRAINED)
    assert num_pairs == len(PAIRS) and shares["knows"] == (1, 1, 1)
    assert shares["similarity"][0] == 0.5 < shares["similarity"][1]
