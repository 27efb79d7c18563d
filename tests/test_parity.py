"""`--compat abu` reproduces the published program's numbers, and adopts its caches only where they
are its own."""

import shutil

import numpy as np
import pytest
import torch
from conftest import PARITY
from safetensors.torch import load_file

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution.influence import best_view

EXPECTED = PARITY / "expected"
QUERIES = ["00000.png", "00001.png"]
COMPAT = ["--compat", "abu", "--laion_subset_size", "60", "--vae_batch_size", "4"]
LOSS = [*COMPAT, "--batch_size", "40", "--time_samples", "10"]
INFLUENCE = [
    *COMPAT,
    "--seed",
    "0",
    "--loss_batch_size",
    "40",
    "--loss_time_samples",
    "10",
    "--unlearn_lr",
    "100",
    "--unlearn_steps",
    "2",
    "--unlearn_batch_size",
    "16",
    "--unlearn_grad_accum_steps",
    "8",
]


def put_published_losses(results):
    """The published program's own losses, which have no record, in a result folder. Returns where
    they are."""
    folder = results / "orig_loss/tiny/blob"
    folder.mkdir(parents=True)
    for name in "exemplar", "laion":
        shutil.copy(EXPECTED / f"{name}_loss.npy", folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(result folder of compute_training_loss.py, that of compute_influence.py, which began with
    the published losses), both with --compat abu and run as the published program was."""
    folder = tmp_path_factory.mktemp("parity")
    root = shutil.copytree(PARITY / "fixture/abc", folder / "abc")
    flags = [
        "--task_json",
        str(PARITY / "fixture/tasks.json"),
        "--dataroot",
        str(root),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--device",
        "cpu",
    ]
    put_published_losses(folder / "influence")
    compute_training_loss.main([*flags, *LOSS, "--result_dir", str(folder / "losses")])
    compute_influence.main(
        [
            *flags,
            *INFLUENCE,
            "--result_dir",
            str(folder / "influence"),
            "--fisher_path",
            str(root / "sd_fisher.pt"),
        ]
    )
    return folder / "losses", folder / "influence"


@pytest.fixture
def published(folders):
    """Result folder of compute_influence.py."""
    return folders[1]


@pytest.fixture
def adopted(tmp_path):
    """Published losses where the scripts of this test look for them."""
    return put_published_losses(tmp_path / "results")


def query_folder(results, query):
    return results / "influence/tiny/gpt/blob/samples" / query


@pytest.mark.parametrize("name", ["exemplar", "laion"])
def test_losses_before_unlearning_equal_the_published_ones_to_1e_5(folders, name):
    expected = np.load(EXPECTED / f"{name}_loss.npy")
    found = np.load(folders[0] / f"orig_loss/tiny/blob/{name}_loss.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("number, query", list(enumerate(QUERIES)))
def test_weight_changes_equal_the_published_ones_to_1e_4_of_their_norm(published, number, query):
    expected = load_file(EXPECTED / f"query{number}/weight_change.safetensors")
    found = load_file(query_folder(published, query) / "weight_change.safetensors")
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.linalg.norm(found[name] - change) <= 1e-4 * torch.linalg.norm(change), name


@pytest.mark.parametrize("name", ["exemplar", "laion"])
@pytest.mark.parametrize("number, query", list(enumerate(QUERIES)))
def test_losses_after_unlearning_equal_the_published_ones_to_1e_5(published, number, query, name):
    expected = np.load(EXPECTED / f"query{number}/{name}_loss.npy")
    found = np.load(query_folder(published, query) / f"{name}_loss.npy")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("number, query", list(enumerate(QUERIES)))
def test_influence_equals_the_published_one_to_a_hundredth_of_its_deviation(
    published, number, query
):
    expected = np.load(EXPECTED / f"query{number}/influence.npy")
    found = np.load(query_folder(published, query) / "influence.npz")
    assert [id.split("/")[0] for id in found["ids"]] == ["exemplar"] * 5 + ["laion"] * 60
    np.testing.assert_array_equal(found["is_exemplar"], np.arange(65) < 5)
    np.testing.assert_allclose(found["influence"], expected, rtol=0, atol=1e-2 * expected.std())


def test_the_tolerance_tells_the_two_queries_apart():
    """Else equality with the published numbers would say nothing of which query was unlearned."""
    first, second = (np.load(EXPECTED / f"query{number}/influence.npy") for number in range(2))
    assert np.abs(first - second).max() > 1e-1 * first.std()


def test_influence_is_the_larger_rise_of_the_two_views(published):
    for query in QUERIES:
        changes = [
            best_view(
                np.load(query_folder(published, query) / f"{name}_loss.npy").astype(np.float64)
                - np.load(published / f"orig_loss/tiny/blob/{name}_loss.npy")
            )
            for name in ("exemplar", "laion")
        ]
        np.testing.assert_array_equal(
            np.load(query_folder(published, query) / "influence.npz")["influence"],
            np.concatenate(changes),
        )


def test_losses_without_record_are_adopted_with_compat_as_they_are(published):
    for name in "exemplar", "laion":
        path = published / f"orig_loss/tiny/blob/{name}_loss.npy"
        assert path.with_suffix(".json").exists()
        np.testing.assert_array_equal(np.load(path), np.load(EXPECTED / f"{name}_loss.npy"))


def test_losses_without_record_are_refused_without_compat(adopted, flags):
    with pytest.raises(UserError, match=r"_loss\.npy: has no record \(\w+_loss\.json\)"):
        compute_influence.main(
            [*flags, "--laion_subset_size", "60", "--loss_batch_size", "40", "--unlearn_steps", "0"]
        )
    assert not list(adopted.glob("*.json"))


@pytest.mark.parametrize(
    "rows", [slice(None), slice(0, 1), slice(-1, None)], ids=["all", "the first", "the last"]
)
def test_losses_without_record_that_are_off_by_a_thousandth_are_refused(adopted, flags, rows):
    losses = np.load(adopted / "laion_loss.npy")
    losses[rows] *= 1.001
    np.save(adopted / "laion_loss.npy", losses)
    with pytest.raises(
        UserError,
        match=r"laion_loss\.npy: has no record, and its rows \d+ to \d+ scored again differ by "
        r"1\.0e-03",
    ):
        compute_influence.main([*flags, *INFLUENCE, "--unlearn_steps", "0"])
    assert not (adopted / "laion_loss.json").exists()


def test_the_training_set_s_published_losses_are_adopted_while_the_exemplars_are_scored_anew(
    adopted, flags
):
    """Published exemplars' losses come from latents drawn at random: only they must be made again,
    not those of 100,000 images."""
    (adopted / "exemplar_loss.npy").unlink()
    before = (adopted / "laion_loss.npy").stat().st_mtime_ns
    compute_training_loss.main([*flags, *LOSS])
    assert (adopted / "laion_loss.npy").stat().st_mtime_ns == before and (
        adopted / "laion_loss.json"
    ).exists()
    np.testing.assert_allclose(
        np.load(adopted / "exemplar_loss.npy"),
        np.load(EXPECTED / "exemplar_loss.npy"),
        rtol=1e-5,
        atol=0,
    )
