"""Intervals of scores hold what they say, and the ranks that go with them."""

import numpy as np
import pytest

from unlearn.attribution.intervals import LEVEL, QUANTILES, find_intervals, find_ranks, t_quantile


def test_one_draw_tells_nothing_of_its_error():
    assert find_intervals(np.ones((1, 5))) is None


@pytest.mark.parametrize("num_draws", [2, 4, 8, 20])
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_intervals_of_skewed_scores_hold_their_expectation_as_often_as_they_say(num_draws, spread):
    """Draws are log-normal: positive and skewed, as scores are."""
    random = np.random.default_rng(0)
    draws = np.exp(random.normal(0, spread, (num_draws, 20_000)))
    expected = num_draws * np.exp(spread**2 / 2)
    found = find_intervals(draws)
    covered = ((found.low <= expected) & (expected <= found.high)).mean()
    assert abs(covered - LEVEL) < 0.05


def test_the_error_is_the_jackknifes_over_draws():
    draws = np.random.default_rng(0).gamma(2.0, size=(5, 7))
    left_out = np.array([5 / 4 * np.delete(draws, draw, axis=0).sum(axis=0) for draw in range(5)])
    jackknife = np.sqrt(4 / 5 * np.square(left_out - left_out.mean(axis=0)).sum(axis=0))
    np.testing.assert_allclose(find_intervals(draws).error, jackknife)


def test_ranks_are_those_that_some_scores_within_the_intervals_have():
    random = np.random.default_rng(1)
    low = random.normal(size=8)
    high = low + random.gamma(0.5, size=8)
    first, last = find_ranks(low, high)
    for image in range(8):
        others = np.arange(8) != image
        assert first[image] == 1 + (low[others] > high[image]).sum()
        assert last[image] == 8 - (high[others] < low[image]).sum()


def test_images_whose_scores_are_0_in_every_draw_have_no_interval_above_it():
    found = find_intervals(np.array([[0.0, 1.0], [0.0, 2.0]]))
    assert found.low[0] == found.high[0] == found.error[0] == 0


def test_quantiles_go_on_where_the_table_ends():
    assert t_quantile(len(QUANTILES) + 1) == pytest.approx(1.7959, abs=1e-3)
    assert t_quantile(30) == pytest.approx(1.6973, abs=1e-3)
    assert t_quantile(10**6) == pytest.approx(1.645, abs=1e-3)
