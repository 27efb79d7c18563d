"""Images that are chosen together: each next one is most missed where the others are gone."""

import numpy as np
import pytest

import unlearn
from unlearn.attribution.removal import RemovalSettings
from unlearn.attribution.removal_scores import ridge_inverse, score_removal
from unlearn.attribution.removal_sets import choose_sets, pick_candidates
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.evaluation.stored_sets import read_set
from unlearn.report.chosen import describe_set
from unlearn.report.contents import Row

RIDGE = 0.2


def choose(features: np.ndarray, queries: np.ndarray, count: int):
    """Sets of queries [queries, draws, rows, size] among features [N, draws, rows, size], by dense
    inverses."""

    def inverse_of(draw):
        flat = features[:, draw].reshape(-1, features.shape[-1])
        damping = RIDGE * np.square(flat).sum(axis=-1).mean()
        dense = np.linalg.inv(flat.T @ flat + damping * np.eye(flat.shape[1]))
        return lambda rows: rows @ dense

    scores = score_removal(lambda: iter([features]), queries, RIDGE)
    take = lambda draw, rows: iter([features[rows[:2], draw], features[rows[2:], draw]])
    return choose_sets(scores, queries, count, take, inverse_of)


def left_open(
    features: np.ndarray, query: np.ndarray, gone: list[int], ridge: float = RIDGE
) -> float:
    """phi_q^T (Phi^T Phi + lambda I)^-1 phi_q without some images, lambda as with all of them; summed
    over draws and rows of the query."""
    total = 0.0
    for draw in range(features.shape[1]):
        flat = features[:, draw].reshape(-1, features.shape[-1])
        damping = ridge * np.square(flat).sum(axis=-1).mean()
        rows = np.delete(features[:, draw], gone, axis=0).reshape(-1, features.shape[-1])
        inner = rows.T @ rows + damping * np.eye(rows.shape[1])
        total += np.trace(query[draw] @ np.linalg.solve(inner, query[draw].T))
    return total


@pytest.mark.parametrize("size", [6, 40])  # fewer numbers than rows of all images, and more
def test_each_next_image_is_the_one_most_missed_where_those_before_it_are_gone(size, monkeypatch):
    monkeypatch.setattr("unlearn.attribution.removal_sets.AT_ONCE", 1)
    random = np.random.default_rng(1)
    features, queries = random.normal(size=(9, 2, 2, size)), random.normal(size=(2, 2, 2, size))
    for query, chosen in zip(queries, choose(features, queries, 5)):
        gone: list[int] = []
        for row, rise in zip(chosen.rows.tolist(), chosen.rises):
            without = {
                image: left_open(features, query, [*gone, image])
                for image in set(range(9)) - set(gone)
            }
            assert row == max(without, key=without.__getitem__)
            assert rise == pytest.approx(without[row] - left_open(features, query, gone), rel=1e-8)
            gone.append(row)
        whole = left_open(features, query, gone) - left_open(features, query, [])
        assert chosen.score == pytest.approx(whole, rel=1e-8)


def test_a_smaller_set_is_the_beginning_of_a_larger_one_and_never_all_images():
    random = np.random.default_rng(2)
    features, queries = random.normal(size=(6, 1, 1, 9)), random.normal(size=(1, 1, 1, 9))
    [three], [all_but_one] = choose(features, queries, 3), choose(features, queries, 99)
    assert len(all_but_one.rows) == len(set(all_but_one.rows.tolist())) == 5
    assert all_but_one.rows[:3].tolist() == three.rows.tolist()


def test_a_set_holds_both_twins_that_a_ranking_puts_last():
    """Alone neither is missed, for the other fills its place."""
    random = np.random.default_rng(3)
    alone = random.normal(size=(8, 1, 1, 20))
    features = np.concatenate([alone, alone[:1]])
    query = alone[:1] + 0.2 * alone[1:2] + 0.1 * alone[2:3]
    scores = score_removal(lambda: iter([features]), query, 1e-3)[0]
    assert set(np.argsort(-scores)[:2].tolist()) == {1, 2}
    [chosen] = choose(features, query, 4)
    assert {0, 8} <= set(chosen.rows.tolist())


def test_a_set_ends_before_an_image_whose_own_part_is_lost_in_rounding():
    """Of three copies the last is all that there is of its direction but for the ridge."""
    random, ridge = np.random.default_rng(4), 1e-5
    features = np.concatenate([random.normal(size=(20, 1, 1, 100))] * 3)
    query = features[:1] + 0.3 * random.normal(size=(1, 1, 1, 100))
    inverse_of = lambda draw: ridge_inverse(lambda: iter([features[:, 0]]), 100, ridge)[0]
    take = lambda draw, rows: iter([features[rows, draw]])
    scores = score_removal(lambda: iter([features]), query, ridge)
    [chosen] = choose_sets(scores, query, 59, take, inverse_of)
    assert 0 < len(chosen.rows) < 59
    gone = chosen.rows.tolist()
    rise = left_open(features, query[0], gone, ridge) - left_open(features, query[0], [], ridge)
    assert chosen.score == pytest.approx(rise, rel=1e-2)
    [whole] = choose(features, query, 59)
    assert len(whole.rows) == 59


def test_candidates_are_the_best_as_many_as_may_be_compared_in_their_order(monkeypatch):
    monkeypatch.setattr("unlearn.attribution.removal_sets.MOST_ROWS", 6)
    scores = np.array([0.1, 0.9, 0.3, 0.8, 0.0])
    assert pick_candidates(scores, 2).tolist() == [1, 2, 3]
    assert pick_candidates(scores, 1).tolist() == [0, 1, 2, 3, 4]
    assert pick_candidates(scores, 99).tolist() == [1]


def test_a_study_chooses_by_its_shards_what_dense_features_say(model, training_set, tmp_path):
    sets = {"exemplar": training_set.take([50, 51]), "laion": training_set.first(35)}
    repeats = tuple(1 + number % 3 for number in range(37))
    settings = RemovalSettings(timesteps=(100, 600), probes=2, sketch_size=64)
    study = RemovalStudy(model, sets, tmp_path, settings, RIDGE, repeats)
    study.build()
    query = training_set.take([55])
    features = np.concatenate(list(study.blocks())).astype(np.float64)
    features *= np.sqrt(repeats)[:, None, None, None]
    asked = study.maker.make(query, [0]).astype(np.float64)
    scored = study.score_all([query], set_size=4)
    [expected], [found] = choose(features, asked, 4), scored.sets
    assert found.rows.tolist() == expected.rows.tolist()
    np.testing.assert_allclose(found.rises, expected.rises, rtol=1e-8)
    assert found.rises[0] == pytest.approx(scored.draws.sum(axis=0).max())
    assert study.score_all([query]).sets == []


def test_the_interface_chooses_what_a_study_does(model, training_set, tmp_path):
    images, query = training_set.first(9), training_set.take([55])
    settings = RemovalSettings(timesteps=(100, 600), probes=2, sketch_size=64)
    study = RemovalStudy(model, {"laion": images}, tmp_path, settings)
    study.build()
    [expected] = study.score_all([query], set_size=3).sets
    found = unlearn.choose_set(model, images, query, 3, tmp_path, settings)
    assert found.rows.tolist() == expected.rows.tolist()
    assert unlearn.choose_set(model, images.first(2), query, 3, settings=settings).rows.shape == (
        1,
    )
    with pytest.raises(unlearn.UserError, match="count 0: expected at least 1"):
        unlearn.choose_set(model, images, query, 0)


def test_a_set_is_told_by_ranks_and_by_name_where_the_table_does_not_show_it():
    assert "ranks 1, 4 (d), 2 (" in describe_set(["a", "d", "b"], [1, 4, 2], 3)
    assert "the first 3 again" in describe_set(["a", "c", "b"], [1, 3, 2], 2)
    assert ", and 2 more (" in describe_set(["x"] * 12, list(range(2, 14)), 20)
    assert describe_set(["a"], [1], 10) == ""


@pytest.mark.parametrize("rows, rises", [([0, 0], [1, 1]), ([0, 2], [1, 1]), ([0, 1], [1, np.nan])])
def test_a_file_that_names_images_it_has_not_is_refused(tmp_path, rows, rises):
    path, known = tmp_path / "influence.npz", [Row("a", "a.png", "", 2.0), Row("b", "b.png", "", 1)]
    np.savez(path, set_rows=np.array([1, 0]), set_rises=np.array([1.0, 2.0]))
    assert [chosen.rank for chosen in read_set(path, ["a", "b"], known)] == [2, 1]
    np.savez(path, set_rows=np.array(rows), set_rises=np.array(rises, float))
    with pytest.raises(unlearn.UserError, match="chosen together are not among its 2"):
        read_set(path, ["a", "b"], known)
