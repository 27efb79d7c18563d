"""Linear datamodeling scores, their intervals, and curves of random removal: closed forms and known
worlds."""

import itertools

import numpy as np
import pytest

from unlearn.evaluation import datamodels
from unlearn.evaluation.datamodels import (
    average_ranks,
    choose_power,
    correlate,
    count_below,
    datamodeling_scores,
    equivalent_number,
    fit_rising,
    leave_models_out,
    mean_interval,
    predict,
    raise_scores,
    resampled_ranks,
    spearman,
)
from unlearn.evaluation.metrics import student_quantile


def make_world(num_queries=10, num_images=40, num_models=30, noise=0.0, seed=0):
    """Effects [queries, images], membership of random halves [models, images], and losses that are
    linear in it."""
    generator = np.random.default_rng(seed)
    effects = generator.normal(size=(num_queries, num_images))
    kept = np.array(
        [generator.permutation(num_images) < num_images // 2 for _ in range(num_models)]
    )
    losses = 5 - effects @ kept.T + noise * generator.normal(size=(num_queries, num_models))
    return effects, kept, losses


def rank_by_hand(row):
    return [
        np.mean([1 + place for place, other in enumerate(sorted(row)) if other == value])
        for value in row
    ]


def test_ranks_are_those_of_sorting_and_equal_values_share_the_mean_of_theirs():
    values = np.random.default_rng(0).integers(0, 5, (20, 9)).astype(float)
    np.testing.assert_array_equal(average_ranks(values), [rank_by_hand(row) for row in values])
    assert average_ranks(np.array([[3.0, 1.0, 3.0, 2.0]])).tolist() == [[3.5, 1, 3.5, 2]]


def test_resampled_ranks_are_those_of_the_rows_written_out_less_a_constant():
    generator = np.random.default_rng(1)
    values = generator.integers(0, 4, (6, 7)).astype(float)
    weights = generator.integers(0, 3, (5, 7))
    found = resampled_ranks(*count_below(values), weights)
    for draw, row in itertools.product(range(5), range(6)):
        written_out = np.repeat(np.arange(7), weights[draw])
        expected = average_ranks(values[row, written_out][None])[0]
        np.testing.assert_allclose(found[draw, row, written_out] + 0.5, expected)


def test_spearman_is_numpys_correlation_of_ranks_and_constants_predict_nothing():
    generator = np.random.default_rng(2)
    first, second = generator.integers(0, 6, (2, 8, 11)).astype(float)
    expected = [np.corrcoef(rank_by_hand(a), rank_by_hand(b))[0, 1] for a, b in zip(first, second)]
    np.testing.assert_allclose(spearman(first, second), expected, atol=1e-12)
    assert spearman(np.ones((1, 5)), np.arange(5.0)[None]).tolist() == [0]
    assert correlate(
        np.array([1.0, 2, 9]), np.array([2.0, 4, -9]), np.array([3, 2, 0])
    ) == pytest.approx(1)


def test_true_effects_have_lds_1_their_opposite_minus_1_and_noise_about_0():
    effects, kept, losses = make_world(num_queries=50, num_models=60)
    assert datamodeling_scores(effects, kept, losses) == pytest.approx(np.ones(50))
    assert datamodeling_scores(-effects, kept, losses) == pytest.approx(-np.ones(50))
    noise = datamodeling_scores(np.random.default_rng(9).normal(size=effects.shape), kept, losses)
    assert abs(noise.mean()) < 3 / np.sqrt(50 * 60)


def test_lds_depends_on_no_shift_and_no_scale_of_the_scores_and_on_no_order():
    effects, kept, losses = make_world(noise=2)
    expected = datamodeling_scores(effects, kept, losses)
    np.testing.assert_allclose(
        datamodeling_scores(3 * effects + 1000, kept, losses), expected, atol=1e-12
    )
    images, models, queries = (
        np.random.default_rng(4).permutation(count) for count in (40, 30, 10)
    )
    permuted = datamodeling_scores(
        effects[np.ix_(queries, images)],
        kept[np.ix_(models, images)],
        losses[np.ix_(queries, models)],
    )
    np.testing.assert_allclose(permuted, expected[queries], atol=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_sums_that_are_equal_but_for_rounding_rank_as_equal_whatever_the_scale_and_the_power(count):
    generator = np.random.default_rng(6)
    kept = generator.random((64, 362)).argsort(axis=1) < 181
    losses = generator.normal(size=(60, 64))
    chosen = np.zeros((60, 362), int)
    np.put_along_axis(chosen, generator.random((60, 362)).argsort(axis=1)[:, :count], 1, axis=1)
    expected = spearman((chosen @ kept.T.astype(int)).astype(float), -losses)
    for value, shift, power in (
        (0.3, 0, 1),
        (0.5, 0, 1),
        (1, 0, 1),
        (1e-9, 0, 1),
        (0.3, 1000, 1),
        (0.3, 0, 1.5),
        (0.7, 0, 4),
    ):
        scores = raise_scores(shift + value * chosen, power)
        np.testing.assert_allclose(datamodeling_scores(scores, kept, losses), expected, atol=1e-12)
    for value in 0.3, -0.37, 1 / 3:
        assert not datamodeling_scores(np.full(chosen.shape, value), kept, losses).any()


def test_a_power_takes_negative_scores_as_0_and_1_leaves_them_as_they_are():
    scores = np.array([[-3.0, 0.0, 2.0]])
    assert [raise_scores(scores, power).tolist() for power in (1, 2)] == [[[-3, 0, 2]], [[0, 0, 4]]]


def test_the_power_that_made_the_scores_from_the_effects_is_taken_back():
    effects, kept, losses = make_world(num_models=60)
    losses = 5 - np.exp(effects) @ kept.T
    assert choose_power(np.exp(effects / 3), kept, losses) == (3, pytest.approx(1))
    assert choose_power(np.exp(effects), kept, losses)[0] == 1


def test_leaving_a_model_out_is_the_lds_of_the_others_whatever_the_chunks(monkeypatch):
    effects, kept, losses = make_world(num_queries=4, num_models=9, noise=4)
    for chunk in 2, 100:
        monkeypatch.setattr(datamodels, "CHUNK", chunk)
        found = leave_models_out({"ours": predict(effects, kept)}, losses)["ours"]
        for model in range(9):
            others = np.arange(9) != model
            np.testing.assert_allclose(
                found[model], datamodeling_scores(effects, kept[others], losses[:, others])
            )


def measure_interval(effects, kept, losses):
    """The mean LDS of the true effects, and its interval."""
    predictions = {"ours": predict(effects, kept)}
    return mean_interval(
        spearman(predictions["ours"], -losses), leave_models_out(predictions, losses)["ours"]
    )


def test_where_nothing_varies_the_interval_is_the_estimate():
    assert measure_interval(*make_world()) == pytest.approx((1, 1, 1))


def test_what_models_do_to_all_queries_alike_widens_the_interval():
    effects, kept, losses = make_world(num_queries=60, num_models=20, noise=6)
    apart = np.ptp(measure_interval(effects, kept, losses))
    losses += 12 * np.random.default_rng(0).normal(size=20)  # queries cannot average it out
    assert np.ptp(measure_interval(effects, kept, losses)) > 1.3 * apart


def test_the_interval_of_one_query_is_that_of_its_models():
    effects, kept, losses = make_world(num_queries=1, noise=5)
    mean, low, high = measure_interval(effects, kept, losses)
    assert low < mean < high and high - low > 0.2


def test_an_interval_ends_where_the_measure_does():
    found = [
        mean_interval(
            np.array([0.9, -0.9, 0.8]), np.array([[1.0, 1, 1], [-1, -1, -1], [0, 0, 0]]), largest
        )
        for largest in (1, 2)
    ]
    assert [interval[1:] for interval in found] == [(-1, 1), (-2, 2)]


def test_intervals_of_lds_and_of_paired_differences_are_as_wide_as_the_estimates_scatter():
    """Many worlds whose queries and models are drawn anew: the estimates' standard deviation is
    known."""
    generator, found = np.random.default_rng(0), []
    for _ in range(200):
        effects, noise, other = generator.normal(size=(3, 16, 30))
        kept = generator.random((24, 30)).argsort(axis=1) < 15
        losses = (
            3 * generator.normal(size=(16, 24)) + 2 * generator.normal(size=24) - effects @ kept.T
        )
        scores = {
            "ours": effects + generator.uniform(0.5, 1.5, (16, 1)) * noise,
            "other": effects + noise + other,
        }
        predictions = {method: predict(array, kept) for method, array in scores.items()}
        ours, theirs = (spearman(array, -losses) for array in predictions.values())
        left, their_left = leave_models_out(predictions, losses).values()
        found.append([mean_interval(ours, left), mean_interval(ours - theirs, left - their_left)])
    means, lows, highs = np.array(found).transpose(2, 0, 1)
    told = np.sqrt(np.mean(((highs - lows) / 2 / student_quantile(15)) ** 2, axis=0))
    np.testing.assert_allclose(
        told / means.std(axis=0, ddof=1), 1, atol=0.2
    )  # a bootstrap of queries and models at once tells 1.3 to 1.4
    truth = means.mean(axis=0)
    assert (np.abs(((lows <= truth) & (truth <= highs)).mean(axis=0) - 0.95) <= 0.035).all()


def test_the_rising_fit_is_the_closest_of_all_that_never_fall():
    values, weights = np.array([1.0, 4.0, 2.0, 0.0, 5.0]), np.array([1.0, 1.0, 2.0, 1.0, 3.0])
    fitted = fit_rising(values, weights)
    assert (
        (np.diff(fitted) >= 0).all()
        and fitted[0] == 1
        and fitted[1:4] == pytest.approx(2)
        and fitted[4] == 5
    )
    grid = np.arange(0, 5.1, 0.5)
    closest = min(
        weights @ (np.array(rising) - values) ** 2
        for rising in itertools.combinations_with_replacement(grid, 5)
    )
    assert weights @ (fitted - values) ** 2 == pytest.approx(closest)


def test_the_equivalent_number_is_read_off_the_line_through_0():
    curve = np.array([10, 20, 40]), np.array([1.0, 3.0, 4.0]), np.ones(3)
    found = [equivalent_number(*curve, target) for target in (-1, 0, 0.5, 1, 2, 3, 3.5, 4)]
    assert found == pytest.approx([0, 0, 5, 10, 15, 20, 30, 40])
    assert equivalent_number(*curve, 4.001) == np.inf


def test_the_equivalent_number_never_falls_as_the_target_rises_even_where_the_measured_curve_does():
    counts, changes = np.array([5, 10, 20, 40]), np.array([-1.0, 3.0, 1.0, 4.0])
    numbers = [
        equivalent_number(counts, changes, np.ones(4), target) for target in np.linspace(0, 5, 51)
    ]
    assert (np.diff([min(number, 99) for number in numbers]) >= 0).all() and numbers[-1] == np.inf
    assert equivalent_number(counts, changes, np.ones(4), 2) == pytest.approx(
        10
    )  # 3 and 1 are pooled to 2
