"""What must hold on a CUDA device. Run with  bash tests/run.sh -m gpu  on a machine that has
one."""

import shutil

import numpy as np
import pytest
import torch
from conftest import PARITY
from tiny_families import PIPELINES, make_pipeline

import compute_influence
import compute_training_loss
import unlearn
from unlearn.attribution import estimation
from unlearn.attribution.influence import rank_images
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.datasets.conditioning import TEXT
from unlearn.datasets.training_sets import TrainingSet
from unlearn.models.generation import generate_latents, initial_noise
from unlearn.models.pipelines import load_model
from unlearn.retraining.batches import random_members
from unlearn.retraining.recipes import Recipe
from unlearn.retraining.training import train
from unlearn.runtime.programs import run_within_memory, set_precision

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


@pytest.fixture(autouse=True)
def full_precision():
    """No TensorFloat-32, as in a run."""
    set_precision("fp32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a family's tiny pipeline; each is written once."""
    made = {}

    def save(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_pipeline(family).save_pretrained(made[family])
        return made[family]

    return save


def sample_of(model, number=0):
    """A picture of noise and a caption, as the model encodes them: latent [C, h, w], conditioning."""
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
    with model.encoding():
        texts = model.encode_prompts(["a small red house by the sea"])
        latents = model.encode_pixels(pixels)
    texts |= model.encode_sizes([(16, 16)], 16) if model.of_sizes else {}
    return latents[0], texts


def features_of(model, latent, texts):
    """Two timesteps' features by removal, of all weights, [timesteps, probes, sketch_size]."""
    extras = {name: value[:, None].numpy() for name, value in texts.items() if name != TEXT}
    stacked, embeddings = latent[None, None].numpy(), texts[TEXT][:, None].numpy()
    images = TrainingSet("own", ["0"], ["x"], [None], stacked, embeddings, extras=extras)
    settings = RemovalSettings(
        "cross-attn-kv" if model.weights != "fp32" else "all", (100, 350), 2, 512
    )
    return FeatureMaker(model, latent.shape, settings).make(images, [0])[0]


def predict(model, latent, texts):
    """A prediction of a sample, [1, C, h, w], on the CPU."""
    noisy, timesteps = latent[None].to(model.device), torch.tensor([350], device=model.device)
    there = {name: value.to(model.device) for name, value in texts.items()}
    with torch.no_grad():
        return model.predict(noisy, timesteps, there).cpu()


def apart(first, second):
    """How far two arrays are apart, of the second's norm."""
    first, second = (np.asarray(each, np.float64) for each in (first, second))
    return np.linalg.norm(first - second) / np.linalg.norm(second)


FAMILIES = [name for name in PIPELINES if "-" not in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_predicts_and_differentiates_on_cuda_as_on_the_cpu(family, saved):
    models = [load_model(saved(family), device) for device in ("cpu", "cuda")]
    (cpu_latent, cpu_texts), (latent, texts) = map(sample_of, models)
    assert apart(latent, cpu_latent) < 1e-4 and texts.keys() == cpu_texts.keys()
    assert all(apart(texts[name], cpu_texts[name]) < 1e-4 for name in texts if texts[name].any())
    assert models[1].denoiser.device.type == "cuda", "back from where it waited"
    assert models[1].pipeline.vae.device.type == "cpu", "makes room for the denoiser"
    cpu, cuda, again = (features_of(model, cpu_latent, cpu_texts) for model in (*models, models[1]))
    assert apart(cuda, cpu) < 1e-4 and apart(again, cuda) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_bfloat16_is_as_near_its_float32_on_cuda_as_on_the_cpu(family, saved):
    full, half, there = (
        load_model(saved(family), device, weights=kind)
        for device, kind in (("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "bf16"))
    )
    latent, texts = sample_of(full)
    exact, on_cpu, on_cuda = (predict(model, latent, texts) for model in (full, half, there))
    assert 0 < apart(on_cuda, exact) < 2 * apart(on_cpu, exact)
    assert np.isfinite(features_of(there, latent, texts)).all()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_gradient_checkpointing_on_cuda_gives_the_same_features(family, saved):
    model = load_model(saved(family), "cuda")
    sample = sample_of(model)
    kept = features_of(model, *sample)
    assert model.save_memory()
    assert apart(features_of(model, *sample), kept) < 1e-5


def test_where_the_memory_of_the_device_is_full_a_sweep_goes_on_in_smaller_passes(flags, tmp_path):
    """By a limit on what torch may take, of which a real allocation fails."""
    model = load_model(str(PARITY / "fixture/sd-tiny"), "cuda")
    taken, free = [], lambda: torch.cuda.mem_get_info()[0]

    def work(size):
        taken.append(size)
        return torch.empty(size, free() // 4, dtype=torch.uint8, device=model.device).shape[0]

    assert run_within_memory(work, 32, "samples") == (2, 2) and taken == [32, 16, 8, 4, 2]


@pytest.mark.parametrize("scoring", ["removal", "exact", "output"])
def test_one_command_on_cuda_ranks_as_on_the_cpu(scoring, tmp_path, monkeypatch):
    monkeypatch.setattr(estimation, "FEWEST_SAMPLES", 40)
    source, folder = PARITY / "fixture/abc", tmp_path / "mine"
    folder.mkdir()
    captions = (source / "laion_subset/captions.txt").read_text().splitlines()
    for path, caption in zip(sorted((source / "laion_subset/images").iterdir()), captions):
        shutil.copy(path, folder)
        (folder / path.name).with_suffix(".txt").write_text(caption)
    query = source / "synth/tiny/gpt/blob/samples/00000.png"
    cpu, cuda = (
        unlearn.attribute(
            query,
            str(PARITY / "fixture/sd-tiny"),
            folder,
            prompt="a blob on a table",
            out=tmp_path / device,
            device=device,
            scoring=scoring,
        )[0]
        for device in ("cpu", "cuda")
    )
    ranks = [np.argsort(np.argsort(np.asarray(answer.scores))) for answer in (cpu, cuda)]
    assert np.corrcoef(*ranks)[0, 1] > 0.999
