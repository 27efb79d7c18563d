"""Training from scratch: what is random belongs to the image, what is left out leaves no trace,
resume changes no bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unlearn import UserError
from unlearn.attribution import losses
from unlearn.retraining.batches import draw_batch, number_draws, own_samples, random_members
from unlearn.retraining.recipes import Recipe, initial_weights
from unlearn.retraining.training import mean_losses, train

RECIPE = Recipe(epochs=2, rate=1e-3, batch_size=10, schedule="linear", seed=0, mixed_precision="no")


@pytest.fixture(scope="module")
def images(training_set):
    """Twenty-four images: two batches of ten and one of four an epoch."""
    return training_set.first(24)


def members_without(count, *left_out):
    """A row of members: all but those left out."""
    mask = np.ones((1, count), bool)
    mask[0, list(left_out)] = False
    return mask


def same(first, second):
    """Whether two models' weights are bit for bit the same."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def distance(first, second):
    """Norm of the difference of two models' weights."""
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


@pytest.fixture(scope="module")
def full(model, images):
    """The weights of the full model."""
    return train(model, images, members_without(24), RECIPE)[0]


def test_what_training_sees_of_an_image_does_not_depend_on_its_batch(images):
    alone = draw_batch(images, [7], 3, 0, 1000)
    among = draw_batch(images, [2, 7, 20], 3, 0, 1000)
    assert all(torch.equal(one[0], many[1]) for one, many in zip(alone[:3], among[:3]))
    assert torch.equal(alone[3]["embeddings"][0], among[3]["embeddings"][1])


def test_another_epoch_or_seed_draws_other_noise(images):
    first, epoch, seed = (
        draw_batch(images, [7], *drawn, 1000)[1] for drawn in ((0, 0), (1, 0), (0, 1))
    )
    assert not torch.equal(first, epoch) and not torch.equal(first, seed)


def test_flips_timesteps_and_noise_follow_their_distributions(images):
    latents, normals, timesteps = (
        torch.cat(parts)
        for parts in zip(
            *(draw_batch(images, range(24), epoch, 0, 1000)[:3] for epoch in range(50))
        )
    )
    mirrored = np.array(
        [np.array_equal(latent, images.latents[1, row % 24]) for row, latent in enumerate(latents)]
    )
    assert abs(mirrored.mean() - 0.5) < 0.05
    assert (
        abs(float(timesteps.float().mean()) - 499.5) < 30
        and int(timesteps.min()) < 10
        and int(timesteps.max()) > 989
    )
    assert abs(float(normals.mean())) < 0.01 and abs(float(normals.std()) - 1) < 0.01


def test_the_mean_loss_of_a_batch_is_the_mean_of_its_samples_losses(model, images):
    inputs = draw_batch(images, range(5), 0, 0, 1000)
    weights = dict(model.denoiser.named_parameters())
    stacked, counted = own_samples(np.ones((1, 5), bool), inputs)
    latents, normals, timesteps, embeddings = inputs
    with torch.no_grad():
        expected = losses.sample_losses(model, latents, normals, timesteps, embeddings).mean()
        assert float(mean_losses(model, weights, stacked, counted)[0]) == pytest.approx(
            float(expected), rel=1e-5
        )


def test_training_lowers_the_loss_of_what_was_trained_on(model, images, full):
    trained = train(model, images, members_without(24), replace(RECIPE, epochs=12))[0]
    inputs, counted = own_samples(
        np.ones((1, 24), bool), draw_batch(images, range(24), 1000, 0, 1000)
    )
    with torch.no_grad():
        before, after = (
            float(mean_losses(model, weights, inputs, counted)[0])
            for weights in (initial_weights(model.denoiser, 0), trained)
        )
    assert after < 0.9 * before


@pytest.mark.parametrize("left_out", [(3, 17), tuple(range(12)), tuple(range(1, 24))])
def test_images_left_out_leave_no_trace(model, images, left_out):
    latents, embeddings = np.array(images.latents), np.array(images.embeddings)
    latents[:, left_out], embeddings[list(left_out)] = 60, -60
    others = replace(images, latents=latents, embeddings=embeddings)
    members = members_without(24, *left_out)
    assert same(train(model, images, members, RECIPE)[0], train(model, others, members, RECIPE)[0])


def test_training_is_the_same_where_a_full_memory_has_made_passes_save_it(model, images):
    """What is computed again must not be so with the weights that the model itself has."""
    expected = train(model, images, members_without(24, 3), RECIPE)[0]
    was_saving = not model.save_memory()
    try:
        assert same(train(model, images, members_without(24, 3), RECIPE)[0], expected)
        assert model.is_saving_memory
    finally:
        if not was_saving:
            model.denoiser.disable_gradient_checkpointing()


REPEATED = replace(RECIPE, repeats=(4, *[1] * 23))


def test_an_epoch_sees_an_image_as_often_as_it_is_repeated():
    occurrences = REPEATED.occurrences(24)
    assert np.bincount(occurrences).tolist() == list(REPEATED.repeats)
    assert REPEATED.num_steps(24) == 2 * 3
    assert replace(REPEATED, repeats=(8, *[1] * 23)).num_steps(24) == 2 * 4


def test_no_two_draws_of_an_image_are_the_same_whatever_its_repeats():
    occurrences = np.repeat(np.arange(3), (3, 1, 2))
    drawn = np.concatenate([number_draws(occurrences, epoch) for epoch in range(4)])
    images = np.tile(occurrences, 4)
    for image, repeats in enumerate((3, 1, 2)):
        assert sorted(drawn[images == image]) == list(range(4 * repeats))


def test_repeats_of_one_each_are_the_training_without_repeats(model, images, full):
    once = replace(RECIPE, repeats=(1,) * 24)
    assert same(train(model, images, members_without(24), once)[0], full)


def test_an_image_repeated_is_learned_better_than_without(model, images, full):
    often = train(model, images, members_without(24), replace(RECIPE, repeats=(40, *[1] * 23)))[0]
    inputs, counted = own_samples(np.ones((1, 1), bool), draw_batch(images, [0], 99_999, 0, 1000))
    with torch.no_grad():
        losses_of = [
            float(mean_losses(model, weights, inputs, counted)[0]) for weights in (full, often)
        ]
    assert losses_of[1] < losses_of[0]


def test_images_left_out_leave_no_trace_where_they_are_repeated(model, images):
    latents = np.array(images.latents)
    latents[:, 0] = 60
    others, members = replace(images, latents=latents), members_without(24, 0)
    assert same(
        train(model, images, members, REPEATED)[0], train(model, others, members, REPEATED)[0]
    )


def test_repeats_enter_the_identity_only_where_there_are_some(model, images):
    assert "repeats" not in RECIPE.identity(model, images)
    assert (
        REPEATED.identity(model, images)["repeats"]
        != replace(REPEATED, repeats=(2, *[1] * 23)).identity(model, images)["repeats"]
    )


@pytest.fixture
def other_start(model, tmp_path):
    """The folder of a UNet of the same configuration with weights of another seed."""
    model.denoiser.save_config(tmp_path)
    model.pipeline.scheduler.save_config(tmp_path)
    save_file(initial_weights(model.denoiser, 7), tmp_path / "model.safetensors")
    return str(tmp_path)


def test_training_starts_from_the_weights_of_a_folder(model, images, other_start):
    untouched = replace(RECIPE, rate=1e-30, start=other_start)
    trained = train(model, images, members_without(24), untouched)[0]
    assert distance(trained, initial_weights(model.denoiser, 7)) < 1e-4
    assert distance(trained, initial_weights(model.denoiser, 0)) > 1


def test_the_start_enters_the_identity_by_its_weights_not_its_path(model, images, other_start):
    found = replace(RECIPE, start=other_start).identity(model, images)
    assert found == {**replace(RECIPE, seed=7).identity(model, images), "seed": 0}
    assert found != RECIPE.identity(model, images)


def test_a_start_of_another_configuration_is_refused(model, other_start):
    path = Path(other_start) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "norm_eps": 1e-3}))
    with pytest.raises(UserError, match="train_from .* describes another UNet"):
        initial_weights(model.denoiser, 0, other_start)


def test_images_left_out_of_one_stacked_model_leave_no_trace_in_it(model, images):
    members = np.concatenate([members_without(24, 3, 17), members_without(24, *range(12))])
    latents = np.array(images.latents)
    latents[:, list(range(12))] = 3.0
    others = replace(images, latents=latents)
    assert same(train(model, images, members, RECIPE)[1], train(model, others, members, RECIPE)[1])
    assert not same(
        train(model, images, members, RECIPE)[0], train(model, others, members, RECIPE)[0]
    )


def test_stacked_models_are_those_trained_alone(model, images):
    members = np.stack([random_members(24, 12, number, "abc") for number in range(3)])
    recipe = replace(RECIPE, epochs=1)
    stacked = train(model, images, members, recipe)
    for row, weights in enumerate(stacked):
        alone = train(model, images, members[row : row + 1], recipe)[0]
        assert distance(alone, weights) < 0.02 * distance(alone, stacked[row - 1])


def test_a_model_of_all_images_in_a_stack_is_the_full_model(model, images, full):
    both = np.concatenate([members_without(24), members_without(24, *range(10))])
    stacked = train(model, images, both, RECIPE)
    assert distance(full, stacked[0]) < 0.05 * distance(full, stacked[1])


def test_attention_of_the_lent_model_is_as_before_training_a_stack(model, images):
    before = dict(model.denoiser.attn_processors)
    train(model, images.first(4), np.ones((2, 4), bool), replace(RECIPE, epochs=1))
    assert model.denoiser.attn_processors == before


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
@pytest.mark.parametrize("num_models", [1, 2])
def test_training_killed_and_resumed_changes_no_bit(
    model, images, full, tmp_path, steps, num_models
):
    members, taken = np.repeat(members_without(24), num_models, axis=0), []
    members[1:, :12] = False

    def kill(count):
        taken.append(count)
        if len(taken) > steps:
            raise Killed

    with pytest.raises(Killed):
        train(model, images, members, RECIPE, tmp_path / "checkpoint.safetensors", kill)
    assert (tmp_path / "checkpoint.safetensors").exists() == (
        steps >= 4
    )  # after the first epoch of three steps
    started = []
    resumed = train(
        model, images, members, RECIPE, tmp_path / "checkpoint.safetensors", started.append
    )
    assert started[0] == (3 if steps >= 4 else 0)
    expected = [full] if num_models == 1 else train(model, images, members, RECIPE)
    assert all(same(*pair) for pair in zip(resumed, expected))


def test_a_step_without_a_single_own_image_is_taken_without_a_gradient(model, images):
    members = members_without(24, *range(1, 24))  # one image: two of three batches are empty
    assert all(
        torch.isfinite(weight).all() for weight in train(model, images, members, RECIPE)[0].values()
    )


def test_a_model_of_no_image_is_refused(model, images):
    with pytest.raises(UserError, match="trained on no image at all"):
        train(model, images, np.zeros((1, 24), bool), RECIPE)


def test_training_that_diverges_is_refused_by_the_name_of_a_weight(model, images):
    with pytest.raises(
        UserError, match="training diverged: .* is no longer finite; try a smaller --train_lr"
    ):
        train(model, images, members_without(24), replace(RECIPE, rate=1e38))


def test_random_subsets_have_their_size_and_their_own_seed():
    first, second = (random_members(1000, 300, seed, "abc") for seed in (0, 1))
    assert first.sum() == second.sum() == 300 and 50 < (first & second).sum() < 130
    assert np.array_equal(first, random_members(1000, 300, 0, "abc")) and not np.array_equal(
        first, random_members(1000, 300, 0, "abd")
    )


def test_autocast_to_bfloat16_trains_nearly_the_same_model(model, images):
    recipe = replace(RECIPE, epochs=1)
    half, single = (
        train(model, images, members_without(24), replace(recipe, mixed_precision=mode))[0]
        for mode in ("bf16", "no")
    )
    untrained = initial_weights(model.denoiser, 0)
    assert 0 < distance(half, single) < 0.3 * distance(single, untrained) and all(
        weight.dtype == torch.float32 for weight in half.values()
    )
