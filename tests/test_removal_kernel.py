"""Attribution by removal: the score is what removal does, exactly; the features belong to the image
and serve every query."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import unlearn
from unlearn import UserError, noise
from unlearn.attribution import removal_studies, sketch
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.attribution.removal_groups import group_rises
from unlearn.attribution.removal_index import RemovalIndex, pack, unpack
from unlearn.attribution.removal_scores import (
    removal_rises,
    ridge_inverse,
    score_draws,
    score_removal,
)
from unlearn.attribution.removal_solutions import count_solved
from unlearn.attribution.removal_studies import RemovalStudy
from unlearn.attribution.sketch import Sketch
from unlearn.models.pipelines import select_parameters

SETTINGS = RemovalSettings(timesteps=(100, 600), sketch_size=64)
RANDOM = np.random.default_rng(0)


def blocks_of(features, size=4):
    return lambda: (features[start : start + size] for start in range(0, len(features), size))


def study_of(model, images, folder, settings=SETTINGS, **more):
    return RemovalStudy(model, {"laion": images}, folder, settings, **more)


def leverage(rows, query, damping):
    """phi_q^T (Phi^T Phi + lambda I)^-1 phi_q, summed over the query's rows."""
    gram = rows.T @ rows + damping * np.eye(rows.shape[1])
    return float(np.trace(query @ np.linalg.solve(gram, query.T)))


@pytest.mark.parametrize("size", [7, 50])  # fewer numbers than rows, and more
def test_a_score_is_the_rise_of_what_is_left_open_when_an_images_rows_are_removed(size):
    features, queries = RANDOM.normal(size=(10, 1, 2, size)), RANDOM.normal(size=(3, 1, 2, size))
    scores = score_removal(blocks_of(features), queries, ridge=0.3)
    damping = 0.3 * np.square(features).sum(axis=-1).mean()
    for number, query in enumerate(queries[:, 0]):
        before = leverage(features.reshape(-1, size), query, damping)
        for image in range(10):
            rows = np.delete(features, image, axis=0).reshape(-1, size)
            rise = leverage(rows, query, damping) - before
            assert scores[number, image] == pytest.approx(rise, rel=1e-9)


def test_an_image_seen_four_times_counts_as_four_images():
    features, query = RANDOM.normal(size=(6, 1, 2, 9)), RANDOM.normal(size=(1, 1, 2, 9))
    repeats = np.array([1, 4, 1, 1, 2, 1])
    rows = np.repeat(features[:, 0], repeats, axis=0).reshape(-1, 9)
    damping = 0.1 * np.square(features[:, 0] * np.sqrt(repeats)[:, None, None]).sum(-1).mean()
    owner = np.repeat(np.repeat(np.arange(6), repeats), 2)
    rise = leverage(rows[owner != 1], query[0, 0], damping) - leverage(rows, query[0, 0], damping)
    scores = score_removal(blocks_of(features), query, 0.1, repeats)
    assert scores[0, 1] == pytest.approx(rise, rel=1e-9)


def test_scores_do_not_depend_on_how_the_images_are_divided_into_blocks():
    features, queries = RANDOM.normal(size=(10, 2, 2, 30)), RANDOM.normal(size=(2, 2, 2, 30))
    whole, parts = (score_removal(blocks_of(features, size), queries) for size in (10, 3))
    np.testing.assert_allclose(whole, parts, rtol=1e-10)


def test_scores_of_several_timesteps_are_the_sum_of_each_ones():
    features, queries = RANDOM.normal(size=(10, 2, 2, 30)), RANDOM.normal(size=(2, 2, 2, 30))
    alone = [score_removal(blocks_of(features[:, [step]]), queries[:, [step]]) for step in range(2)]
    np.testing.assert_allclose(score_removal(blocks_of(features), queries), sum(alone))


def test_a_repeated_twin_takes_the_score_of_its_copy():
    """Two images with the same rows: neither is missed, for the other is there."""
    alone = RANDOM.normal(size=(8, 1, 2, 20))
    twins = np.concatenate([alone, alone[:1]])
    single, doubled = (score_removal(blocks_of(f), alone[:1], 1e-3) for f in (alone, twins))
    assert doubled[0, 0] < 0.01 * single[0, 0]


def test_memory_does_not_grow_with_the_number_of_images():
    alive, most = 0, 0

    def forget():
        nonlocal alive
        alive -= 1

    def blocks():
        nonlocal alive, most
        for number in range(50):
            block = np.random.default_rng(number).normal(size=(8, 1, 2, 10))
            weakref.finalize(block, forget)
            alive += 1
            most = max(most, alive)
            yield block

    assert score_removal(blocks, RANDOM.normal(size=(2, 1, 2, 10))).shape == (2, 400)
    assert most <= 4


def test_features_of_nothing_are_refused():
    with pytest.raises(UserError, match="features of all images are 0"):
        score_removal(blocks_of(np.zeros((4, 1, 2, 5))), np.ones((1, 1, 2, 5)))


def test_a_sketch_keeps_inner_products():
    weights = {"a": torch.zeros(300, 20), "b": torch.zeros(700)}
    first, second = (
        {name: torch.from_numpy(RANDOM.normal(size=value.shape)) for name, value in weights.items()}
        for _ in range(2)
    )
    second = {name: value + 0.5 * first[name] for name, value in second.items()}
    exact = sum(float((first[name] * second[name]).sum()) for name in weights)
    found = []
    for seed in range(200):
        sketch = Sketch(weights, 128, seed, "cpu")
        found.append(float(sketch.project(first) @ sketch.project(second)))
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - exact) < 4 * error < 0.1 * exact


def test_where_a_weight_goes_does_not_depend_on_the_other_weights():
    weights = {"a": torch.zeros(30), "b": torch.zeros(40)}
    both, alone = Sketch(weights, 16, 0, "cpu"), Sketch({"b": weights["b"]}, 16, 0, "cpu")
    ([(_, [of_both])], [(_, [of_one])]) = both.groups, alone.groups
    assert torch.equal(of_both[30:], of_one)


@pytest.mark.parametrize("together", [1, 33, 10_000])
def test_a_sketch_does_not_depend_on_how_many_weights_are_added_at_once(together, monkeypatch):
    """To the bit on a CPU; a weight larger than that has a group of its own."""
    values = {name: torch.randn(size) for name, size in (("a", (5, 6)), ("b", 3), ("c", 40))}
    expected = Sketch(values, 16, 0, "cpu", 2).project(values)
    monkeypatch.setattr(sketch, "TOGETHER", together)
    grouped = Sketch(values, 16, 0, "cpu", 2)
    assert [names for names, _ in grouped.groups] == {
        1: [["a"], ["b"], ["c"]],
        33: [["a", "b"], ["c"]],
        10_000: [["a", "b", "c"]],
    }[together]
    assert torch.equal(grouped.project(values), expected)


def test_features_are_the_sketched_derivative_of_the_predictions_signs(model, training_set):
    maker = FeatureMaker(model, training_set.latents.shape[2:], SETTINGS)
    features = maker.make(training_set, [5])[0]
    latent, embedding = (
        torch.from_numpy(np.array(array, np.float32))
        for array in (training_set.latents[0, 5], training_set.embeddings[5, 0])
    )
    for number, timestep in enumerate(SETTINGS.timesteps):
        step = torch.tensor([timestep])
        noisy = model.diffuse(latent[None], maker.normals[number][None], step)
        direction = {
            name: torch.from_numpy(RANDOM.normal(size=value.shape)).float()
            for name, value in select_parameters(model.denoiser, "all").items()
        }

        def predict(weights):
            return torch.func.functional_call(
                model.denoiser, weights, (noisy, step), {"encoder_hidden_states": embedding[None]}
            ).sample[0]

        present = {name: value.detach() for name, value in model.denoiser.named_parameters()}
        gradients = torch.func.vjp(predict, present)[1](maker.signs[number, 1])[0]
        expected = maker.sketch.project(gradients).numpy()
        np.testing.assert_allclose(features[number, 1], expected, rtol=1e-3, atol=1e-6)
        assert not torch.allclose(maker.sketch.project(direction), torch.from_numpy(expected))


def test_features_do_not_depend_on_the_images_made_beside_them(model, training_set):
    maker = FeatureMaker(model, training_set.latents.shape[2:], SETTINGS)
    among = maker.make(training_set, [2, 7, 20])
    assert np.array_equal(maker.make(training_set, [7])[0], among[1])


def test_noise_and_signs_are_common_to_all_images_and_runs(model, training_set):
    first, second = (
        FeatureMaker(model, training_set.latents.shape[2:], SETTINGS) for _ in range(2)
    )
    assert torch.equal(first.normals, second.normals) and torch.equal(first.signs, second.signs)
    alone = FeatureMaker(model, training_set.latents.shape[2:], replace(SETTINGS, timesteps=(600,)))
    assert torch.equal(alone.normals[0], first.normals[1])
    assert torch.equal(alone.signs[0], first.signs[1])


def test_a_timestep_that_the_model_has_not_is_refused(model, training_set):
    with pytest.raises(UserError, match="timesteps 1000: expected 0 to 999"):
        FeatureMaker(model, training_set.latents.shape[2:], replace(SETTINGS, timesteps=(1000,)))


def test_stored_features_lose_the_last_digits_alone():
    features = RANDOM.normal(size=(5, 2, 2, 64)).astype(np.float32)
    features *= 10.0 ** RANDOM.uniform(-20, 20, size=(5, 2, 2, 1)).astype(np.float32)
    largest = np.abs(features).max(axis=-1, keepdims=True)
    assert (np.abs(unpack(pack(features)) - features) <= 2.0**-11 * largest).all()


def test_an_index_serves_queries_as_features_in_memory_do(model, training_set, tmp_path):
    images, queries = training_set.first(40), [training_set.take([row]) for row in (3, 50)]
    study = study_of(model, images, tmp_path)
    study.build()
    scores = study.score(queries)
    maker = FeatureMaker(model, images.latents.shape[2:], SETTINGS)
    features, asked = (maker.make(training_set, rows) for rows in (range(40), (3, 50)))
    expected = score_removal(blocks_of(features), asked)
    np.testing.assert_allclose(scores, expected, rtol=0.05, atol=1e-3 * expected.max())
    assert scores[0].argmax() == 3  # a training image is what fixes its own prediction


def test_what_serves_every_query_is_made_once_and_again_where_it_is_damaged(
    model, training_set, tmp_path, monkeypatch
):
    images, query = training_set.first(12), [training_set.take([50])]
    study = study_of(model, images, tmp_path)
    study.build()
    expected = study.score(query)
    [first, second] = sorted((tmp_path / "solved").glob("*.safetensors"))
    size = first.stat().st_size + second.stat().st_size
    assert 0 <= size - count_solved(24, SETTINGS) < 2000  # what people are told beforehand
    whole = first.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(removal_studies, "solve", lambda *given: pytest.fail("was made again"))
        assert np.array_equal(study_of(model, images, tmp_path).score(query), expected)
    first.write_bytes(whole[:-8] + bytes(8))
    assert np.array_equal(study_of(model, images, tmp_path).score(query), expected)
    assert first.read_bytes() == whole
    other = study_of(model, images, tmp_path, ridge=3.0)
    assert not np.allclose(other.score(query), expected)


@pytest.mark.parametrize("count", [12, 33])  # fewer rows than numbers, and more
def test_a_querys_bits_do_not_depend_on_the_queries_beside_it(model, training_set, tmp_path, count):
    study = study_of(model, training_set.first(count), tmp_path)
    study.build()
    queries = [training_set.take([row]) for row in (45, 50, 55)]
    together = study.score(queries)
    for number, query in enumerate(queries):
        assert np.array_equal(study.score([query])[0], together[number])


def test_repeats_of_other_images_are_refused(model, training_set, tmp_path):
    images = training_set.first(8)
    with pytest.raises(UserError, match="repeats: expected 8 numbers, one an image, found 7"):
        study_of(model, images, tmp_path, repeats=(1,) * 7)
    study_of(model, images, tmp_path).build()
    alike, untold = (
        study_of(model, images, tmp_path, repeats=repeats).score([training_set.take([9])])
        for repeats in ((1,) * 8, ())
    )
    np.testing.assert_allclose(alike, untold)


def test_a_killed_build_goes_on_and_a_finished_one_is_kept(model, training_set, tmp_path):
    images = training_set.first(40)
    for name in ("whole", "parts"):
        study_of(model, images, tmp_path / name).build()
    first, second = sorted((tmp_path / "parts").glob("laion/shards-*/*.npy"))
    (tmp_path / "parts/laion/features.json").unlink()
    second.unlink()
    kept = first.stat().st_mtime_ns
    study_of(model, images, tmp_path / "parts").build()
    assert first.stat().st_mtime_ns == kept
    read = [path.read_text() for path in sorted(tmp_path.glob("*/laion/features.txt"))]
    assert read[0] == read[1]


def test_features_of_other_settings_are_refused_by_the_name_of_the_field(
    model, training_set, tmp_path
):
    images = training_set.first(8)
    study_of(model, images, tmp_path).build()
    for others, said in (
        (replace(SETTINGS, probes=3), "probes is 2, expected 3"),
        (replace(SETTINGS, timesteps=(600,)), r"timesteps is \[100, 600\], expected \[600\]"),
        (replace(SETTINGS, weight_selection="attn"), "weight_selection is 'all', expected 'attn'"),
    ):
        with pytest.raises(UserError, match=said):
            study_of(model, images, tmp_path, others).build()
        with pytest.raises(UserError, match=said):
            RemovalIndex(model, images, others, tmp_path / "laion")


def test_a_damaged_shard_is_told_and_made_anew(model, training_set, tmp_path):
    images = training_set.first(8)
    study_of(model, images, tmp_path).build()
    shard = next(tmp_path.glob("laion/shards-*/*.npy"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    study = study_of(model, images, tmp_path)
    with pytest.raises(UserError, match="damaged"):
        study.score([training_set.take([9])])
    study.build()
    assert np.isfinite(study.score([training_set.take([9])])).all()


def test_the_inverse_is_the_same_by_rows_and_by_columns():
    rows, asked = RANDOM.normal(size=(15, 2, 12)), RANDOM.normal(size=(5, 12))
    wide, wide_asked = (
        np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, 40)]) for array in (rows, asked)
    )
    by_columns = ridge_inverse(lambda: iter([rows]), 12, 0.1)[0](asked)
    by_rows = ridge_inverse(lambda: iter([wide]), 52, 0.1)[0](wide_asked)
    np.testing.assert_allclose(by_rows[:, :12], by_columns, rtol=1e-9)


def test_no_removal_makes_a_query_more_certain():
    rows, asked = RANDOM.normal(size=(15, 2, 12)), RANDOM.normal(size=(1, 5, 12))
    assert (removal_rises(rows, asked, ridge_inverse(lambda: iter([rows]), 12, 0.1)[0]) > 0).all()


def test_fewer_images_than_probes_are_refused(model, training_set, tmp_path):
    with pytest.raises(UserError, match="--probes 5: more than the 4 training images; give 4 or"):
        study_of(model, training_set.first(4), tmp_path, replace(SETTINGS, probes=5))


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan"), float("inf")])
def test_a_ridge_that_is_no_positive_number_is_refused(ridge, model, training_set, tmp_path):
    with pytest.raises(UserError, match="--ridge .*: expected a positive number"):
        study_of(model, training_set.first(4), tmp_path, ridge=ridge)


@pytest.mark.parametrize("size", [7, 50])  # fewer numbers than rows, and more
def test_a_ridge_that_rounding_swallows_is_refused(size):
    features = RANDOM.normal(size=(10, 1, 2, size))
    features[5], features[..., -1] = features[4], features[..., 0]  # dependent rows and columns
    with pytest.raises(UserError, match="ridge 1e-17: too small .* give a larger one, such as --r"):
        score_removal(blocks_of(features), features[:1], 1e-17)


def test_exemplars_and_training_images_are_ranked_together_as_one_set(
    model, training_set, tmp_path
):
    parts = {"exemplar": training_set.take([7, 8, 9]), "laion": training_set.first(5)}
    study, whole = (
        RemovalStudy(model, sets, tmp_path / name, SETTINGS)
        for name, sets in (
            ("parts", parts),
            ("whole", {"laion": training_set.take([7, 8, 9, 0, 1, 2, 3, 4])}),
        )
    )
    scores = []
    for each in (study, whole):
        each.build()
        scores.append(each.score([training_set.take([20])]))
    np.testing.assert_allclose(*scores, rtol=1e-9)


def test_scores_of_a_query_do_not_depend_on_the_queries_beside_it(model, training_set, tmp_path):
    study = study_of(model, training_set.first(8), tmp_path)
    study.build()
    queries = [training_set.take([row]) for row in (20, 30, 40)]
    together, alone = study.score(queries), study.score(queries[1:2])
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-9)


def test_the_loss_beside_the_features_is_the_models_own(model, training_set, tmp_path):
    study = study_of(model, training_set.first(3), tmp_path)
    study.build()
    losses = study.maker.explain(training_set, range(3))
    step = torch.tensor([650])
    latent, embedding = (
        torch.from_numpy(np.array(array, np.float32))
        for array in (training_set.latents[0, 1], training_set.embeddings[1, 0])
    )
    drawn = noise.image_noise(0, "removal", "noise", [(0, 0, 650, 0)], latent.shape)
    normals = torch.from_numpy(drawn)
    texts = {"embeddings": embedding[None]}
    error = model.predict(model.diffuse(latent[None], normals, step), step, texts)
    error = error - model.target(latent[None], normals, step)
    assert losses[1] == pytest.approx(float(error.square().mean()), rel=1e-5)
    np.testing.assert_array_equal(study.losses["laion"], losses)


def test_a_timestep_that_is_named_again_is_drawn_again(model, training_set):
    settings = replace(SETTINGS, timesteps=(600, 100, 600))
    maker, alone = (
        FeatureMaker(model, training_set.latents.shape[2:], each)
        for each in (settings, replace(SETTINGS, timesteps=(600,)))
    )
    assert torch.equal(maker.normals[0], alone.normals[0])
    assert torch.equal(maker.signs[0], alone.signs[0])
    assert not torch.equal(maker.normals[0], maker.normals[2])
    assert not torch.equal(maker.signs[0, 0], maker.signs[2, 0])


def test_a_scores_unit_makes_scores_of_scaled_features_comparable():
    features, query = RANDOM.normal(size=(9, 1, 2, 30)), RANDOM.normal(size=(1, 1, 2, 30))
    scores, units = score_draws(blocks_of(features), query)
    scaled, scaled_units = score_draws(blocks_of(1e-3 * features), 1e-5 * query)
    np.testing.assert_allclose(scores[0] / units[0], scaled[0] / scaled_units[0])
    expected = np.square(query).sum() / np.square(features).sum(axis=-1).mean()
    assert units[0, 0] == pytest.approx(expected)


@pytest.mark.parametrize("size", [7, 50])  # of rows of the groups: fewer, and more
def test_a_groups_score_is_the_rise_when_all_its_rows_are_dropped(size):
    features, queries = RANDOM.normal(size=(10, 1, 2, size)), RANDOM.normal(size=(3, 1, 2, size))
    groups = {"one": [4], "some": [0, 3, 9], "most": [0, 1, 2, 3, 4, 5, 7, 8, 9]}
    found = []

    def tell(timestep, rows, inverse):
        take = lambda own: iter([features[own][:2, timestep], features[own][2:, timestep]])
        found.append(group_rises(groups, take, rows, inverse))

    scores, _ = score_draws(blocks_of(features), queries, 0.3, tell=tell)
    damping = 0.3 * np.square(features).sum(axis=-1).mean()
    for number, query in enumerate(queries[:, 0]):
        before = leverage(features.reshape(-1, size), query, damping)
        for group, images in enumerate(groups.values()):
            rows = np.delete(features, images, axis=0).reshape(-1, size)
            rise = leverage(rows, query, damping) - before
            assert found[0][number, group] == pytest.approx(rise, rel=1e-9)
    np.testing.assert_allclose(found[0][:, 0], scores[0, :, 4], rtol=1e-9)


def test_twins_matter_together_where_neither_does_alone():
    alone = RANDOM.normal(size=(8, 1, 2, 20))
    twins, found = np.concatenate([alone, alone[:1]]), []

    def tell(timestep, rows, inverse):
        take = lambda own: iter([twins[own][:, timestep]])
        found.append(group_rises({"twins": [0, 8]}, take, rows, inverse))

    scores, _ = score_draws(blocks_of(twins), alone[:1], 1e-3, tell=tell)
    assert found[0][0, 0] > 20 * scores[0, 0, [0, 8]].sum()


def test_groups_of_several_sets_are_read_from_the_shards_that_hold_them(
    model, training_set, tmp_path
):
    """Sets, shards, repeats and timesteps: the same as with features in memory, rows dropped."""
    sets = {"exemplar": training_set.take([50, 51]), "laion": training_set.first(35)}
    repeats = tuple(1 + number % 3 for number in range(37))
    study = RemovalStudy(model, sets, tmp_path, SETTINGS, repeats=repeats)
    study.build()
    query, groups = training_set.take([55]), {"b": [36, 1, 4], "a": [0, 2, 33, 34, 35]}
    scored = study.score_all([query], groups)
    assert scored.draws.shape == (2, 1, 37) and scored.groups.shape == (2, 1, 2)
    features = np.concatenate(list(study.blocks())).astype(np.float64)
    features *= np.sqrt(repeats)[:, None, None, None]
    asked = study.maker.make(query, [0])[0].astype(np.float64)
    for timestep in range(2):
        damping = 0.1 * np.square(features[:, timestep]).sum(axis=-1).mean()
        before = leverage(features[:, timestep].reshape(-1, 64), asked[timestep], damping)
        for number, images in enumerate(groups.values()):
            rows = np.delete(features[:, timestep], images, axis=0).reshape(-1, 64)
            rise = leverage(rows, asked[timestep], damping) - before
            assert scored.groups[timestep, 0, number] == pytest.approx(rise, rel=1e-8)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([], "group x: expected one image or more, each once"),
        ([1, 1], "group x: expected one image or more, each once"),
        ([2, 6], "group x: image 6: expected 0 to 5"),
        ([-1], "group x: image -1: expected 0 to 5"),
        ([5, 4, 3, 2, 1, 0], "group x: holds all 6 images: without them nothing would be left"),
    ],
)
def test_a_group_that_cannot_be_removed_is_refused(rows, said, model, training_set, tmp_path):
    with pytest.raises(UserError, match=said):
        unlearn.removal_group_scores(
            model, training_set.first(6), training_set.take([9]), {"x": rows}, settings=SETTINGS
        )
