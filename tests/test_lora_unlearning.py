"""A LoRA's own matrices are what is unlearned: their gradients are exact, their curvature is fitted,
and the scripts unlearn and score them, resume, and tell models with and without it apart."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import PARITY
from safetensors.torch import save_file
from test_lora import ATTENTION, CONVOLUTIONS, LINEAR, TINY, kohya_names, make_pairs

import compute_influence
import compute_training_loss
import unlearn
from unlearn.attribution.curvature import DiagonalFisher, per_sample_gradients
from unlearn.attribution.draws import QueryDraws
from unlearn.attribution.losses import sample_losses
from unlearn.attribution.newton import QueryGradient, choose_rate, newton_step, query_gradient
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.commands import advice
from unlearn.commands import fisher as fisher_command
from unlearn.datasets.conditioning import map_tensors
from unlearn.errors import UserError
from unlearn.models import passes
from unlearn.models.lora import acting
from unlearn.models.pipelines import changed_weights, load_model, select_parameters, tracked
from unlearn.storage.reading import read_tensors

# attention, both layers of a feed-forward (which takes a batch in blocks) and of the timestep
LAYERS = [*LINEAR, f"{ATTENTION}.ff.net.0.proj", "mid_block.resnets.0.time_emb_proj"]
QUERY = "synth/tiny/gpt/blob/samples/00000.png"


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Two LoRA files: of linear layers alone, and of convolutions too."""
    folder = tmp_path_factory.mktemp("loras")
    for name, layers in ("linear", LAYERS), ("all", LAYERS + CONVOLUTIONS):
        tensors = kohya_names("unet", make_pairs(model.denoiser, layers), alpha=1.5)
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def tuned(files):
    """The miniature pipeline with the LoRA of linear layers."""
    return load_model(TINY, "cpu", lora=[str(files / "linear.safetensors")])


def draw(model, count, seed=0):
    """Latents, noise, timesteps and conditioning of some samples, 16 x 16."""
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, count, *model.latent_shape(128), generator=generator)
    timesteps = torch.randint(1000, (count,), generator=generator)
    embeddings = torch.randn(count, *model.embedding_shape, generator=generator)
    return latents, noise, timesteps, {"embeddings": embeddings}


@pytest.mark.parametrize("name", ["linear", "all"])
def test_gradients_of_the_matrices_equal_finite_differences_in_float64(files, monkeypatch, name):
    monkeypatch.setattr(passes, "BLOCK_ROWS", 128)  # two samples of a feed-forward at once
    model = load_model(TINY, "cpu", lora=[str(files / f"{name}.safetensors")])
    model.pipeline.unet.double()
    model = dataclasses.replace(model, levels=model.levels.double())
    samples = map_tensors(
        lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, draw(model, 7)
    )
    parameters = select_parameters(model.denoiser, "lora")
    with tracked(parameters):
        found = dict(per_sample_gradients(model, parameters, samples))
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        assert parameter.grad is None
    for parameter_name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        rises = []
        for step in (1e-5, -1e-5):
            with changed_weights(model.denoiser, {parameter_name: step * direction}):
                rises.append(sample_losses(model, *samples).detach())
        expected = (rises[0] - rises[1]) / 2e-5
        dots = (found[parameter_name] * direction).flatten(1).sum(dim=1)
        torch.testing.assert_close(dots, expected, rtol=1e-5, atol=1e-9)


def test_no_gradient_depends_on_the_batch(tuned):
    parameters = select_parameters(tuned.denoiser, "lora")
    samples = draw(tuned, 9)
    with tracked(parameters):
        together = dict(per_sample_gradients(tuned, parameters, samples))
        one = map_tensors(lambda tensor: tensor[4:5], samples)
        alone = dict(per_sample_gradients(tuned, parameters, one))
    for name, value in together.items():
        difference = torch.linalg.norm(value[4] - alone[name][0])
        assert difference <= 1e-5 * torch.linalg.norm(value[4]), name


def test_a_querys_gradient_does_not_depend_on_the_size_of_a_pass(tuned):
    parameters = select_parameters(tuned.denoiser, "lora")
    latents, _, _, texts = draw(tuned, 1)
    draws = QueryDraws(0, "own", "query", 1000)
    with tracked(parameters):
        one, many = (
            query_gradient(tuned, parameters, latents[0], texts, draws, 0, 12, size)
            for size in (1, 12)
        )
    for name, value in one.items():
        assert torch.linalg.norm(value - many[name]) <= 1e-5 * torch.linalg.norm(value)


def test_features_of_removal_are_gradients_of_the_matrices(tuned, training_set):
    settings = RemovalSettings("lora", (350,), sketch_size=64, probes=1)
    images = training_set.first(2)
    maker = FeatureMaker(tuned, images.latents.shape[2:], settings)
    assert maker.parameters.keys() == select_parameters(tuned.denoiser, "lora").keys()
    features = maker.make(images, [0, 1])
    assert features.shape == (2, 1, 1, 64) and np.abs(features).max() > 0


def rescaled(tuned, factor):
    """The same LoRA with A times a factor and B divided by it."""
    return {
        name: value.detach() * (factor if ".lora_A." in name else 1 / factor)
        for name, value in select_parameters(tuned.denoiser, "lora").items()
    }


def test_the_chosen_step_is_the_same_however_a_and_b_share_their_norm(tuned):
    """Gradients of A are divided by what A is multiplied by, their squares by its square."""
    generator = torch.Generator().manual_seed(2)
    weights = rescaled(tuned, 1.0)
    gradients = {
        name: torch.randn(value.shape, generator=generator) for name, value in weights.items()
    }
    changes = []
    for factor in (1.0, 8.0):
        parameters = {
            name: torch.nn.Parameter(value) for name, value in rescaled(tuned, factor).items()
        }
        share = {name: factor if ".lora_A." in name else 1 / factor for name in parameters}
        fisher = DiagonalFisher(
            {name: torch.full(value.shape, share[name] ** -2) for name, value in gradients.items()},
            damping=0.1,
        )
        scaled = {name: value / share[name] for name, value in gradients.items()}
        before = {name: value.detach().clone() for name, value in parameters.items()}
        newton_step(parameters, scaled, fisher, None, lambda p, c: acting(tuned.denoiser, p, c))
        changes.append(
            {
                name: (value.detach() - before[name]) / share[name]
                for name, value in parameters.items()
            }
        )
    for name, value in changes[0].items():
        torch.testing.assert_close(changes[1][name], value, rtol=1e-4, atol=1e-8)


def test_how_far_a_lora_moves_is_that_of_its_product_with_its_scale(tuned):
    parameters = rescaled(tuned, 1.0)
    generator = torch.Generator().manual_seed(3)
    change = {
        name: 0.01 * torch.randn(value.shape, generator=generator)
        for name, value in parameters.items()
    }
    weights, changes = acting(tuned.denoiser, parameters, change)
    for layer in LAYERS:
        (down, up), (down_change, up_change) = (
            [tensors[f"{layer}.lora_{letter}.lora0.weight"].double() for letter in "AB"]
            for tensors in (parameters, change)
        )
        key, scale = f"{layer}.lora_A.lora0.weight", 1.5 / 2
        expected = torch.linalg.norm(scale * up @ down)
        torch.testing.assert_close(torch.linalg.norm(weights[key]), expected)
        expected = torch.linalg.norm(scale * (up @ down_change + up_change @ down))
        torch.testing.assert_close(torch.linalg.norm(changes[key]), expected)
    assert choose_rate(weights, changes) > 0
    plain = {"weight": torch.ones(3)}
    assert acting(tuned.denoiser, plain, plain) == (plain, plain)


def test_all_gradients_of_a_query_are_asked_of_the_matrices(tuned):
    parameters = select_parameters(tuned.denoiser, "lora")
    latents, _, _, texts = draw(tuned, 1)
    draws = QueryDraws(0, "own", "query", 1000)
    gradient = QueryGradient(tuned, parameters, latents[0], texts, draws, 4)
    assert not gradient.of_text
    with tracked(parameters):
        found = query_gradient(tuned, parameters, latents[0], texts, draws, 0, 4, 4)
    assert all(float(value.abs().max()) > 0 for value in found.values())


# --- the scripts


@pytest.fixture(scope="module")
def world(files, tmp_path_factory):
    """A data root of one's own whose model is a base with a LoRA, and what both scripts made."""
    folder = tmp_path_factory.mktemp("world")
    root = shutil.copytree(PARITY / "fixture/abc", folder / "root")
    for name in "sd_fisher.pt", "sd_fisher.json":
        (root / name).unlink(missing_ok=True)
    shutil.copy(files / "linear.safetensors", root / "tuned.safetensors")
    settings = {"name": "mine", "pipeline": TINY, "lora": ["tuned.safetensors:0.8"]}
    settings |= {"time_samples": 2, "unlearn_grad_accum_steps": 2, "largest_subset": 8}
    (root / "dataset.json").write_text(json.dumps(settings))
    task = {"synth_image_path": QUERY, "prompt": "a blob on a table"}
    (folder / "tasks.json").write_text(json.dumps([task]))
    fisher_command.main(["--dataroot", str(root), "--device", "cpu", "--num_samples", "20"])
    flags = ["--task_json", str(folder / "tasks.json"), "--dataroot", str(root)]
    flags += ["--device", "cpu"]
    run(flags, folder / "results")
    return root, flags, folder / "results"


def run(flags, results, *more):
    """Both scripts."""
    compute_training_loss.main([*flags, "--result_dir", str(results)])
    compute_influence.main([*flags, "--result_dir", str(results), *more])


def read_result(results):
    """Arrays of the one result, its weight change and its record."""
    [path] = results.rglob("influence.npz")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    change = read_tensors(path.parent / "weight_change.safetensors")
    return arrays, change, json.loads((path.parent / "weight_change.json").read_text())


def test_the_scripts_unlearn_a_loras_matrices_by_default(world):
    _, _, results = world
    arrays, change, record = read_result(results)
    assert len(change) == 2 * len(LAYERS) and all(".lora_" in name for name in change)
    assert record["identity"]["weight_selection"] == "lora"
    assert record["identity"]["lora"][0][1] == 0.8
    assert len(arrays["ids"]) == 8 and np.ptp(arrays["influence"]) > 0
    assert 0.03 < float(arrays["relative_weight_change"]) < 0.05


def test_the_same_command_goes_on_to_the_same_bits(world, tmp_path):
    """Of a run that was killed after unlearning, or before it."""
    _, flags, results = world
    arrays, change, _ = read_result(results)
    again = shutil.copytree(results, tmp_path / "results")
    [folder] = [path.parent for path in again.rglob("influence.npz")]
    for path in folder.glob("*loss*"):
        path.unlink()
    for path in folder.glob("influence*"):
        path.unlink()
    run(flags, again)
    found, same_change, _ = read_result(again)
    np.testing.assert_array_equal(found["influence"], arrays["influence"])
    assert all(torch.equal(same_change[name], value) for name, value in change.items())


def test_scores_do_not_depend_on_batches(world, tmp_path):
    _, flags, results = world
    arrays, _, _ = read_result(results)
    shutil.copytree(results / "orig_loss", tmp_path / "results/orig_loss")
    compute_influence.main(
        [*flags, "--result_dir", str(tmp_path / "results"), "--loss_batch_size", "3"]
    )
    found, _, _ = read_result(tmp_path / "results")
    # losses of about 1 are kept in float32, their differences to 1e-7
    np.testing.assert_allclose(found["influence"], arrays["influence"], rtol=0, atol=4e-7)


def test_what_was_made_with_the_lora_is_not_used_without_it(world, tmp_path):
    root, flags, results = world
    bare = shutil.copytree(root, tmp_path / "bare")
    settings = json.loads((bare / "dataset.json").read_text())
    (bare / "dataset.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "lora"})
    )
    flags = [str(bare) if flag == str(root) else flag for flag in flags]
    with pytest.raises(UserError, match="weights of the model.*tuned.safetensors:0.8"):
        compute_training_loss.main([*flags, "--result_dir", str(results)])
    other = [*flags, "--lora", f"{root}/tuned.safetensors:0.5", "--result_dir", str(results)]
    with pytest.raises(UserError, match="LoRA, or its weight"):
        compute_training_loss.main(other)


def test_with_keys_and_values_selected_the_lora_is_fused(world, tmp_path):
    root, flags, results = world
    fisher = ["--fisher_path", str(tmp_path / "kv.safetensors")]
    kv = ["--weight_selection", "cross-attn-kv"]
    fisher_command.main(
        ["--dataroot", str(root), "--device", "cpu", "--num_samples", "20", *kv]
        + ["--output", fisher[1]]
    )
    shutil.copytree(results / "orig_loss", tmp_path / "results/orig_loss")
    compute_influence.main([*flags, "--result_dir", str(tmp_path / "results"), *kv, *fisher])
    _, change, record = read_result(tmp_path / "results")
    assert change.keys() == select_parameters(load_model(TINY, "cpu").denoiser, kv[1]).keys()
    assert record["identity"]["lora"] == read_result(results)[2]["identity"]["lora"]


def test_the_interface_gives_the_scripts_scores(world):
    root, _, results = world
    model = unlearn.load_model(root, device="cpu")
    images = unlearn.open_training_set(root, model, 8)
    fisher = unlearn.load_fisher(root / "sd_fisher.safetensors", model)
    query = unlearn.encode_query(model, root / QUERY, "a blob on a table")
    before = unlearn.compute_losses(model, images)
    delta = unlearn.unlearn(model, query, fisher, draws=32)
    ranking = unlearn.rank(images, unlearn.compute_losses(model, images, delta=delta) - before)
    arrays, _, _ = read_result(results)
    np.testing.assert_array_equal(ranking.scores, arrays["influence"])


def test_a_customized_model_and_a_lora_are_not_mixed(world, tmp_path):
    root, flags, _ = world
    with pytest.raises(UserError, match="give one of the two"):
        compute_training_loss.main(
            ["--task_json", str(PARITY / "fixture/tasks.json"), *flags[2:]]
            + ["--result_dir", str(tmp_path)]
        )


@pytest.mark.parametrize("given", ["lora", "cross-attn-kv"])
def test_commands_in_messages_carry_the_lora_and_what_is_unlearned_of_it(world, given):
    root, flags, _ = world
    lora = ["--lora", f"{root}/tuned.safetensors:0.5"]
    args = compute_influence.parse_arguments([*flags, *lora, "--weight_selection", given])
    for command in (advice.fisher_command(args), advice.influence_command(args)):
        words = shlex.split(command)
        assert words[words.index("--lora") + 1] == lora[1]
        selected = words[words.index("--weight_selection") + 1] if given != "lora" else "lora"
        assert selected == given and ("--weight_selection" in words) == (given != "lora")
    # the data root's own is no flag
    assert "--lora" not in advice.fisher_command(compute_influence.parse_arguments(flags))
