"""Baselines: closed forms in float64, independence of batches, resuming, the command end to end."""

import copy
import csv
import json
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image
from test_bad_input import encode_images

from unlearn import UserError, noise
from unlearn.attribution.curvature import DiagonalFisher
from unlearn.attribution.draws import QueryDraws
from unlearn.baselines import gradients, mucs, patches
from unlearn.baselines.gradient_methods import BLOCKS, Sketch, flatten
from unlearn.baselines.gradients import (
    EXPECTED,
    expected_latents,
    kernel_scores,
    mean_gradient,
    reduce_images,
    view_samples,
)
from unlearn.baselines.interface import Method, Run
from unlearn.baselines.methods import METHODS
from unlearn.baselines.saving import list_results, method_identity
from unlearn.baselines.similarity import cosine_scores, mean_features, normalise, text_blocks
from unlearn.baselines.similarity_methods import Cosines
from unlearn.commands import baselines
from unlearn.datasets import queries
from unlearn.datasets.conditioning import repeat_texts
from unlearn.datasets.encoders import encode_images as encode_real_images
from unlearn.datasets.encoders import encode_prompts
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import TrainingSet
from unlearn.evaluation.rankings import read_influence
from unlearn.models.families.betas import TARGETS
from unlearn.models.generation import generate_latents, initial_noise
from unlearn.models.pipelines import load_model, select_parameters, tracked
from unlearn.storage.artifacts import write_tensors
from unlearn.storage.reading import read_tensors
from unlearn.storage.records import record_path, write_record

ROOT = Path(__file__).parent.parent
GRID, KV = [200, 700], "cross-attn-kv"
FIRST, SECOND = json.loads((PARITY / "fixture/tasks.json").read_text())
TASKS = [
    {"synth_image_path": FIRST["synth_image_path"], "prompt": "a photo of a blob"},
    {"synth_image_path": SECOND["synth_image_path"], "prompt": "another photo", "seed": 7},
]
FOLDERS = "tiny/gpt/blob/samples/00000.png", "tiny/gpt/blob/samples/00001.png"


def make_method(name, **given):
    """A method with the flags of a short run, but for those given."""
    flags = {
        "noise_seed": 0,
        "seed": 0,
        "weight_selection": KV,
        "projection_size": 64,
        "trak_lambda": 0.1,
        "views": "max",
        "precision": "fp32",
        "time_samples": 2,
        "num_inference_steps": 3,
        "unlearn_batch_size": 2,
        "unlearn_grad_accum_steps": 2,
        "damping": 0.1,
        "patch_size": 2,
        "patch_timestep": 300,
        "mucs_rate": 1e-3,
        "mucs_steps": 3,
        "mucs_batch": 2,
        "mucs_draws": 4,
    }
    return baselines.make_method(METHODS[name], SimpleNamespace(**{**flags, **given}))


@pytest.fixture
def make_run(model, training_set, tmp_path):
    """A Run over the first six images; the queries are some of them, as they are."""

    def make(images=(0, 1), fisher=None, candidates=training_set.first(6)):
        queries = [candidates.take([image]) for image in images]
        queries = [
            replace(query, latents=query.latents[:1], source=str(image))
            for query, image in zip(queries, images)
        ]
        tasks = [
            SimpleNamespace(exemplar_paths=(), seed=None, result_name=str(image))
            for image in images
        ]
        return Run(
            model,
            candidates,
            tasks,
            queries,
            "",
            512,
            GRID,
            tmp_path / "baselines",
            fisher,
        )

    return make


@pytest.fixture(scope="module")
def exact(model):
    """The model in float64."""
    exact = copy.copy(model)
    exact.pipeline = SimpleNamespace(
        unet=copy.deepcopy(model.denoiser).double(), scheduler=model.pipeline.scheduler
    )
    exact.levels = model.levels.double()
    return exact


def exact_gradient(exact, function, latent, embedding, normals, timesteps, is_normalised=False):
    """Gradient of K and V, [weights] float64: the mean over samples, one by one, written out, each
    of length 1 where they are normalised."""
    parameters, total = select_parameters(exact.denoiser, KV), 0
    latent, embedding, normals = (
        torch.tensor(np.array(array), dtype=torch.float64) for array in (latent, embedding, normals)
    )
    for normal, timestep in zip(normals, timesteps):
        alpha_bar = exact.alpha_bars[timestep]
        noisy = alpha_bar.sqrt() * latent + (1 - alpha_bar).sqrt() * normal
        with tracked(parameters):
            output = exact.denoiser(
                noisy[None], torch.tensor([timestep]), encoder_hidden_states=embedding[None]
            ).sample[0]
            value = {
                "norm": output.square().sum(),
                "mean": output.mean(),
                "loss": (output - normal).square().mean(),
            }[function]
            own = flatten(dict(enumerate(torch.autograd.grad(value, list(parameters.values())))))
            total = total + (own / own.norm() if is_normalised else own)
    return total / len(timesteps)


def exact_rows(exact, function, images, is_normalised=False):
    """Gradients of every view of every image under its own noise, [N, 2, weights] float64."""
    rows = []
    for image in range(len(images)):
        for view in range(2):
            slots = [(view, 0, timestep, 0) for timestep in GRID]
            normals = noise.image_noise(
                0, images.name, images.ids[image], slots, images.latents.shape[2:]
            )
            rows.append(
                exact_gradient(
                    exact,
                    function,
                    images.latents[view, image],
                    images.embeddings[image, 0],
                    normals,
                    GRID,
                    is_normalised,
                )
            )
    return torch.stack(rows).reshape(len(images), 2, -1)


def reduced(model, images, batch_size=200, reduce=flatten, order=None):
    parameters = select_parameters(model.denoiser, KV)
    with tracked(parameters):
        return reduce_images(
            model,
            parameters,
            "loss",
            images,
            range(len(images)) if order is None else order,
            GRID,
            0,
            batch_size,
            reduce,
            SimpleNamespace(map=map),
        )


def test_a_projection_keeps_inner_products_on_average_and_scatters_as_its_theory_says():
    generator, size = np.random.default_rng(0), 32
    values = torch.from_numpy(generator.normal(size=(2, 300)))
    values[1] += 0.5 * values[0]
    values[:, 0] += 20  # a heavy weight
    expected = float(values[0] @ values[1])
    bound = 2 * float(values[0].square().sum() * values[1].square().sum()) / size
    products = []
    for seed in range(600):
        first, second = (
            Sketch({"a": value[:100], "b": value[100:]}, size, seed, "cpu", BLOCKS).project(
                {"a": value[:100], "b": value[100:]}
            )
            for value in values
        )
        products.append(float(first @ second))
    assert abs(np.mean(products) - expected) < 4 * (bound / 600) ** 0.5
    assert 0 < np.var(products) < 1.2 * bound


def test_a_projection_depends_on_seed_and_parameter_name_alone():
    values = {"a": torch.arange(50.0), "b": torch.ones(7)}
    both = Sketch(values, 16, 0, "cpu", BLOCKS)
    alone = [
        Sketch({name: value}, 16, 0, "cpu", BLOCKS).project({name: value})
        for name, value in values.items()
    ]
    torch.testing.assert_close(both.project(values), alone[0] + alone[1])
    turned = dict(reversed(values.items()))
    torch.testing.assert_close(
        Sketch(turned, 16, 0, "cpu", BLOCKS).project(turned), both.project(values)
    )
    assert not torch.equal(
        Sketch(values, 16, 1, "cpu", BLOCKS).project(values), both.project(values)
    )
    known = [16, 18, 0, 17, 16, 17], [6, 14, 15, 14, 7, 15]
    assert [
        both.draw_targets("a", 0, 6, 0).tolist(),
        Sketch(values, 8, 0, "cpu", BLOCKS).draw_targets("a", 3, 6, 1).tolist(),
    ] == list(known)


@pytest.mark.parametrize("size", [1, 3, 5, 64])
def test_every_weight_goes_to_each_block_of_a_projection_of_any_size(size):
    sketch = Sketch({"a": torch.zeros(500)}, size, 0, "cpu", BLOCKS)
    [(_, blocks)] = sketch.groups
    assert len(blocks) == min(4, size)
    entries = [set((targets % size).tolist()) for targets in blocks]
    assert sorted(entry for block in entries for entry in block) == list(range(size))


@pytest.mark.parametrize("size, damping", [(4, 0.01), (40, 0.5)])
def test_kernel_scores_equal_the_formula_in_float64(size, damping, monkeypatch):
    monkeypatch.setattr(gradients, "BLOCK_ROWS", 3)
    generator = np.random.default_rng(0)
    features, queries = (
        generator.normal(size=shape).astype(np.float32) for shape in ((5, 2, size), (3, size))
    )
    rows = features.reshape(10, size).astype(np.float64)
    ridge = damping * np.mean(np.sum(rows**2, axis=0)) * np.eye(size)
    expected = queries @ np.linalg.inv(rows.T @ rows + ridge) @ rows.T
    np.testing.assert_allclose(
        kernel_scores(features, queries, damping), expected.reshape(3, 5, 2), rtol=1e-9, atol=1e-12
    )


def test_kernel_scores_do_not_depend_on_the_scale_of_the_function():
    features = np.random.default_rng(0).normal(size=(5, 2, 6))
    scaled = 1e-4 * features
    np.testing.assert_allclose(
        kernel_scores(scaled, scaled[:, 0], 0.1),
        kernel_scores(features, features[:, 0], 0.1),
        rtol=1e-9,
    )


@pytest.mark.parametrize("function", ["loss", "norm"])
def test_gradients_of_images_equal_those_written_out_in_float64(
    function, model, exact, training_set
):
    images, parameters = training_set.first(2), select_parameters(model.denoiser, KV)
    with tracked(parameters):
        found = reduce_images(
            model,
            parameters,
            function,
            images,
            range(2),
            GRID,
            0,
            3,
            flatten,
            SimpleNamespace(map=map),
        )
    expected = exact_rows(exact, function, images).numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_gradients_do_not_depend_on_batch_order_or_subset(model, training_set):
    images = training_set.first(4)
    together = reduced(model, images)
    np.testing.assert_array_equal(reduced(model, images, order=[3, 1]), together[[3, 1]])
    for other, rows in (
        (reduced(model, images, batch_size=1), range(4)),
        (reduced(model, images.take([2, 0])), [2, 0]),
    ):
        differences = np.linalg.norm(other - together[rows], axis=2) / np.linalg.norm(
            together[rows], axis=2
        )
        assert differences.max() < 3e-6  # of float32 through some sixty layers; measured 1.2e-6


def test_several_captions_are_averaged(model, training_set):
    images = training_set.first(2)
    pair = replace(images.first(1), embeddings=images.embeddings[:, 0][None])
    parameters = select_parameters(model.denoiser, KV)
    normals = np.random.default_rng(0).normal(size=(4, 4, 16, 16)).astype(np.float32)
    with tracked(parameters):
        both = flatten(
            mean_gradient(
                model, parameters, "loss", view_samples(pair, 0, 0, GRID, normals, "cpu"), 9
            )
        )
        latents, each = torch.from_numpy(np.array(pair.latents[0, [0, 0]])).float(), []
        for caption in 0, 1:
            embeddings = torch.from_numpy(np.array(pair.embeddings[0, [caption] * 2])).float()
            samples = (
                latents,
                torch.from_numpy(normals[2 * caption : 2 * caption + 2]),
                torch.tensor(GRID),
                {"embeddings": embeddings},
            )
            each.append(flatten(mean_gradient(model, parameters, "loss", samples, 9)))
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-7)


def test_influence_equals_its_formula_in_float64(model, exact, make_run):
    diagonal = {
        name: 0.5 + torch.rand(value.shape, generator=torch.Generator().manual_seed(0))
        for name, value in select_parameters(model.denoiser, KV).items()
    }
    run = make_run(images=(2,), fisher=DiagonalFisher(diagonal, 0.1))
    images = run.training_set
    draws = QueryDraws(0, run.queries[0].name, run.queries[0].ids[0], len(model.alpha_bars))
    query = 0
    for number in range(2):
        normals, timesteps = draws.draw(2 * number, 2, images.latents.shape[2:], "cpu")
        gradient = exact_gradient(
            exact,
            "loss",
            images.latents[0, 2],
            images.embeddings[2, 0],
            normals.numpy(),
            timesteps.tolist(),
        )
        query = query + gradient / 2
    inverse = flatten(
        {
            name: 1 / (value.double() + 0.1 * value.double().mean())
            for name, value in diagonal.items()
        }
    )
    expected = (exact_rows(exact, "loss", images) @ (inverse * query)).max(dim=1).values.numpy()
    np.testing.assert_allclose(
        make_method("influence").scores(run)[0], expected, atol=1e-4 * np.abs(expected).max()
    )


def exact_errors(exact, images):
    """Roots of the losses of every view, relative to all at their timestep, averaged: [N, 2]."""
    roots = []
    for image in range(len(images)):
        for view in range(2):
            slots = [(view, 0, timestep, 0) for timestep in GRID]
            normals = noise.image_noise(
                0, images.name, images.ids[image], slots, images.latents.shape[2:]
            )
            latent, embedding, normals = (
                torch.tensor(np.array(array), dtype=torch.float64)
                for array in (images.latents[view, image], images.embeddings[image, 0], normals)
            )
            for normal, timestep in zip(normals, GRID):
                alpha_bar = exact.alpha_bars[timestep]
                noisy = alpha_bar.sqrt() * latent + (1 - alpha_bar).sqrt() * normal
                with torch.no_grad():
                    output = exact.denoiser(
                        noisy[None], torch.tensor([timestep]), encoder_hidden_states=embedding[None]
                    ).sample[0]
                roots.append(float((output - normal).square().mean().sqrt()))
    roots = np.reshape(roots, (len(images), 2, len(GRID)))
    return (roots / roots.mean(axis=(0, 1))).mean(axis=2)


@pytest.mark.parametrize(
    "method, function, is_normalised",
    [
        ("trak", "loss", False),
        ("dtrak", "norm", False),
        ("dtrak-normalised", "norm", True),
        ("das", "mean", True),
    ],
)
def test_trak_scores_equal_their_formula_in_float64(
    method, function, is_normalised, model, exact, make_run
):
    run, parameters = make_run(images=(1, 4)), select_parameters(model.denoiser, KV)
    sketch = Sketch(parameters, 64, 0, "cpu", BLOCKS)
    shapes = {name: value.shape for name, value in parameters.items()}
    sizes = [shape.numel() for shape in shapes.values()]
    split = lambda row: {
        name: part.reshape(shapes[name]) for name, part in zip(parameters, row.split(sizes))
    }
    rows = exact_rows(exact, function, run.training_set, is_normalised)
    features = torch.stack([sketch.project(split(row)) for row in rows.flatten(0, 1)]).numpy()
    kernel = features.T @ features
    scores = (
        features[[2, 8]]
        @ np.linalg.inv(kernel + 0.1 * np.mean(np.diag(kernel)) * np.eye(64))
        @ features.T
    ).reshape(2, 6, 2)
    if method == "das":
        scores = (scores * exact_errors(exact, run.training_set)) ** 2
    for views in "max", "mean":
        found = make_method(method, views=views).scores(run)
        np.testing.assert_allclose(
            found, getattr(scores, views)(axis=2), atol=1e-3 * max(1, np.abs(scores).max())
        )


def test_patches_are_shared_out_by_the_best_denoiser_of_the_training_images(
    model, make_run, monkeypatch
):
    """Written out patch by patch: x_t of the query, softmax over every patch of every view."""
    run, shape = make_run(images=(1,)), make_run().training_set.latents.shape[2:]
    images, [query] = run.training_set, run.queries
    alpha_bar = float(model.alpha_bars[300])
    normals = noise.image_noise(0, query.name, query.ids[0], [(0, 0, 300, 0)], shape)[0]
    noisy = alpha_bar**0.5 * query.latents[0, 0] + (1 - alpha_bar) ** 0.5 * normals
    places = [(y, x) for y in range(shape[1] - 1) for x in range(shape[2] - 1)]
    cut = lambda latent: np.array([latent[:, y : y + 2, x : x + 2] for y, x in places], np.float64)
    all_patches = np.array([[cut(latent) for latent in view] for view in images.latents])
    expected = np.zeros(len(images))
    for patch in cut(noisy):
        distances = np.square(patch - alpha_bar**0.5 * all_patches).sum(axis=(3, 4, 5))
        weights = np.exp(-(distances - distances.min()) / (2 * (1 - alpha_bar)))
        expected += weights.sum(axis=(0, 2)) / weights.sum()
    for most in patches.MOST_DISTANCES, 1:
        monkeypatch.setattr(patches, "MOST_DISTANCES", most)
        [found] = make_method("nda").scores(run)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.sum() == pytest.approx(len(places))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"patch_size": 0}, "--patch_size 0: expected 1 to"),
        ({"patch_size": 999}, "--patch_size 999: expected 1 to"),
        ({"patch_timestep": 1000}, "--patch_timestep 1000: expected 0 to 999"),
    ],
)
def test_patches_that_cannot_be_are_refused(given, said, make_run):
    with pytest.raises(UserError, match=said):
        make_method("nda", **given).scores(make_run())


@pytest.fixture(scope="module")
def emoji():
    """A trained model, four images that it was trained on, and its Fisher."""
    root = ROOT / "data/emoji"
    model, numbers = load_model(str(root / "pipeline"), "cpu"), [50, 61, 62, 800]
    paths = sorted((root / "laion_subset/images").iterdir())
    captions = (root / "laion_subset/captions.txt").read_text().splitlines()
    pictures = [paths[number] for number in numbers]
    latents = np.stack(
        [encode_real_images(model, pictures, 32, mirrored).numpy() for mirrored in (False, True)]
    )
    texts = encode_prompts(model, [captions[number] for number in numbers])
    embeddings = texts["embeddings"].numpy()[:, None]
    images = TrainingSet(
        "emoji",
        [f"laion/{number:06d}" for number in numbers],
        captions[:4],
        paths[:4],
        latents,
        embeddings,
        "",
    )
    return model, images, DiagonalFisher(read_tensors(root / "sd_fisher.safetensors"), 0.1)


@pytest.mark.parametrize("method", ["influence", "trak", "dtrak", "dtrak-normalised", "das", "nda"])
def test_a_training_image_that_is_the_query_comes_first(method, emoji, make_run):
    model, images, fisher = emoji
    run = replace(make_run((0, 2, 3), fisher, images), model=model, grid=[100, 300, 500, 700])
    scores = make_method(method, unlearn_batch_size=16, weight_selection="cross-attn").scores(run)
    assert [int(np.argmax(row)) for row in scores] == [0, 2, 3]
    assert all(row[query] > 2 * np.sort(row)[-2] for row, query in zip(scores, (0, 2, 3)))


@pytest.mark.parametrize("prediction_type", EXPECTED)
def test_what_a_perfect_prediction_expects_is_the_clean_latent(prediction_type):
    generator = torch.Generator().manual_seed(0)
    (clean, normal), alpha_bar = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(0.3)
    noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * normal
    torch.testing.assert_close(
        EXPECTED[prediction_type](
            alpha_bar, noisy, TARGETS[prediction_type](alpha_bar, clean, normal)
        ),
        clean,
    )


def test_the_expected_latents_are_those_of_the_trajectory_that_makes_the_picture(
    model, training_set
):
    conditioning = training_set.query_tensors("cpu")[1]
    noisy = start = torch.from_numpy(initial_noise("abc", [7], training_set.latents.shape[2:]))[0]
    expected, timesteps = expected_latents(model, conditioning, start, 4)
    assert expected.shape == (4, *start.shape) and (timesteps.diff() < 0).all()
    assert not model.pipeline.scheduler.config.set_alpha_to_one
    alpha_bars = [*model.alpha_bars[timesteps], model.alpha_bars[0]]
    for clean, alpha_bar, following in zip(expected, alpha_bars, alpha_bars[1:]):
        normal = (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
        noisy = following.sqrt() * clean + (1 - following).sqrt() * normal
    torch.testing.assert_close(
        noisy[None], generate_latents(model, conditioning, start[None], 4), rtol=1e-4, atol=1e-4
    )


def test_a_journey_starts_where_the_seed_of_its_query_has_it(model, make_run):
    run, parameters = make_run(images=(0, 0)), select_parameters(model.denoiser, KV)
    run.tasks[1].seed = 7
    method = make_method("journeytrak", num_inference_steps=2)
    with tracked(parameters):
        found = [flatten(method.gradient_of(run, parameters, number)) for number in (0, 1)]
        query = run.queries[1]
        start = torch.from_numpy(initial_noise(query.name, [7], query.latents.shape[2:])[0])
        conditioning = query.query_tensors("cpu")[1]
        latents, timesteps = expected_latents(model, conditioning, start, 2)
        normals = noise.image_noise(
            0,
            query.name,
            query.ids[0],
            [(0, 0, int(timestep), 0) for timestep in timesteps],
            start.shape,
        )
        texts = repeat_texts(conditioning, 2)
        samples = latents, torch.from_numpy(normals), timesteps, texts
        expected = flatten(mean_gradient(model, parameters, "loss", samples, 9))
    torch.testing.assert_close(found[1], expected)
    assert not torch.allclose(found[0], expected)


def test_random_scores_belong_to_the_query_and_the_seed(make_run):
    random = make_method("random")
    first, second = random.scores(make_run(images=(0, 1)))
    np.testing.assert_array_equal(random.scores(make_run(images=(1,)))[0], second)
    assert len(set(first.tolist())) == 6 and (first != second).all()
    assert (make_method("random", seed=1).scores(make_run(images=(0,)))[0] != first).all()


def test_an_image_counts_by_its_best_caption(training_set):
    captions = np.array(training_set.embeddings[:6, 0], np.float32)
    images = training_set.first(3)
    pairs = replace(images, embeddings=captions.reshape(3, 2, *captions.shape[1:]))
    scores = cosine_scores(
        captions.reshape(6, -1), text_blocks(pairs), mean_features(text_blocks(pairs))
    )
    centred = normalise(captions.reshape(6, -1) - captions.reshape(6, -1).mean(axis=0))
    expected = centred @ centred.T
    np.testing.assert_allclose(scores, expected.reshape(6, 3, 2).max(axis=2), atol=1e-5)


def test_similarity_is_the_square_of_two_centred_cosines_where_both_are_positive(make_run):
    run = make_run(images=(1, 4))
    texts, latents = (
        np.asarray(array, np.float64)
        for array in (run.training_set.embeddings, run.training_set.latents)
    )
    texts = texts.reshape(6, -1, texts[0, 0].size).swapaxes(0, 1)
    latents = latents.reshape(2, 6, -1)
    cosines = []
    for features in texts, latents:
        centred = normalise(features - features.mean(axis=(0, 1)))
        cosines.append((centred[0, [1, 4]] @ centred.swapaxes(1, 2)).max(axis=0))
    expected = np.where((cosines[0] > 0) & (cosines[1] > 0), cosines[0] * cosines[1], 0) ** 2
    found = make_method("similarity").scores(run)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [int(np.argmax(row)) for row in found] == [1, 4] and (expected == 0).any()


@pytest.fixture
def command(root, tmp_path, monkeypatch, model):
    """Runs the command on tasks of the miniature data root, with the model that is loaded already;
    the folder of results."""
    monkeypatch.setattr(queries, "encode_images", encode_images)
    monkeypatch.setattr(baselines, "load_model", lambda *names, **more: model)
    monkeypatch.setattr(gradients, "CHUNK_IMAGES", 2)

    def run(*given, tasks=TASKS, name="results"):
        baselines.main(
            [*write_tasks(tmp_path, root, tmp_path / name, tasks), "--device", "cpu", *given]
        )
        return tmp_path / name / "baselines"

    return run


def write_tasks(folder, root, result_dir, tasks):
    """Writes a task file; the flags of a short run on it."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return [
        "--task_json",
        str(folder / "tasks.json"),
        "--dataroot",
        str(root),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--result_dir",
        str(result_dir),
        "--laion_subset_size",
        "4",
        "--time_samples",
        "1",
        "--projection_size",
        "32",
        "--num_inference_steps",
        "2",
        "--unlearn_batch_size",
        "2",
        "--unlearn_grad_accum_steps",
        "1",
    ]


def contents(folder):
    """Every file below a folder, less the records, which hold the time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_method_ranks_the_training_set_of_every_query(command, monkeypatch):
    monkeypatch.setattr(mucs, "untrained_loss", lambda *given: 100.0)  # no model here was trained
    few = ["--mucs_steps", "1", "--mucs_batch", "2", "--mucs_draws", "2"]
    folder = command("--methods", *METHODS, *few)
    assert sorted(path.name for path in folder.iterdir()) == sorted(METHODS)
    for method in METHODS:
        for name in FOLDERS:
            arrays = read_influence(folder / method / name / "influence.npz", "")
            assert (
                arrays["ids"].tolist() == [f"laion/{image:06d}" for image in range(4)]
                and not arrays["is_exemplar"].any()
            )
            # similarity is 0 where a cosine is negative, words where no word is shared
            num_scores = len(set(arrays["influence"].tolist()))
            assert num_scores == 4 or method in ("similarity", "words")
            identity = json.loads((folder / method / name / "influence.json").read_text())[
                "identity"
            ]
            assert identity["method"] == method and len(identity["candidates"]) == 1
            assert list(identity["settings"]) == [each.name for each in fields(METHODS[method])]
            assert ("cosines" in identity["settings"]) == issubclass(METHODS[method], Cosines)
    assert not list(folder.glob("**/.*")) and not list(folder.glob("**/*.part"))


def test_the_order_of_tasks_is_irrelevant_and_a_second_start_computes_nothing(command, monkeypatch):
    methods = ["--methods", "influence", "trak", "journeytrak"]
    folder, turned = command(*methods), command(*methods, tasks=TASKS[::-1], name="turned")
    for method in methods[1:]:
        for name in FOLDERS:
            first, second = (
                np.load(each / method / name / "influence.npz")["influence"]
                for each in (folder, turned)
            )
            np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6 * np.abs(first).max())
    before = contents(folder)
    monkeypatch.setattr(gradients, "mean_gradient", None)
    command(*methods)
    assert contents(folder) == before


def test_what_a_method_looks_at_stands_in_its_identity_and_nothing_else_does(make_run):
    run = replace(make_run(fisher=SimpleNamespace(identity="hash")), readings={"a": "CMYK"})
    run.tasks[:] = [
        SimpleNamespace(
            seed=None,
            train_prompt=None,
            exemplar_paths=(),
            exemplar_ids=lambda dataroot: [],
            result_name=f"{number}.png",
            query_name=str(number),
        )
        for number in (0, 1)
    ]
    for name, method in METHODS.items():
        for result in list_results(run, name, make_method(name)):
            for field, is_there in (
                ("readings", method.needs_pictures),
                ("captions", method.needs_captions),
                ("fisher", method.needs_fisher),
                ("query_seed", name == "journeytrak"),
            ):
                assert (field in result.identity) == is_there
    plain = method_identity(replace(run, readings={}), "pixel", make_method("pixel"))
    assert "readings" not in plain


@pytest.mark.parametrize("method", ["influence", "dtrak"])
def test_a_killed_run_goes_on_and_leaves_the_same_bits(method, command, monkeypatch):
    expected = contents(command("--methods", method, name="whole"))
    for kind in (
        "write_array_chunk",
        "write_record",
    ):  # between the chunks, and between the gathered file and its record
        write, calls = getattr(gradients, kind), []

        def killed(path, *rest, write=write, calls=calls):
            calls.append(path)
            if len(calls) == (2 if write.__name__ == "write_array_chunk" else 1):
                raise KeyboardInterrupt
            write(path, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(gradients, kind, killed)
            command("--methods", method, name=kind)
        left = contents(command("--methods", method, name=kind))
        assert left == expected


def test_the_cached_gradients_serve_any_lambda_and_any_views_but_finished_scores_are_not_mixed(
    command, monkeypatch
):
    folder = command("--methods", "trak")
    before = (folder / "trak/features.npy").read_bytes()
    with pytest.raises(
        UserError,
        match=r"made with other settings: trak_lambda is 0.1, expected 3.0 \(ridge of the "
        r"kernel\); give --overwrite",
    ):
        command("--methods", "trak", "--trak_lambda", "3")
    monkeypatch.setattr(gradients, "reduce_images", None)
    command("--methods", "trak", "--trak_lambda", "3", "--views", "mean", "--overwrite")
    assert (folder / "trak/features.npy").read_bytes() == before


def test_features_of_another_projection_are_refused(command, tmp_path):
    folder = command("--methods", "trak", tasks=TASKS[:1])
    with pytest.raises(
        UserError,
        match="features.npy: made with other settings: projection_size is 32, expected 16 "
        ".numbers that a gradient is projected to.; give --over",
    ):
        command("--methods", "trak", "--projection_size", "16", tasks=TASKS[1:])
    assert (folder / "trak/features.npy").exists()


def test_queries_of_customized_models_have_their_exemplars_first_and_some_methods_score_them(
    command, root
):
    methods = "random", "pixel", "vae", "words"
    folder = command("--methods", *methods, tasks=[FIRST, SECOND])
    exemplars = [
        path.relative_to(root).as_posix()
        for path in load_tasks(PARITY / "fixture/tasks.json", root)[0].exemplar_paths
    ]
    for method in methods:
        arrays = read_influence(folder / method / FOLDERS[0] / "influence.npz", "")
        assert arrays["ids"].tolist() == [*exemplars, *(f"laion/{image:06d}" for image in range(4))]
        assert arrays["is_exemplar"].tolist() == [True] * len(exemplars) + [False] * 4
    with pytest.raises(
        UserError,
        match=r"00000.png: was made by the customized model models/tiny/blob; trak, dtrak can "
        r"only score "
        "queries of the base model; give --methods random pixel vae words$",
    ):
        command("--methods", "pixel", "trak", "dtrak", tasks=[FIRST, SECOND], name="refused")


def test_a_method_that_gives_all_images_the_same_score_says_so(command, monkeypatch, caplog):
    @dataclass(frozen=True)
    class Alike(Method):
        def scores(self, run):
            return [np.zeros(len(run.training_set)), np.arange(len(run.training_set))]

    monkeypatch.setitem(METHODS, "random", Alike)
    folder = command("--methods", "random")
    assert (
        f"random: all images have the same score for 1 of 2 queries, first "
        f"{TASKS[0]['synth_image_path']}: of these it says nothing" in caplog.text
    )
    for name, expected in zip(FOLDERS, (4, 0)):
        text = (folder / "random" / name / "influence.csv").read_text()
        assert text.count("all images have the same score: it says nothing of them") == expected


@pytest.mark.parametrize(
    "given, said",
    [
        (
            ["--methods", "pixel", "tark"],
            "--methods: expected some of random, pixel, vae, .*, found tark",
        ),
        (["--methods"], "--methods: expected some of random, pixel, .* found none"),
        (["--projection_size", "0"], "--projection_size 0: expected a positive whole number"),
        (["--trak_lambda", "-1"], "--trak_lambda -1: expected a positive number"),
        (["--trak_lambda", "nan"], "--trak_lambda nan: expected a positive number"),
        (
            ["--num_inference_steps", "0"],
            "--num_inference_steps 0: expected a positive whole number",
        ),
        (
            ["--features", "some/ours"],
            "--features some/ours: names must differ from each other and from ours, random",
        ),
        (["--time_samples", "7"], "--time_samples 7: must divide the model's"),
    ],
)
def test_a_bad_flag_is_named_and_nothing_is_written(given, said, command, tmp_path):
    with pytest.raises(UserError, match=said):
        command(*given)
    assert not (tmp_path / "results").exists()


def test_a_fisher_of_another_model_is_refused(command, root, tmp_path, model):
    path = tmp_path / "fisher.safetensors"
    write_tensors(
        path, {name: value.abs() for name, value in read_tensors(root / "sd_fisher.pt").items()}
    )
    write_record(path, {**model.identity, "weights": "another"})
    with pytest.raises(
        UserError,
        match="fisher.safetensors: made with other settings: other weights of the model: .*; "
        "make this model's own: python -m unlearn fisher",
    ):
        command("--methods", "influence", "--fisher_path", str(path))
    assert record_path(path).exists() and not (tmp_path / "results").exists()


def test_words_are_jaccards_index_of_prompt_and_caption_an_exemplars_being_its_train_prompt(
    make_run, training_set
):
    captions = ["a RED cat", "cat: a cat!", "", "two dogs", "<new1> cat", "red, red"]
    run = make_run(images=(0,), candidates=replace(training_set.first(6), captions=captions))
    run.tasks[0] = SimpleNamespace(
        prompt="a red <new1> cat",
        train_prompt="<new1> cat",
        exemplar_paths=("0.png", "1.png"),
        exemplar_ids=lambda dataroot: ["0.png", "1.png"],
    )
    expected = [2 / 4, 2 / 4, 3 / 4, 2 / 4, 0, 0, 2 / 4, 1 / 4]
    np.testing.assert_allclose(make_method("words").scores(run), [expected])
    assert [row.tolist() for row in make_method("words").scores(make_run(()))] == []


def test_words_find_every_exemplar_of_every_query_of_the_emoji_world(make_run, training_set):
    root = ROOT / "data/emoji"
    captions = (root / "laion_subset/captions.txt").read_text().splitlines()
    tasks = load_tasks(ROOT / "tasks/emoji_reported.json", root)
    images = replace(
        training_set,
        ids=[str(number) for number in range(len(captions))],
        captions=captions,
    )
    run = replace(make_run((), candidates=images), tasks=tasks, dataroot=str(root))
    for task, scores in zip(tasks, make_method("words").scores(run), strict=True):
        count = len(task.exemplar_paths)
        assert len(scores) == count + 1448 and scores[:count].min() > scores[count:].max()


def test_words_of_other_captions_are_not_taken_for_those_of_these(command, root):
    path = root / "laion_subset/captions.txt"
    command("--methods", "words", "vae")
    path.write_text(path.read_text().replace("white", "red"))
    command("--methods", "vae")  # latents are not made of captions
    with pytest.raises(UserError, match="influence.npz: made with other settings: other captions"):
        command("--methods", "words")


def test_words_without_captions_are_refused(command, root):
    (root / "laion_subset/captions.txt").unlink()
    with pytest.raises(
        UserError, match="--methods words: need the training images' captions, and .* has none"
    ):
        command("--methods", "words", "vae")


def test_each_query_ends_in_a_table_a_csv_file_and_a_picture(command, root, capsys):
    folder = command("--methods", "words", "vae", "--top_k", "3", tasks=[FIRST, TASKS[1]])
    screen = capsys.readouterr().out
    for method in "words", "vae":
        for name, prompt in zip(FOLDERS, (FIRST["prompt"], TASKS[1]["prompt"])):
            below = folder / method / name
            arrays = read_influence(below / "influence.npz", "")
            with open(below / "influence.csv", newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
            assert [row["id"] for row in rows] == arrays["ids"][arrays["rank"]].tolist()
            np.testing.assert_allclose(
                [float(row["score"]) for row in rows], np.sort(arrays["influence"])[::-1], 1e-5
            )
            table = screen.split(f'{method}, synth/{name}: "{prompt}"\n')[1].split("\n\n")[0]
            header, _, *lines = table.splitlines()
            has_exemplars = name == FOLDERS[0]
            assert ("exemplar" in header) == has_exemplars and len(lines) == 3
            for line, row in zip(lines, rows):
                assert line.split()[:2] == [row["rank"], f"{float(row['score']):+.3e}"]
                assert ("  yes  " in line) == (row["exemplar"] == "True")
                assert f"  {row['image']}  " in line and line.endswith(row["caption"])
            assert f"\nPicture: {below / 'visualization.jpg'}\n" in screen
            assert Image.open(below / "visualization.jpg").size[0] > 3 * 192


def test_finished_scores_are_shown_again_and_a_lost_picture_is_drawn_again(command, capsys):
    folder = command("--methods", "vae")
    before, screen = contents(folder), capsys.readouterr().out
    picture = folder / "vae" / FOLDERS[0] / "visualization.jpg"
    picture.unlink()
    command("--methods", "vae")
    assert contents(folder) == before and capsys.readouterr().out == screen
    command("--methods", "vae", "--top_k", "1")
    after = contents(folder)
    assert {path for path in after if after[path] != before[path]} == {
        f"vae/{name}/visualization.jpg" for name in FOLDERS
    }


def test_of_many_queries_each_is_a_line(command, capsys, monkeypatch):
    monkeypatch.setattr("unlearn.baselines.saving.MOST_TABLES", 1)
    folder = command("--methods", "vae")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, name, task in zip(lines, FOLDERS, TASKS):
        with open(
            folder / "vae" / name / "influence.csv", newline="", encoding="utf-8-sig"
        ) as file:
            first = next(csv.DictReader(file))
        assert line == (
            f"vae, {task['synth_image_path']}: {float(first['score']):+.3e} "
            f'{Path(first["path"]).name} "{first["caption"]}"'
        )


def test_captions_that_would_command_a_terminal_are_shown_escaped(command, root, capsys):
    path = root / "laion_subset/captions.txt"
    path.write_text("\x1b[2J" + path.read_text(encoding="utf-8"), encoding="utf-8")
    folder = command("--methods", "words")
    assert "\x1b" not in capsys.readouterr().out
    assert "\x1b" not in (folder / "words" / FOLDERS[0] / "influence.csv").read_text()


def test_pixels_without_pictures_are_refused(command, root):
    shutil.rmtree(root / "laion_subset/images")
    with pytest.raises(
        UserError, match="--methods pixel: need the training images' pictures, and .* has none"
    ):
        command("--methods", "pixel", "vae")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradient_methods_score_on_cuda_as_on_the_cpu(root, tmp_path):
    methods = "influence", "trak", "journeytrak", "dtrak"
    for device in "cpu", "cuda":
        baselines.main(
            [
                *write_tasks(tmp_path, root, tmp_path / device, TASKS),
                "--device",
                device,
                "--methods",
                *methods,
            ]
        )
    for method in methods:
        cpu, cuda = (
            np.load(tmp_path / device / "baselines" / method / FOLDERS[0] / "influence.npz")[
                "influence"
            ]
            for device in ("cpu", "cuda")
        )
        np.testing.assert_allclose(cuda, cpu, rtol=0, atol=1e-3 * np.abs(cpu).max())
