"""Unlearning is Newton's method: closed forms on a quadratic, gradients and Fisher against brute
force, exact restoring."""

import csv
import dataclasses
import json
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution import estimation, newton
from unlearn.attribution.curvature import (
    DiagonalFisher,
    check_fisher,
    per_sample_gradients,
    squared_gradient_sums,
)
from unlearn.attribution.draws import PublishedDraws, QueryDraws
from unlearn.attribution.influence import find_warnings
from unlearn.attribution.losses import sample_losses
from unlearn.attribution.newton import newton_step, relative_change
from unlearn.commands import fisher as fisher_command
from unlearn.datasets.conditioning import map_tensors
from unlearn.models.customization import customized
from unlearn.models.pipelines import (
    changed_weights,
    load_model,
    replaced_weights,
    select_parameters,
    tracked,
)
from unlearn.report.figures import EXEMPLAR_RED
from unlearn.storage.chunks import write_tensor_chunk
from unlearn.storage.hashes import digest
from unlearn.storage.reading import read_tensors

SD_TINY, ABC = str(PARITY / "fixture/sd-tiny"), PARITY / "fixture/abc"
KV = 8  # parameters of the miniature UNet's cross-attention K and V


# --- closed forms on L(x) = (x - b)^T diag(h) (x - b) / 2, whose Hessian and Fisher stand-in is
# diag(h)


@pytest.fixture
def quadratic():
    """(parameters, curvature h, minimum b)"""
    generator = torch.Generator().manual_seed(0)
    x, b = torch.randn(2, 5, 3, generator=generator)
    return {"x": torch.nn.Parameter(x)}, 0.1 + 10 * torch.rand(5, 3, generator=generator), b


def gradient(parameters, h, b):
    return {"x": h * (parameters["x"].detach() - b)}


@pytest.mark.parametrize("rate", [1e-3, 0.5, -0.5])
def test_one_newton_step_moves_away_from_the_minimum_in_proportion_to_the_distance(quadratic, rate):
    parameters, h, b = quadratic
    start = parameters["x"].detach().clone()
    newton_step(parameters, gradient(parameters, h, b), DiagonalFisher({"x": h}), rate)
    torch.testing.assert_close(parameters["x"].detach(), start + rate * (start - b))


def test_a_step_of_rate_minus_one_lands_on_the_minimum(quadratic):
    parameters, h, b = quadratic
    newton_step(parameters, gradient(parameters, h, b), DiagonalFisher({"x": h}), -1)
    torch.testing.assert_close(parameters["x"].detach(), b, atol=1e-6, rtol=0)


def test_newton_steps_grow_geometrically(quadratic):
    parameters, h, b = quadratic
    start = parameters["x"].detach().clone()
    for step in range(1, 8):
        newton_step(parameters, gradient(parameters, h, b), DiagonalFisher({"x": h}), 0.1)
        torch.testing.assert_close(
            parameters["x"].detach() - b, 1.1**step * (start - b), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_a_step_that_is_chosen_moves_the_weights_by_four_per_cent_of_their_norm(quadratic, scale):
    parameters, h, b = quadratic
    start = parameters["x"].detach().clone()
    rate = newton_step(parameters, gradient(parameters, scale * h, b), DiagonalFisher({"x": h}))
    torch.testing.assert_close(parameters["x"].detach(), start + rate * scale * (start - b))
    assert relative_change({"x": parameters["x"].detach() - start}, {"x": start}) == pytest.approx(
        0.04, rel=1e-5
    )


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_step_is_chosen_along_a_gradient_without_direction(quadratic, value):
    parameters, h, _ = quadratic
    start = parameters["x"].detach().clone()
    with pytest.raises(
        UserError,
        match="--unlearn_lr auto: the query's gradient, divided by the Fisher, has the norm",
    ):
        newton_step(parameters, {"x": torch.full_like(h, value)}, DiagonalFisher({"x": h}))
    assert torch.equal(parameters["x"].detach(), start)


@pytest.mark.parametrize("damping", [0.0, 0.1, 3.0])
def test_damping_adds_a_multiple_of_each_parameters_own_mean(damping):
    diagonal = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([[100.0], [300.0]])}
    gradients = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([[1.0], [-6.0]])}
    found = DiagonalFisher(diagonal, damping).precondition(gradients)
    torch.testing.assert_close(
        found["a"], torch.tensor([1 / (1 + 2 * damping), 1 / (3 + 2 * damping)])
    )
    torch.testing.assert_close(
        found["b"], torch.tensor([[1 / (100 + 200 * damping)], [-6 / (300 + 200 * damping)]])
    )


@pytest.mark.parametrize(
    "entries, damping, message",
    [
        ([1, 0], 0.0, r"weight has 1 zero entries.*give a positive --damping"),
        ([0, 0], 0.1, "weight is zero throughout"),
        ([1, -1], 0.1, "weight has negative entries"),
        ([1, float("nan")], 0.1, "weight has NaN or infinite entries"),
        ([1, 2, 3], 0.0, r"weight: expected shape \[2\], found \[3\]"),
    ],
)
def test_a_fisher_that_cannot_divide_is_refused_naming_the_parameter(entries, damping, message):
    with pytest.raises(UserError, match=message):
        check_fisher(
            "sd_fisher.pt",
            {"weight": torch.tensor(entries, dtype=torch.float32)},
            {"weight": torch.ones(2)},
            damping,
        )


def test_a_fisher_that_lacks_a_selected_parameter_is_refused_and_a_lifted_zero_is_not():
    with pytest.raises(
        UserError, match="--fisher_path sd_fisher.pt: lacks 1 of the 2 selected parameters, first b"
    ):
        check_fisher(
            "sd_fisher.pt", {"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, 0.0
        )
    check_fisher("sd_fisher.pt", {"a": torch.tensor([0.0, 1.0])}, {"a": torch.ones(2)}, 0.1)


# --- per-sample gradients and the Fisher, against brute force in float64


@pytest.fixture(scope="module")
def double_model():
    """A second copy of the miniature pipeline, its denoiser and schedule in float64."""
    model = load_model(SD_TINY, "cpu")
    model.pipeline.unet.double()
    return dataclasses.replace(model, levels=model.levels.double())


@pytest.fixture(scope="module")
def samples(training_set):
    """Five samples as the Fisher draws them, in float64."""
    drawn = estimation.draw_samples(training_set, [0, 1, 2, 3, 4], 1000, seed=0)
    return map_tensors(doubled, drawn)


def doubled(tensor):
    """A tensor of floats in float64; of whole numbers, as it is."""
    return tensor.double() if tensor.is_floating_point() else tensor


def choose(model, selection):
    """Parameters of a selection; `norm` and `conv` are what no linear layer holds."""
    parts = {"norm": ".norm2.", "conv": "conv_in."}
    if selection not in parts:
        return select_parameters(model.denoiser, selection)
    return {
        name: value for name, value in model.denoiser.named_parameters() if parts[selection] in name
    }


@pytest.mark.parametrize(
    "selection, path",
    [
        ("cross-attn-kv", "hooks"),
        ("attn", "hooks"),
        ("norm", "one by one"),
        ("conv", "hooks"),
        ("all", "one by one"),
    ],
)
def test_per_sample_gradients_equal_autograd_of_each_sample(double_model, samples, selection, path):
    parameters = choose(double_model, selection)
    modules = dict(double_model.denoiser.named_modules())
    tapped = all(
        isinstance(modules[name.rpartition(".")[0]], (torch.nn.Linear, torch.nn.Conv2d))
        for name in parameters
    )
    assert parameters and tapped == (path == "hooks")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        found = dict(per_sample_gradients(double_model, parameters, samples))
        assert list(found) == list(parameters)
        for sample in range(len(samples[0])):
            one = map_tensors(itemgetter(slice(sample, sample + 1)), samples)
            loss = sample_losses(double_model, *one)
            for (name, parameter), expected in zip(
                parameters.items(), torch.autograd.grad(loss.sum(), list(parameters.values()))
            ):
                scale = expected.abs().max()
                assert scale > 0 and found[name].shape == (5, *parameter.shape)
                assert (found[name][sample] - expected).abs().max() <= 1e-9 * scale + 1e-15, name
        assert all(parameter.grad is None for parameter in parameters.values())
        assert not any(module._forward_hooks for module in modules.values())
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def make_fisher(folder, *flags):
    """The Fisher that the command makes of thirty samples."""
    folder.mkdir(exist_ok=True)
    fisher_command.main(
        [
            "--dataroot",
            str(ABC),
            "--sd_version",
            SD_TINY,
            "--device",
            "cpu",
            "--num_samples",
            "30",
            "--output",
            str(folder / "sd_fisher.safetensors"),
            *flags,
        ]
    )
    return read_tensors(folder / "sd_fisher.safetensors")


@pytest.fixture(scope="module")
def made_fisher(tmp_path_factory):
    return make_fisher(tmp_path_factory.mktemp("fisher"))


def test_the_fisher_is_the_mean_of_the_squared_gradient_of_each_sample(
    double_model, training_set, made_fisher
):
    drawn = estimation.draw_samples(training_set, list(range(30)), 1000, seed=0)
    parameters = choose(double_model, "cross-attn-kv")
    assert len(parameters) == KV and made_fisher.keys() == parameters.keys()
    expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for sample in range(30):
        one = map_tensors(lambda tensor: doubled(tensor[sample : sample + 1]), drawn)
        for name, value in zip(
            parameters,
            torch.autograd.grad(sample_losses(double_model, *one).sum(), list(parameters.values())),
        ):
            expected[name] += value**2 / 30
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for name, value in expected.items():
        assert torch.linalg.norm(made_fisher[name] - value) <= 1e-4 * torch.linalg.norm(value), name


@pytest.mark.parametrize("batch_size", ["1", "7", "30"])
def test_the_fisher_does_not_depend_on_batch_size(made_fisher, tmp_path, batch_size):
    """Nor is a last, smaller batch weighted otherwise than the rest. Entries far below the mean are
    sums of gradients that nearly vanish: the tolerance is of the parameter's norm."""
    found = make_fisher(tmp_path / "other", "--batch_size", batch_size)
    for name, value in made_fisher.items():
        assert torch.linalg.norm((found[name] - value).double()) <= 1e-6 * torch.linalg.norm(
            value.double()
        ), name


def test_the_fisher_squares_before_it_averages(double_model, samples):
    parameters = choose(double_model, "cross-attn-kv")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    together = squared_gradient_sums(double_model, parameters, samples)
    alone = [
        squared_gradient_sums(
            double_model, parameters, map_tensors(itemgetter(slice(i, i + 1)), samples)
        )
        for i in range(5)
    ]
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for name, value in together.items():
        torch.testing.assert_close(value, sum(sums[name] for sums in alone), rtol=1e-9, atol=0)


# --- unlearning one query


def first_image(training_set):
    """Its latent and its conditioning, float32 (the files may hold half precision)."""
    return training_set.query_tensors("cpu")


@pytest.fixture
def query(model, training_set):
    """What `unlearn` asks for: parameters, latent, conditioning, draws, a Fisher of ones."""
    parameters = select_parameters(model.denoiser, "cross-attn-kv")
    latent, conditioning = first_image(training_set)
    fisher = DiagonalFisher({name: torch.ones_like(value) for name, value in parameters.items()})
    return parameters, latent, conditioning, QueryDraws(0, "abc", "query", 1000), fisher


SETTINGS = {"rate": 0.5, "steps": 5, "draws_a_step": 6, "pass_size": 4}


def unlearn(
    model,
    parameters,
    latent,
    conditioning,
    draws,
    fisher,
    *,
    pass_size,
    checkpoint_path=None,
    identity=None,
    **settings,
):
    gradient = newton.QueryGradient(model, parameters, latent, conditioning, draws, pass_size)
    checkpoint = newton.checkpoint_of(checkpoint_path, identity) if checkpoint_path else None
    return newton.unlearn(gradient, fisher, checkpoint=checkpoint, **settings)


@contextmanager
def threads(number):
    """As many threads as a machine of that many cores has; one again afterwards, as all tests
    do."""
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(1)


# draws in a step, checkpoint draws, draws after which the run is killed, progress of the one that
# goes on
KILLS = {
    "between steps": (6, 12, 24, [12, 6, 6, 6]),
    "within a step": (15, 4, 23, [19, 4, 4, 3, 4, 4, 4, 3, 4, 4, 4, 3, 4, 4, 4, 3]),
    "within the first": (15, 8, 15, [8, 7, 8, 7, 8, 7, 8, 7, 8, 7]),
    "before a step that is chosen": (15, 8, 15, [8, 7]),
}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("when", KILLS)
def test_unlearning_resumed_from_a_checkpoint_equals_uninterrupted_unlearning_bit_for_bit(
    model, query, tmp_path, monkeypatch, when, num_threads
):
    draws_a_step, checkpoint_draws, killed_after, progress = KILLS[when]
    settings = {
        **SETTINGS,
        "draws_a_step": draws_a_step,
        **({"rate": None, "steps": 1} if "chosen" in when else {}),
    }
    expected = unlearn(model, *query, **settings)
    assert all(delta.abs().max() > 0 for delta in expected.values())
    monkeypatch.setattr(newton, "CHECKPOINT_DRAWS", checkpoint_draws)
    path, counts = tmp_path / "weight_change.safetensors", []

    def stop(count):
        counts.append(count)
        if sum(counts) == killed_after:
            raise KeyboardInterrupt

    with threads(num_threads):
        with pytest.raises(KeyboardInterrupt):
            unlearn(
                model, *query, **settings, checkpoint_path=path, identity={"a": 1}, progress=stop
            )
        assert len(list(tmp_path.iterdir())) == 1
        resumed = []
        found = unlearn(
            model,
            *query,
            **settings,
            checkpoint_path=path,
            identity={"a": 1},
            progress=resumed.append,
        )
    assert resumed == progress  # what the last checkpoint had, then the rest
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())
    newton.remove_checkpoints(path)
    assert not list(tmp_path.iterdir())


def test_every_newton_step_has_draws_of_its_own(model, query):
    parameters, latent, conditioning, draws, fisher = query
    found = unlearn(model, *query, **{**SETTINGS, "steps": 2})
    originals = {name: value.detach().clone() for name, value in parameters.items()}
    with replaced_weights(model.denoiser, originals):
        for first_draw in 0, 6:
            newton_step(
                parameters,
                newton.query_gradient(
                    model, parameters, latent, conditioning, draws, first_draw, 6, 4
                ),
                fisher,
                0.5,
            )
        expected = {name: value.detach() - originals[name] for name, value in parameters.items()}
    assert all(torch.equal(found[name], delta) for name, delta in expected.items())


def test_a_rate_of_zero_changes_no_weight(model, query):
    assert not any(
        delta.any() for delta in unlearn(model, *query, **{**SETTINGS, "rate": 0.0}).values()
    )


def test_a_checkpoint_that_does_not_fit_is_told_and_not_gone_on_with(model, query, tmp_path):
    path = tmp_path / "weight_change.safetensors"
    write_tensor_chunk(
        Path(f"{path}.{digest({'a': 1})[:16]}.checkpoint"), {"draws": torch.tensor(-5)}
    )
    with pytest.raises(UserError, match="is not a checkpoint of this unlearning; remove it"):
        unlearn(model, *query, **SETTINGS, checkpoint_path=path, identity={"a": 1})


def test_a_checkpoint_of_other_settings_is_not_resumed(model, query, tmp_path, monkeypatch):
    monkeypatch.setattr(newton, "CHECKPOINT_DRAWS", 6)
    path, started = tmp_path / "weight_change.safetensors", []
    unlearn(model, *query, **SETTINGS, checkpoint_path=path, identity={"a": 1})
    unlearn(
        model, *query, **SETTINGS, checkpoint_path=path, identity={"a": 2}, progress=started.append
    )
    assert started[0] == 0


# --- a query's draws


def draw(first, count, seed=3, query="query", grid=1000):
    return QueryDraws(seed, "abc", query, grid).draw(first, count, (4, 2, 2), "cpu")


@pytest.mark.parametrize("first, count", [(0, 1), (1, 1), (7, 1), (2, 6), (3, 6), (11, 9)])
def test_a_draw_is_keyed_by_its_own_number_however_it_is_asked_for(first, count):
    together, found = draw(0, 20), draw(first, count)
    for all_draws, some in zip(together, found):
        assert torch.equal(some, all_draws[first : first + count])


def test_two_draws_of_a_pair_are_opposite_and_pairs_are_not():
    normals, timesteps = draw(0, 400)
    assert torch.equal(normals[1::2], -normals[::2]) and torch.equal(
        timesteps[1::2], timesteps[::2]
    )
    assert len({row.numpy().tobytes() for row in normals}) == 400
    assert normals.dtype == torch.float32 and abs(float(normals[::2].std()) - 1) < 0.05


@pytest.mark.parametrize("change", [{"seed": 4}, {"query": "another"}])
def test_draws_belong_to_the_seed_and_the_query(change):
    for own, other in zip(draw(0, 40), draw(0, 40, **change)):
        assert not torch.equal(own, other)


@pytest.mark.parametrize("num_pairs", [5, 50, 500])
@pytest.mark.parametrize("first", [0, 1000, 2**40])
def test_timesteps_of_every_run_of_draws_are_spread_over_the_whole_grid(first, num_pairs):
    """No gap between neighbours on the circle is three times the mean one; a random run of 500 has
    one of seven times."""
    grid = 10**6
    timesteps = np.sort(draw(first, 2 * num_pairs, grid=grid)[1][::2].numpy())
    assert 0 <= timesteps[0] and timesteps[-1] < grid
    assert np.diff(timesteps, append=timesteps[0] + grid).max() < 3 * grid / num_pairs


def test_each_draw_by_itself_falls_on_every_timestep_alike():
    """So that the mean over draws is that over all timesteps: over a thousand seeds, thirty in each
    of ten parts of the grid are three standard deviations."""
    for number in 0, 5:
        timesteps = [int(draw(number, 1, seed=seed)[1]) for seed in range(1000)]
        assert np.abs(np.bincount(np.array(timesteps) // 100, minlength=10) - 100).max() < 30


# --- its gradient


def norm(gradients):
    return torch.cat([value.flatten() for value in gradients.values()]).norm()


def relative_difference(found, expected):
    return norm({name: found[name] - value for name, value in expected.items()}) / norm(expected)


def gradient_of(model, query, num_draws=23, pass_size=5, parameters=None):
    selected, latent, conditioning, draws, _ = query
    return newton.query_gradient(
        model, parameters or selected, latent, conditioning, draws, 3, num_draws, pass_size
    )


@pytest.mark.parametrize("selection, of_text", [("cross-attn-kv", True), ("attn", False)])
def test_the_gradient_is_that_of_the_mean_loss_of_its_draws_in_float64(
    model, double_model, query, selection, of_text
):
    parameters, exact = (
        select_parameters(each.denoiser, selection) for each in (model, double_model)
    )
    _, latent, conditioning, draws, _ = query
    assert (
        newton.QueryGradient(model, parameters, latent, conditioning, draws, 5).of_text == of_text
    )
    normals, timesteps = draws.draw(3, 8, latent.shape, "cpu")
    with tracked(exact):
        losses = sample_losses(
            double_model,
            latent.double().expand_as(normals),
            normals.double(),
            timesteps,
            map_tensors(doubled, conditioning),
        )
        expected = dict(zip(exact, torch.autograd.grad(losses.mean(), list(exact.values()))))
    with tracked(parameters):
        found = gradient_of(model, query, 8, 5, parameters)
    assert found.keys() == expected.keys() and all(
        parameter.grad is None for parameter in parameters.values()
    )
    assert relative_difference(found, expected) < 5e-6


@pytest.mark.parametrize("pass_size", [1, 2, 8, 23, 1000])
def test_the_gradient_does_not_depend_on_the_size_of_a_pass(model, query, pass_size):
    assert (
        relative_difference(
            gradient_of(model, query, pass_size=pass_size), gradient_of(model, query)
        )
        < 1e-6
    )


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("selection", ["cross-attn-kv", "attn"])
def test_the_gradient_does_not_depend_on_the_number_of_threads_in_any_bit(
    model, query, selection, num_threads
):
    parameters = select_parameters(model.denoiser, selection)
    with tracked(parameters):
        expected = gradient_of(model, query, parameters=parameters)
        for _ in range(3):
            with threads(num_threads):
                found = gradient_of(model, query, parameters=parameters)
            assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_accumulated_steps_are_one_larger_step(model, query):
    """The gradient is a mean over all draws: their number, not their grouping, scales it."""
    parameters, latent, conditioning, draws, _ = query
    halves = [
        newton.query_gradient(model, parameters, latent, conditioning, draws, first, 4, 4)
        for first in (0, 4)
    ]
    whole = newton.query_gradient(model, parameters, latent, conditioning, draws, 0, 8, 4)
    for name, value in whole.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_passes_that_fill_the_memory_are_halved_and_give_the_same_gradient(
    model, query, monkeypatch, caplog, num_threads
):
    expected, text_gradients, sizes = gradient_of(model, query), newton.text_gradients, []

    def limited(model, latents, *samples):
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return text_gradients(model, latents, *samples)

    monkeypatch.setattr(newton, "text_gradients", limited)
    with threads(num_threads):
        found = gradient_of(model, query, pass_size=16)
    assert relative_difference(found, expected) < 1e-6
    assert (
        max(sizes) > 3
        and set(sizes[-4:]) <= {1, 2}
        and "out of memory: going on with 2 draws in one pass" in caplog.text
    )


def test_memory_that_a_single_draw_fills_is_an_error(model, query, monkeypatch):
    def full(*samples):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(newton, "text_gradients", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        gradient_of(model, query)


def test_the_published_programs_batches_are_drawn_in_order_and_whole(model, query):
    """Its generator gives other numbers for other batches; those of a native pass on a CPU would be
    cut."""
    parameters, latent, conditioning, _, _ = query
    gradient = newton.QueryGradient(
        model, parameters, latent, conditioning, PublishedDraws(0, 1000, "cpu"), 100
    )
    computed = []
    gradient.differentiate = lambda *samples: computed.append(samples) or {}
    with threads(2):
        gradient.add(gradient.zeros(), 0, 300)
    generator = PublishedDraws(0, 1000, "cpu")
    for found in computed:
        assert all(map(torch.equal, found, generator.draw(None, 100, latent.shape, "cpu")))
    assert len(computed) == 3


# --- weights come back exactly


@pytest.fixture
def untouched():
    """A pipeline of its own; afterwards every weight of its denoiser must be what it was."""
    model = load_model(SD_TINY, "cpu")
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    yield model
    after = model.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(
        parameter.requires_grad or parameter.grad is not None
        for parameter in model.denoiser.parameters()
    )


def changes_of(model):
    # 1e8 and 1e-3: adding and then subtracting them again would not give the same bits back
    return {
        name: torch.full_like(value, 1e8 if number % 2 else 1e-3)
        for number, (name, value) in enumerate(
            select_parameters(model.denoiser, "cross-attn-kv").items()
        )
    }


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("change", ["customized", "changed_weights", "replaced_weights", "nested"])
def test_weights_are_restored_exactly_even_after_an_error(untouched, change, error):
    before = {name: value.clone() for name, value in untouched.denoiser.state_dict().items()}
    contexts = {
        "customized": lambda: customized(untouched, ABC / "models/tiny/blob"),
        "changed_weights": lambda: changed_weights(untouched.denoiser, changes_of(untouched)),
        "replaced_weights": lambda: replaced_weights(untouched.denoiser, changes_of(untouched)),
    }

    def change_and_fail():
        with contexts["customized" if change == "nested" else change]():
            with (
                contexts["changed_weights"]()
                if change == "nested"
                else contexts["replaced_weights"]()
            ):
                assert any(
                    not torch.equal(value, before[name])
                    for name, value in untouched.denoiser.state_dict().items()
                )
                if error:
                    raise error

    if error:
        with pytest.raises(error):
            change_and_fail()
    else:
        change_and_fail()


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_restored_exactly_after_unlearning_even_after_an_error(
    untouched, training_set, fails
):
    parameters = select_parameters(untouched.denoiser, "cross-attn-kv")
    fisher = DiagonalFisher({name: torch.ones_like(value) for name, value in parameters.items()})
    arguments = (
        untouched,
        parameters,
        *first_image(training_set),
        QueryDraws(0, "abc", "query", 1000),
        fisher,
    )

    def fail(count):
        if fails and count:
            raise RuntimeError("killed")

    if fails:
        with pytest.raises(RuntimeError, match="killed"):
            unlearn(*arguments, **SETTINGS, progress=fail)
    else:
        unlearn(*arguments, **SETTINGS)


# --- through the scripts


@pytest.fixture
def unlearned(flags, tmp_path):
    """Runs both scripts on two images and returns the arrays of the first query's influence.npz and
    its weight change."""

    def run(*more):
        compute_training_loss.main([*flags, "--laion_subset_size", "2", "--time_samples", "2"])
        compute_influence.main(
            [
                *flags,
                "--laion_subset_size",
                "2",
                "--loss_time_samples",
                "2",
                "--unlearn_batch_size",
                "4",
                "--unlearn_grad_accum_steps",
                "2",
                *more,
            ]
        )
        folder = tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png"
        return np.load(folder / "influence.npz"), read_tensors(folder / "weight_change.safetensors")

    return run


@pytest.mark.parametrize(
    "rate, steps",
    [("0", "2"), ("1e-30", "2"), ("100", "0")],
    ids=["rate 0", "a rate below rounding", "no steps"],
)
def test_steps_of_no_size_and_no_steps_change_no_weight_and_no_loss(unlearned, rate, steps):
    influence, change = unlearned("--unlearn_lr", rate, "--unlearn_steps", steps)
    assert len(change) == KV and not any(delta.any() for delta in change.values())
    assert influence["influence"].shape == (7,) and not influence["influence"].any()
    assert (
        influence["query_loss_after"] == influence["query_loss_before"]
        and influence["relative_weight_change"] == 0
    )


@pytest.mark.parametrize(
    "moved, before, after, words",
    [
        (0.0049, 1, 2, ["less than 0.5 %"]),
        (0.151, 1, 2, ["more than 15 %"]),
        (0.005, 1, 2, []),
        (0.15, 1, 2, []),
        (0.04, 1, 1.00002, []),
        (0.04, 1, 1.000009, ["did not rise"]),
        (0.04, 1, 0.9, ["did not rise"]),
        (1e-4, 0.1758, 0.1758, ["less than", "did not rise (0.1758 to 0.1758)"]),
        (float("nan"),) * 3 + ([],),
    ],
)
def test_a_step_too_small_or_too_large_and_a_query_that_was_not_unlearned_are_warned_of(
    moved, before, after, words
):
    found = find_warnings(moved, before, after)
    assert len(found) == len(words) and all(map(str.__contains__, found, words))


@pytest.mark.parametrize(
    "rate, words", [("1e-9", "less than 0.5 %"), ("1e9", "more than 15 %"), ("auto", None)]
)
def test_a_warning_stands_wherever_the_result_does(unlearned, tmp_path, capsys, rate, words):
    steps = {"1e9": "2"}.get(rate, "1")  # the first one alone may lower the query's own loss
    influence, _ = unlearned("--unlearn_lr", rate, "--unlearn_steps", steps)
    folder = tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png"
    rows = list(csv.DictReader((folder / "influence.csv").open(encoding="utf-8-sig")))
    record = json.loads((folder / "influence.json").read_text())["circumstances"]["warnings"]
    screen = capsys.readouterr().out
    assert influence["warnings"].tolist() == record
    with Image.open(folder / "visualization.jpg") as picture:
        red = (
            np.abs(np.asarray(picture, int)[-60:] - EXEMPLAR_RED).max(axis=2) < 60
        ).sum()  # below the frames
    if words:
        assert words in record[0] and all(row["warning"] == "; ".join(record) for row in rows)
        assert screen.count(f"Warning: {record[0]}.") == 2 and red > 500  # two queries
    else:
        assert not record and "warning" not in rows[0] and "Warning" not in screen and red == 0


def test_a_folder_of_ones_own_pictures_gets_a_ranking_without_a_flag(root, tmp_path, capsys):
    """The first thing that anyone tries: pictures, captions and one made picture; what the model
    is, and nothing else."""
    (root / "json/test_artchive.json").unlink()
    task = {"synth_image_path": "synth/tiny/gpt/blob/samples/00000.png", "prompt": "a red blob"}
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    flags = [
        "--task_json",
        str(tmp_path / "tasks.json"),
        "--dataroot",
        str(root),
        "--sd_version",
        SD_TINY,
        "--device",
        "cpu",
        "--result_dir",
        str(tmp_path / "results"),
        *(["--laion_subset_size", "4"]),
    ]
    compute_training_loss.main(flags)
    compute_influence.main(flags)
    influence = np.load(
        tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png/influence.npz"
    )
    assert (
        influence["relative_weight_change"] == pytest.approx(0.04, rel=1e-3)
        and not influence["warnings"].size
    )
    assert (
        influence["query_loss_after"] > influence["query_loss_before"]
        and "Warning" not in capsys.readouterr().out
    )


def test_unlearning_raises_the_querys_own_loss(unlearned):
    influence, change = unlearned("--unlearn_lr", "100", "--unlearn_steps", "2")
    assert influence["query_loss_after"] > influence["query_loss_before"] * 1.001
    assert all(delta.any() for delta in change.values())


def test_the_step_that_was_chosen_is_written_wherever_the_result_is(unlearned, tmp_path, capsys):
    auto = ["--unlearn_lr", "auto", "--unlearn_steps", "1", "--num_train", "60"]
    influence, change = unlearned(*auto)
    assert influence["relative_weight_change"] == pytest.approx(0.04, rel=1e-4)
    folder = tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png"
    made, shown = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("weight_change", "influence")
    )
    assert (made["identity"]["unlearn_lr"], made["identity"]["target_change"]) == ("auto", 0.04)
    assert (
        shown["identity"]["settings"]["unlearn_lr"],
        shown["identity"]["settings"]["target_change"],
    ) == ("auto", 0.04)
    rate = made["circumstances"]["alpha_over_N"]
    assert (
        rate > 0
        and influence["alpha_over_N"] == rate
        and influence["alpha"] == rate * 60 == made["circumstances"]["alpha"]
    )
    assert shown["circumstances"]["alpha_over_N"] == rate
    assert (
        f"alpha {rate * 60:.3g}, alpha / N {rate:.3g} (chosen by --unlearn_lr auto)"
        in capsys.readouterr().out
    )
    again, same = unlearned(*auto)  # the weight change is kept, and with it its record
    assert again["alpha_over_N"] == rate and all(
        torch.equal(same[name], delta) for name, delta in change.items()
    )
    given, _ = unlearned(
        "--unlearn_lr", repr(rate * 60), "--unlearn_steps", "1", "--num_train", "60", "--overwrite"
    )
    np.testing.assert_allclose(given["influence"], influence["influence"], rtol=1e-6)


def test_a_weight_change_of_the_former_draws_is_refused(unlearned, tmp_path):
    unlearned("--unlearn_steps", "1")
    path = tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png/weight_change.json"
    record = json.loads(path.read_text())
    assert record["identity"].pop("draws") == "stratified-antithetic"
    path.write_text(json.dumps(record))
    with pytest.raises(
        UserError, match="made with other settings: draws is None, expected 'stratified-antithetic'"
    ):
        unlearned("--unlearn_steps", "1")
