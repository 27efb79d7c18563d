"""What must hold on a CUDA device. Run with  bash tests/run.sh -m gpu  on a machine that has
one."""

import numpy as np
import pytest
import torch
from conftest import PARITY

import compute_influence
import compute_training_loss
from unlearn.attribution.influence import rank_images
from unlearn.models.generation import generate_latents, initial_noise
from unlearn.models.pipelines import load_model
from unlearn.retraining.batches import random_members
from unlearn.retraining.recipes import Recipe
from unlearn.retraining.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
UNLEARNING = ["--unlearn_lr", "100", "--unlearn_steps", "2", "--unlearn_grad_accum_steps", "8"]


def attribute(flags, results, device):
    """Both scripts on one device: losses before unlearning and the first query's influence."""
    flags = [*flags, "--result_dir", str(results / device), "--device", device]
    compute_training_loss.main(flags)
    compute_influence.main([*flags, *UNLEARNING])
    with np.load(
        results / device / "influence/tiny/gpt/blob/samples/00000.png/influence.npz"
    ) as file:
        return np.load(results / device / "orig_loss/tiny/blob/laion_loss.npy"), file["influence"]


def test_losses_and_rankings_on_cuda_are_those_of_the_cpu(flags, tmp_path):
    (cpu_losses, cpu_influence), (cuda_losses, cuda_influence) = (
        attribute(flags, tmp_path, device) for device in ("cpu", "cuda")
    )
    np.testing.assert_allclose(cuda_losses, cpu_losses, rtol=1e-6)
    ranks = [np.argsort(rank_images(influence)) for influence in (cpu_influence, cuda_influence)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9999  # Spearman


def test_two_runs_on_cuda_give_the_same_bits(flags, tmp_path):
    (first_losses, first), (second_losses, second) = (
        attribute(flags, tmp_path / name, "cuda") for name in ("first", "second")
    )
    np.testing.assert_array_equal(first_losses, second_losses)
    np.testing.assert_array_equal(first, second)


def test_a_batch_too_large_for_the_device_names_the_flag(flags, monkeypatch):
    def predict(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    from unlearn.models.pipelines import Model
    from unlearn.runtime.programs import run

    monkeypatch.setattr(Model, "predict", predict)
    with pytest.raises(SystemExit) as end:
        run(compute_training_loss.main, [*flags, "--device", "cuda"])
    assert end.value.code == 2


RECIPE = Recipe(epochs=2, rate=1e-3, batch_size=16, schedule="linear", seed=0, mixed_precision="no")


def distance(first, second):
    return sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5


@pytest.fixture
def cuda_model():
    return load_model(str(PARITY / "fixture/sd-tiny"), "cuda")


def test_models_trained_on_cuda_alone_or_stacked_are_those_of_the_cpu(
    model, cuda_model, training_set
):
    images = training_set.first(40)
    members = np.stack([random_members(40, 20, number, "abc") for number in range(3)])
    stacked = train(cuda_model, images, members, RECIPE)
    for row, weights in enumerate(stacked):
        alone, on_cpu = (
            train(each, images, members[row : row + 1], RECIPE)[0] for each in (cuda_model, model)
        )
        apart = distance(on_cpu, stacked[row - 1])
        assert distance(alone, on_cpu) < 0.05 * apart and distance(weights, on_cpu) < 0.05 * apart


def test_training_on_cuda_twice_gives_the_same_bits(cuda_model, training_set):
    first, second = (
        train(cuda_model, training_set.first(40), np.ones((2, 40), bool), RECIPE)[1]
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pictures_made_on_cuda_are_those_of_the_cpu(model, cuda_model, training_set):
    start = torch.from_numpy(initial_noise("abc", [0, 1], model.latent_shape(512)))
    embeddings = torch.from_numpy(np.array(training_set.embeddings[:2, 0], np.float32))
    cpu, cuda = (
        generate_latents(
            each, {"embeddings": embeddings.to(each.device)}, start.to(each.device), 10
        ).cpu()
        for each in (model, cuda_model)
    )
    np.testing.assert_allclose(cuda, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scoring", ["midpoint", "gradient"])
def test_derivatives_on_cuda_rank_as_on_the_cpu_and_bfloat16_nearly_so(flags, tmp_path, scoring):
    influences = []
    for device, precision in ("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"):
        results = tmp_path / device / precision
        compute_influence.main(
            [
                *flags,
                "--result_dir",
                str(results),
                "--device",
                device,
                "--scoring",
                scoring,
                "--precision",
                precision,
                "--unlearn_lr",
                "0.00001",
                "--num_train",
                "60",
                "--unlearn_steps",
                "1",
                "--damping",
                "0.1",
            ]
        )
        with np.load(results / "influence/tiny/gpt/blob/samples/00000.png/influence.npz") as file:
            influences.append(np.argsort(rank_images(file["influence"])))
    assert (
        np.corrcoef(influences[0], influences[1])[0, 1] > 0.999
        and np.corrcoef(influences[0], influences[2])[0, 1] > 0.98
    )
