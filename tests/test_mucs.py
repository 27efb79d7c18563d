"""Bounded unlearning and the skew of losses, as a baseline."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_baselines import make_method, make_run  # noqa: F401

from unlearn import noise
from unlearn.attribution.draws import QueryDraws
from unlearn.baselines import mucs
from unlearn.baselines.mucs import (
    NOISIEST,
    forget_losses,
    noisiest_timesteps,
    select_layers,
    skew,
    unlearn_bounded,
    untrained_loss,
)
from unlearn.models.pipelines import changed_weights


@pytest.fixture
def query(training_set):
    taken = training_set.take([20])
    return replace(taken, latents=taken.latents[:1])


def test_the_skew_is_the_mean_relative_change_of_each_draw():
    before, after = np.array([[1.0, 0.2], [0.5, 0.5]]), np.array([[3.0, 0.2], [0.4, 0.7]])
    expected = [(2 / 4.001 + 0) / 2, (-0.1 / 0.901 + 0.2 / 1.201) / 2]
    np.testing.assert_allclose(skew(before, after), expected)


def test_images_are_scored_where_there_is_most_noise(model):
    found = noisiest_timesteps(model, 20)
    least = (1 - NOISIEST) * model.num_train_timesteps
    assert len(set(found)) == 20 and min(found) >= least - 1
    assert np.ptp(np.diff(sorted(found))) <= 1 and max(found) > 960


def test_only_feed_forward_layers_change_and_the_model_stays(
    model, training_set, query, monkeypatch
):
    monkeypatch.setattr(mucs, "untrained_loss", lambda *given: 100.0)
    before = {name: value.clone() for name, value in model.denoiser.named_parameters()}
    change = unlearn_bounded(model, training_set.first(8), query, 1e-3, 2, 3, 0)
    assert change.keys() == select_layers(model).keys()
    assert all(".ff." in name for name in change) and any(c.any() for c in change.values())
    for name, value in model.denoiser.named_parameters():
        assert torch.equal(value, before[name]) and not value.requires_grad and value.grad is None


def test_unlearning_raises_the_query_s_loss_and_stops_at_the_bound(
    model, training_set, query, monkeypatch
):
    draws, images, steps = QueryDraws.of_query(0, query, model), training_set.first(8), []
    bound = untrained_loss(model, query, draws, 0)
    with torch.no_grad():
        before = float(forget_losses(model, query, draws, 0, 64).mean())
    monkeypatch.setattr(mucs, "WEIGHT", 5.0)
    monkeypatch.setattr(mucs, "untrained_loss", lambda *given: 10 * before)
    change = unlearn_bounded(model, images, query, 1e-2, 8, 8, 0, steps.append)
    with changed_weights(model.denoiser, change), torch.no_grad():
        after = float(forget_losses(model, query, draws, 0, 64).mean())
    assert after > before and np.isfinite(bound) and bound > 0
    monkeypatch.setattr(mucs, "untrained_loss", lambda *given: 0.5 * before)
    still = unlearn_bounded(model, images, query, 1e-2, 8, 8, 0)
    assert not any(part.any() for part in still.values())


def test_scores_are_the_skew_under_common_draws_written_out(
    model,
    make_run,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(mucs, "untrained_loss", lambda *given: 100.0)
    run, method = make_run(images=(1,)), make_method("mucs", mucs_steps=1, mucs_rate=0.05)
    [found] = method.scores(run)
    [folder] = (run.folder / "mucs").glob("unlearned-*")
    change = mucs.Delta(folder / "weight_change.safetensors").tensors
    timesteps = noisiest_timesteps(model, 4)
    slots = [(0, 0, timestep, draw) for draw, timestep in enumerate(timesteps)]
    images = run.training_set
    normals = noise.image_noise(0, "mucs", "common draws", slots, images.latents.shape[2:])
    losses = []
    for weights in {}, change:
        with changed_weights(model.denoiser, weights), torch.no_grad():
            for image in range(len(images)):
                latent, text = images.image_tensors(0, image, model.device)
                for normal, timestep in zip(torch.from_numpy(normals), timesteps):
                    sample = latent[None], normal[None], torch.tensor([timestep]), text
                    losses.append(float(mucs.sample_losses(model, *sample)))
    before, after = np.reshape(losses, (2, len(images), 4))
    assert np.ptp(found) > 1e-4
    np.testing.assert_allclose(found, skew(before, after), rtol=1e-3, atol=1e-6)
    again = replace(run, batch_size=1)
    assert np.array_equal(method.scores(again)[0], found), "kept"
