"""Fixtures that the tests share: the miniature data root of tests/parity and a model of its
pipeline."""

import shutil
from pathlib import Path

import pytest
import torch

from unlearn.attribution import removal
from unlearn.commands.flags import resolve
from unlearn.datasets import queries
from unlearn.datasets.training_sets import open_training_set
from unlearn.models.pipelines import load_model
from unlearn.storage.hashes import hash_file

PARITY = Path(__file__).parent / "parity"

# Files of a few tests that take a minute or wait: begun last, they would keep one process long after the others are done.
LONG = (
    "test_faults",
    "test_slurm",
    "test_launch",
    "test_install",
    "test_house_rules",
    "test_resume",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread: these models are too small for two, and results must not depend on the machine's
    load."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def few_draws():
    """`attribute` by removal of two draws and one probe: what is tested does not depend on it."""
    removal.USUAL = removal.RemovalSettings(timesteps=(350, 350), probes=1)


@pytest.fixture(scope="session", autouse=True)
def latents_encoded_once():
    """Pictures of queries and exemplars are encoded once by each VAE in a process of the tests: at
    512 pixels that would be a quarter of every run of a script on the miniature."""
    encode, known = queries.encode_images, {}

    def encode_once(model, paths, resolution, mirrored=False, batch_size=20):
        pictures = [hash_file(path) for path in paths if Path(path).is_file()]
        how = model.weights_hash, str(model.pipeline.vae.config), model.device
        key = (*how, *pictures, len(paths), resolution, mirrored, batch_size)
        if key not in known:
            known[key] = encode(model, paths, resolution, mirrored, batch_size)
        return known[key].clone()

    queries.encode_images = encode_once
    yield
    queries.encode_images = encode


def resolved(args):
    """Flags with their defaults."""
    resolve(args)
    return args


@pytest.fixture
def root(tmp_path):
    """A private copy of the miniature AbC data root."""
    return Path(shutil.copytree(PARITY / "fixture/abc", tmp_path / "abc"))


@pytest.fixture
def flags(root, tmp_path):
    """Flags that both scripts need to run on the miniature data root."""
    return [
        "--task_json",
        str(PARITY / "fixture/tasks.json"),
        "--dataroot",
        str(root),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--result_dir",
        str(tmp_path / "results"),
        "--device",
        "cpu",
    ]


@pytest.fixture(scope="session")
def model():
    """The miniature pipeline, loaded once."""
    return load_model(str(PARITY / "fixture/sd-tiny"), "cpu")


@pytest.fixture(autouse=True)
def memory_not_short(request):
    """What a test of a full memory turned on in the model that tests share is off for the next."""
    found = request.getfixturevalue("model") if "model" in request.fixturenames else None
    yield
    if getattr(found, "is_saving_memory", False):
        found.denoiser.disable_gradient_checkpointing()


@pytest.fixture(scope="session")
def training_set(model):
    """The sixty images of the miniature data root."""
    return open_training_set(
        PARITY / "fixture/abc", "abc", model.latent_shape(512), model.conditioning_shapes
    )
