"""Models without the first images of several queries at once: which images each may see, what the
records say, and what `evaluate` makes of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_bad_input import files, refused
from test_evaluate_retrained import QUERIES, World, find, without_plots  # noqa: F401
from test_retrain import QUICK, bad, measures, place, world  # noqa: F401

from unlearn import UserError
from unlearn.attribution.influence import rank_images
from unlearn.commands import evaluate, retrain
from unlearn.retraining.plans import PlanSettings, plan_without
from unlearn.retraining.rankings import MethodRanking

IMAGES = SimpleNamespace(ids=[str(row) for row in range(9)])


def ranking(method, query, first):
    """Nine images, of which these are the first; the others follow in their order."""
    order = np.array([*first, *(row for row in range(9) if row not in first)])
    scores = np.empty(9)
    scores[order] = np.arange(9, 0, -1)
    return MethodRanking(Path(f"{method}-{query}"), method, query, scores, order, [])


def left_out(plans):
    return {plan.name: np.flatnonzero(~plan.members).tolist() for plan in plans}


def test_queries_are_bundled_in_their_order_and_the_first_images_of_all_are_left_out():
    rankings = [
        ranking(method, f"q/{number}", first)
        for method, firsts in {
            "a": [(0, 1), (1, 2), (5, 6), (7, 8), (3, 4)],
            "b": [(2, 0), (4, 6), (8, 3), (8, 3), (1, 0)],
        }.items()
        for number, first in enumerate(firsts)
    ]
    plans = plan_without(PlanSettings("without", top_k=(2, 1), together=2), IMAGES, rankings)
    assert left_out(plans) == {
        "without-a-together2-q-0-k1": [0, 1],
        "without-a-together2-q-2-k1": [5, 7],
        "without-a-together2-q-4-k1": [3],
        "without-b-together2-q-0-k1": [2, 4],
        "without-b-together2-q-2-k1": [8],
        "without-b-together2-q-4-k1": [1],
        "without-a-together2-q-0-k2": [0, 1, 2],
        "without-a-together2-q-2-k2": [5, 6, 7, 8],
        "without-a-together2-q-4-k2": [3, 4],
        "without-b-together2-q-0-k2": [0, 2, 4, 6],
        "without-b-together2-q-2-k2": [3, 8],
        "without-b-together2-q-4-k2": [0, 1],
    }
    assert {plan.kind for plan in plans} == {"together"}
    removed = {"method": "a", "queries": ["q/0", "q/1"], "together": 2, "k": 2}
    assert plans[6].removed == removed


def test_a_query_whose_first_images_its_scores_do_not_decide_leaves_the_bundles_as_they_are(caplog):
    rankings = [ranking("a", f"q{number}", (number,)) for number in range(4)]
    rankings[1].scores[:] = 1
    plans = plan_without(PlanSettings("without", top_k=(1,), together=2), IMAGES, rankings)
    names = ["without-a-together2-q0-k1", "without-a-together2-q2-k1"]
    assert left_out(plans) == dict(zip(names, ([0], [2, 3])))
    assert plans[0].removed["queries"] == ["q0"]
    assert "in 1 of 4 queries the images ranked 1 and 2" in caplog.text


@pytest.mark.parametrize(
    "k, firsts, said",
    [
        (3, [(0, 1, 2), (3, 4, 5), (6, 7, 8)], "q0-k3: images left out: 9: expected 1 to 8, fewer"),
        (1, [(0,), (1,), None], "q0-k1: would leave out the images of a query twice; give each K"),
    ],
)
def test_bundles_that_leave_no_image_or_name_a_query_twice_are_refused(k, firsts, said):
    rankings = [
        ranking("a", f"q{number}", first) if first else ranking("a", "q0", (0,))
        for number, first in enumerate(firsts)
    ]
    with pytest.raises(UserError, match=said):
        plan_without(PlanSettings("without", top_k=(k,), together=3), IMAGES, rankings)


@pytest.mark.parametrize(
    "kind, flags, said",
    [
        ("random", ["--top_k", "3", "--together", "2"], "--together 2: only of retrain without"),
        ("without", ["--together", "0"], "--together 0: expected "),
    ],
)
def test_a_number_of_queries_that_means_nothing_is_refused(
    world,  # noqa: F811
    tmp_path,
    capsys,
    kind,
    flags,
    said,
):
    flags += ["--top_k", "1", "--influence", str(world / "results/influence")]
    assert said in refused(capsys, retrain.main, bad(world, tmp_path, *flags, kind=kind))
    assert not files(tmp_path)


def test_one_model_serves_both_queries_and_evaluate_tells_it_apart_from_leave_k_out(
    world,  # noqa: F811
    place,  # noqa: F811
    tmp_path,
    capsys,
):
    tasks = ["--task_json", str(world / "tasks.json")]
    influence = ["--influence", str(tmp_path / "results/influence")]
    retrain.main(["full", *place, *QUICK, *tasks])
    without = ["without", *place, *QUICK, *tasks, *influence, "--no_pictures", "--top_k", "1"]
    retrain.main([*without, "--together", "2"])
    retrain.main([*without, "--num_queries", "1"])
    found = measures(tmp_path, "without-ours-together2-queries-00000-k1")
    queries = ["queries/00000", "queries/00001"]
    assert found["kind"] == "together" and list(found["losses"]) == queries
    assert found["removed"] == {"method": "ours", "queries": queries, "together": 2, "k": 1}
    folder = tmp_path / "results/retrained"
    flags = [*place, "--task_json", str(world / "tasks.json"), "--retrained", str(folder)]
    capsys.readouterr()
    evaluate.main([*flags, "--output", str(tmp_path / "out")])
    screen = capsys.readouterr().out
    assert "1 without chosen or random images, 1 without those of several queries" in screen
    said = "more images are gone than a query's own, and the rise is not comparable to that of"
    assert said in " ".join(screen.split())
    rises = [
        found["losses"][query] - measures(tmp_path, "full-seed0")["losses"][query]
        for query in queries
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in screen.splitlines()]
    together = next(row for row in rows if row[:5] == ["ours", "1", "2", "1", "2.0"])
    assert together[5:7] == ["2", "0"]
    assert together[7].startswith(f"{1e3 * np.mean(rises):z.2f} ± ")


@pytest.fixture
def effects(tmp_path):
    """Losses that are sums of effects; two bundles of two queries and one of one, whose first three
    images leave at once."""
    made = World(tmp_path)
    made.effect[:, :10] += 1e-2 * np.eye(5, 10) + 2e-2 * np.eye(5, 10, 5)  # each query's own two
    made.save_influence("ours", made.effect)
    made.save_full(0)
    made.save_random(4, 3)
    made.save_random(10, 2)
    for rows in BUNDLES:
        save_bundle(made, rows)
    return made


BUNDLES, K = ((0, 1), (2, 3), (4,)), 3


def first_images(made, row):
    return rank_images(made.effect[row])[:K]


def save_bundle(made, rows, **removed):
    kept = np.ones(made.effect.shape[1], bool)
    kept[np.concatenate([first_images(made, row) for row in rows])] = False
    queries = [QUERIES[row] for row in rows]
    removed = {"method": "ours", "queries": queries, "together": 2, "k": K, **removed}
    made.save_model(f"without-ours-together2-{rows[0]}-k{K}", "together", kept, removed=removed)
    return np.flatnonzero(~kept)


def test_own_control_and_random_rises_are_those_of_the_queries_by_hand(effects):
    evaluate.main(effects.flags())
    [row] = effects.table("leave_k_out_together")
    gone = [save_bundle(effects, rows) for rows in BUNDLES]
    rise = lambda query, images: effects.effect[query, images].sum()
    own, control, chance = np.full((3, 5), np.nan)
    random = [
        np.mean([effects.effect[:, np.flatnonzero(~kept)].sum(axis=1) for kept in group], axis=0)
        for group in (random_masks(effects, 4, 3), random_masks(effects, 10, 2))
    ]
    for query in range(5):
        mine = next(number for number, rows in enumerate(BUNDLES) if query in rows)
        own[query] = rise(query, gone[mine])
        others = [
            rise(query, images)
            for number, images in enumerate(gone)
            if number != mine and not set(images) & set(first_images(effects, query))
        ]
        control[query] = np.mean(others) if others else np.nan
        points = [0, random[0][query], random[1][query]]
        chance[query] = np.interp(len(gone[mine]), [0, 4, 10], points)
    assert (row["models"], row["queries"], row["together"]) == ("3", "5", "2")
    assert float(row["left_out"]) == pytest.approx(np.mean([len(images) for images in gone]))
    both = np.isfinite(control)
    assert int(row["control_queries"]) == both.sum() and 2 <= both.sum()
    expected = {
        "dL": own,
        "control_dL": control[both],
        "random_dL": chance,
        "minus_control": (own - control)[both],
        "minus_random": own - chance,
    }
    for name, values in expected.items():
        assert float(row[name]) == pytest.approx(values.mean()), name
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert float(row[f"{name}_error"]) == pytest.approx(error), name
    assert effects.table("leave_k_out")[-1]["method"] == "random"  # of single queries there is none


def random_masks(made, k, count):
    masks = []
    for number in range(count):
        kept = np.ones(made.effect.shape[1], bool)
        kept[np.random.default_rng([2, k, number]).permutation(len(kept))[:k]] = False
        masks.append(kept)
    return masks


def test_without_what_could_be_a_control_its_cells_are_empty(effects, capsys):
    for path in effects.retrained.glob("random-*"):
        path.unlink()
    for rows in BUNDLES[1:]:
        (effects.retrained / f"without-ours-together2-{rows[0]}-k{K}.json").unlink()
    evaluate.main(effects.flags())
    [row] = effects.table("leave_k_out_together")
    assert (row["queries"], row["control_queries"], row["random_queries"]) == ("2", "0", "0")
    assert row["control_dL"] == row["minus_control"] == row["minus_random_error"] == ""
    assert "nan" not in capsys.readouterr().out


def test_models_of_several_queries_at_once_change_no_other_table(effects):
    evaluate.main(effects.flags())
    names = ("leave_k_out", "leave_k_out_paired", "retention", "equivalent", "lds")
    with_them = [effects.table(name) for name in names]
    for path in effects.retrained.glob("without-*"):
        path.unlink()
    evaluate.main(effects.flags())
    assert [effects.table(name) for name in names] == with_them
    assert effects.table("leave_k_out_together") == []


@pytest.mark.parametrize(
    "removed, said",
    [
        ({"queries": "q"}, "queries: expected list, found 'q'"),
        ({"k": 1}, "removed: k is 1, of 2 queries, its mask leaves out [3-6] images"),
        ({"k": True}, "k: expected int, found True"),
    ],
)
def test_a_record_that_does_not_fit_its_images_is_refused(effects, removed, said):
    save_bundle(effects, BUNDLES[0], **removed)
    with pytest.raises(UserError, match=f"without-ours-together2-0-k3.json: {said}"):
        evaluate.main(effects.flags())


def test_models_of_other_first_images_than_the_scores_have_now_are_refused(effects):
    effects.save_influence("ours", -effects.effect)
    said = "together2-.-k3.json: was trained without other images than the first 3 of ours for"
    with pytest.raises(UserError, match=said):
        evaluate.main(effects.flags())
