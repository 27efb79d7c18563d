"""The loss of an image is its own: it does not depend on batch, subset, order, chunk or restart,
and is what [AbU] says."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import PARITY

import compute_training_loss
from unlearn import UserError, noise
from unlearn.attribution import draws, sweeps
from unlearn.attribution.caches import cache_losses
from unlearn.attribution.draws import ImageNoise, chunk_noise
from unlearn.attribution.losses import score_rows
from unlearn.attribution.settings import LossSettings
from unlearn.attribution.sweeps import Sweep
from unlearn.models.families import STABLE_DIFFUSION
from unlearn.models.pipelines import Model, load_model

GRID = [0, 250, 500, 750]


@pytest.fixture(scope="module")
def dozen(training_set):
    """Twelve images, with both views."""
    return training_set.first(12)


@pytest.fixture(scope="module")
def reference(model, dozen, tmp_path_factory):
    """Their losses, scored twenty samples at a time."""
    return Sweep(dozen, GRID, 20).run(model, tmp_path_factory.mktemp("reference"), "")


def made(folder):
    """A folder for chunks, which is to be there."""
    folder.mkdir(exist_ok=True)
    return folder


def by_id(images, scores):
    """{(id, view): loss}"""
    return {
        (id, view): score
        for view, row in enumerate(scores.reshape(2, -1))
        for id, score in zip(images.ids, row)
    }


def assert_same_by_id(expected, found):
    for key, loss in found.items():
        assert loss == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_batch_size_changes_losses_by_less_than_1e_6(model, dozen, reference, tmp_path, batch_size):
    np.testing.assert_allclose(
        Sweep(dozen, GRID, batch_size).run(model, tmp_path, ""), reference, rtol=1e-6
    )


def test_an_image_has_the_same_loss_in_a_subset(model, dozen, reference, tmp_path):
    first, some = dozen.first(5), dozen.take([11, 3, 4])
    assert_same_by_id(
        by_id(dozen, reference),
        by_id(first, Sweep(first, GRID, 20).run(model, made(tmp_path / "first"), "")),
    )
    assert_same_by_id(
        by_id(dozen, reference),
        by_id(some, Sweep(some, GRID, 20).run(model, made(tmp_path / "some"), "")),
    )


def test_an_image_has_the_same_loss_in_another_order(model, dozen, reference, tmp_path):
    shuffled = dozen.take(np.random.default_rng(0).permutation(12))
    assert shuffled.ids != dozen.ids
    assert_same_by_id(
        by_id(dozen, reference), by_id(shuffled, Sweep(shuffled, GRID, 20).run(model, tmp_path, ""))
    )


@pytest.mark.parametrize("chunk_images", [1, 5])
def test_chunking_changes_losses_by_less_than_1e_6(
    model, dozen, reference, tmp_path, monkeypatch, chunk_images
):
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (chunk_images,))
    sweep = Sweep(dozen, GRID, 20)
    assert len(sweep.chunks) == -(-12 // chunk_images)
    np.testing.assert_allclose(sweep.run(model, tmp_path, ""), reference, rtol=1e-6)


def test_chunks_hold_every_row_once():
    for num_images in 1, 63, 64, 65, 200:
        rows = np.concatenate(list(draws.chunk_rows(num_images, 2)))
        np.testing.assert_array_equal(np.sort(rows), np.arange(2 * num_images))


def test_an_interrupted_sweep_goes_on_to_the_same_bits_and_scores_no_chunk_again(
    model, dozen, tmp_path, monkeypatch
):
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (3,))
    expected, scored, stop = Sweep(dozen, GRID, 7).run(model, made(tmp_path / "whole"), ""), [], [2]

    def count_rows(model, images, rows, *rest):
        if len(scored) == stop[0]:
            raise KeyboardInterrupt
        scored.append(tuple(rows))
        return score_rows(model, images, rows, *rest)

    monkeypatch.setattr(sweeps, "score_rows", count_rows)
    with pytest.raises(KeyboardInterrupt):
        Sweep(dozen, GRID, 7).run(model, made(tmp_path / "parts"), "")
    assert len(list((tmp_path / "parts").glob("*.npy"))) == 2
    stop[0] = None
    np.testing.assert_array_equal(
        Sweep(dozen, GRID, 7).run(model, made(tmp_path / "parts"), ""), expected
    )
    assert len(scored) == len(set(scored)) == 4


def test_two_processes_halves_of_the_chunks_make_the_same_bits(model, dozen, tmp_path, monkeypatch):
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (3,))
    expected = Sweep(dozen, GRID, 7).run(model, made(tmp_path / "one"), "")
    for half in 0, 1:
        sweep, folder = Sweep(dozen, GRID, 7), tmp_path / f"half{half}"
        sweep.run(model, made(folder), "")
        (tmp_path / "both").mkdir(exist_ok=True)
        for path in sorted(folder.glob("*.npy"))[half::2]:
            path.rename(tmp_path / "both" / path.name)
    monkeypatch.setattr(sweeps, "score_rows", None)  # nothing is left to score
    np.testing.assert_array_equal(
        Sweep(dozen, GRID, 7).run(model, made(tmp_path / "both"), ""), expected
    )


def test_the_loss_equals_a_float64_reference_written_from_the_formula(dozen, reference):
    unet = load_model(str(PARITY / "fixture/sd-tiny"), "cpu").pipeline.unet.double()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # the scheduler's scaled_linear
    signal = np.cumprod(1 - betas)
    for view, image in (0, 0), (1, 0), (0, 7), (1, 11):
        total = 0.0
        for timestep in GRID:
            epsilon = noise.image_noise(
                0, dozen.name, dozen.ids[image], [(view, 0, timestep, 0)], (4, 16, 16)
            )[0].astype(np.float64)
            noisy = (
                signal[timestep] ** 0.5 * dozen.latents[view, image].astype(np.float64)
                + (1 - signal[timestep]) ** 0.5 * epsilon
            )
            with torch.no_grad():
                predicted = unet(
                    torch.from_numpy(noisy)[None],
                    timestep,
                    torch.from_numpy(dozen.embeddings[image, :1].astype(np.float64)),
                ).sample
            total += np.mean((predicted[0].numpy() - epsilon) ** 2) / len(GRID)
        assert reference.reshape(2, -1)[view, image] == pytest.approx(total, rel=1e-5)


def test_captions_of_an_image_are_averaged(model, dozen):
    """Each with its own noise; and a second caption leaves the first one's noise as it was."""
    rows, other = np.arange(4), dozen.embeddings[::-1]
    both = dataclasses.replace(dozen, embeddings=np.concatenate([dozen.embeddings, other], axis=1))
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        normals = chunk_noise(both, rows, GRID, 0, pool)
        np.testing.assert_array_equal(
            normals[:, : len(GRID)], chunk_noise(dozen, rows, GRID, 0, pool)
        )
        found = score_rows(model, both, rows, GRID, normals, 20)
        first = score_rows(model, dozen, rows, GRID, normals[:, : len(GRID)], 20)
        second = score_rows(
            model,
            dataclasses.replace(dozen, embeddings=other),
            rows,
            GRID,
            normals[:, len(GRID) :],
            20,
        )
    np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_target_of_each_prediction_type_equals_its_closed_form(kind):
    """From the noisy latents x_t: the true target, put in the place of a prediction, gives latents
    and noise back."""
    pipeline = type(
        "Pipeline",
        (),
        {
            "scheduler": type(
                "Scheduler", (), {"config": type("Config", (), {"prediction_type": kind})}
            )
        },
    )
    alpha_bars = torch.tensor([0.999, 0.6, 0.01], dtype=torch.float64)
    model = Model(pipeline, "", alpha_bars, STABLE_DIFFUSION)
    generator = torch.Generator().manual_seed(0)
    latents, normals = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    timesteps = torch.tensor([0, 1, 2])
    target = model.target(latents, normals, timesteps)
    noisy = model.diffuse(latents, normals, timesteps)
    a, s = (value.reshape(3, 1, 1, 1) for value in (alpha_bars**0.5, (1 - alpha_bars) ** 0.5))
    torch.testing.assert_close(noisy, a * latents + s * normals)
    expected = {
        "epsilon": (noisy - a * latents) / s,
        "sample": (noisy - s * normals) / a,
        "v_prediction": a * (noisy - a * latents) / s - s * latents,
    }[kind]
    torch.testing.assert_close(target, expected, rtol=1e-9, atol=1e-9)
    if kind == "v_prediction":  # rotating back: x0 = a x_t - s v, eps = s x_t + a v
        torch.testing.assert_close(a * noisy - s * target, latents)
        torch.testing.assert_close(s * noisy + a * target, normals)


@pytest.mark.parametrize("array", ["latents", "embeddings"])
def test_values_that_are_not_finite_are_refused_naming_the_images(model, dozen, tmp_path, array):
    values = np.array(getattr(dozen, array))
    (values[1, 5] if array == "latents" else values[5])[..., 0] = np.nan
    with pytest.raises(
        UserError, match=rf"{array} of laion/000000 to laion/000011: has NaN or infinite entries"
    ):
        Sweep(dataclasses.replace(dozen, **{array: values}), GRID, 20).run(model, tmp_path, "")


def cached(model, images, path, overwrite=False, grid=GRID, noise_seed=0):
    settings = LossSettings(grid, ImageNoise(noise_seed))
    sweep = Sweep(images, grid, 20, settings.noise)
    return cache_losses(sweep, model, path, settings.identity(model, images), overwrite)


def test_a_cache_of_the_same_identity_is_kept(model, dozen, tmp_path, monkeypatch):
    first = cached(model, dozen.first(2), tmp_path / "loss.npy")
    monkeypatch.setattr(sweeps, "score_rows", None)
    np.testing.assert_array_equal(cached(model, dozen.first(2), tmp_path / "loss.npy"), first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.json", "loss.npy"]


@pytest.mark.parametrize(
    "field, change",
    [
        ("noise_seed", {"noise_seed": 1}),
        ("timesteps", {"grid": [0, 500]}),
        ("weights", {}),
        ("num_images", {}),
    ],
    ids=["seed", "time samples", "weights", "number of images"],
)
def test_a_cache_of_another_identity_is_refused_naming_the_field_and_replaced_with_overwrite(
    model, dozen, tmp_path, field, change
):
    images, path = dozen.first(2), tmp_path / "loss.npy"
    first = cached(model, images, path)
    if field == "weights":
        model = dataclasses.replace(model, weights_hash="other weights")
    if field == "num_images":
        images = dozen.first(1)
    with pytest.raises(
        UserError,
        match=rf"loss\.npy: made with other settings: ({field} is .*, expected .*|other {field} "
        rf"of the model.*); give --overwrite",
    ):
        cached(model, images, path, **change)
    np.testing.assert_array_equal(np.load(path), first)
    replaced = cached(model, images, path, overwrite=True, **change)
    np.testing.assert_array_equal(cached(model, images, path, **change), replaced)
    assert (field == "weights") == np.array_equal(replaced, first)


@pytest.mark.parametrize(
    "flag, value, field",
    [("--noise_seed", "1", "noise_seed"), ("--time_samples", "1", "timesteps")],
)
def test_the_script_refuses_a_cache_of_other_flags_and_replaces_it_with_overwrite(
    flags, tmp_path, flag, value, field
):
    flags = [*flags, "--laion_subset_size", "1", "--time_samples", "2"]
    compute_training_loss.main(flags)
    with pytest.raises(
        UserError, match=rf"exemplar_loss\.npy: made with other settings: {field} is"
    ):
        compute_training_loss.main([*flags, flag, value])
    compute_training_loss.main([*flags, flag, value, "--overwrite"])
    compute_training_loss.main([*flags, flag, value])


def test_a_cache_with_one_bit_flipped_is_refused(model, dozen, tmp_path):
    path = tmp_path / "loss.npy"
    cached(model, dozen.first(2), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"loss\.npy: its content is not what its record says \(damaged or replaced\)",
    ):
        cached(model, dozen.first(2), path)


def test_a_cache_without_record_is_refused(model, dozen, tmp_path):
    np.save(tmp_path / "loss.npy", np.ones(4, np.float32))
    with pytest.raises(UserError, match=r"loss\.npy: has no record \(loss\.json\)"):
        cached(model, dozen.first(2), tmp_path / "loss.npy")


def test_losses_that_are_not_finite_are_never_cached(model, dozen, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sweeps, "score_rows", lambda model, images, rows, *rest: np.full((len(rows), 1), np.nan)
    )
    with pytest.raises(UserError, match=r"loss\.npy: 4 losses are NaN or infinite"):
        cached(model, dozen.first(2), tmp_path / "loss.npy")
    assert not (tmp_path / "loss.npy").exists()
