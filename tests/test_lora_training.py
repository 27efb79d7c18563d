"""LoRA trained by `retrain`: it starts as the base model, changes its matrices alone, and its file is
one that diffusers and this program load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import PARITY
from diffusers import DiffusionPipeline
from test_lora import TINY, predict
from test_training import RECIPE, distance, members_without, same
from tiny_families import make_pipeline, make_root

from unlearn.commands import fisher, retrain
from unlearn.datasets.queries import encode_query
from unlearn.datasets.tasks import load_tasks
from unlearn.errors import UserError
from unlearn.models.lora import has_matrices
from unlearn.models.lora_files import read_lora
from unlearn.models.lora_names import Named
from unlearn.models.pipelines import load_model
from unlearn.noise import timestep_grid
from unlearn.report.ranking import name_images
from unlearn.retraining.lora import first_matrices, list_targets, read_matrices, with_fresh_lora
from unlearn.retraining.measures import join_sets, query_losses
from unlearn.retraining.plans import PlanSettings, make_plans
from unlearn.retraining.sets import read_sets
from unlearn.retraining.training import train
from unlearn.storage.reading import read_tensors

LORA = replace(RECIPE, rate=1e-2, lora_rank=2, lora_alpha=4.0, lora_targets="linear")


@pytest.fixture(scope="module")
def images(training_set):
    return training_set.first(12)


@pytest.fixture(scope="module")
def fresh():
    """The miniature pipeline with a LoRA that changes nothing yet."""
    return with_fresh_lora(load_model(TINY, "cpu"), 2, 4.0, "linear")


@pytest.fixture(scope="module")
def trained(fresh, images):
    """The matrices of a LoRA trained on all images."""
    return train(fresh, images, members_without(12), LORA)[0]


def test_a_fresh_lora_changes_nothing(model, fresh):
    torch.testing.assert_close(predict(fresh)[0], predict(model)[0], rtol=1e-6, atol=1e-7)
    assert has_matrices(fresh.denoiser)


def test_layers_are_those_that_diffusers_or_kohya_choose(model):
    attention, linear = (list_targets(model.denoiser, name) for name in ("attention", "linear"))
    assert len(attention) == 4 * 2 * 4 and attention.keys() < linear.keys()
    assert len(linear) == 4 * (8 + 2 + 2)


def test_training_moves_the_matrices_alone(fresh, trained, images):
    first = first_matrices(fresh.denoiser, 2, "linear", 0)
    assert trained.keys() == first.keys() and distance(trained, first) > 1e-3
    assert all(
        float(value.abs().max()) > 0 for name, value in trained.items() if ".lora_B." in name
    )


def test_another_seed_starts_from_other_matrices_and_the_same_one_from_the_same(fresh):
    first, again, other = (first_matrices(fresh.denoiser, 2, "linear", seed) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)


def test_a_killed_training_goes_on_to_the_same_bits(fresh, trained, images, tmp_path):
    class Killed(Exception):
        pass

    seen = []

    def kill(count):
        seen.append(count)
        if sum(seen) == 3:  # in the second epoch of two steps
            raise Killed

    path = tmp_path / "x.checkpoint"
    with pytest.raises(Killed):
        train(fresh, images, members_without(12), LORA, path, kill)
    assert path.exists()
    assert same(train(fresh, images, members_without(12), LORA, path)[0], trained)


def test_a_lora_without_an_image_is_the_same_alone_or_stacked(fresh, images):
    members = np.concatenate([members_without(12, 3), members_without(12, 0, 7)])
    together = train(fresh, images, members, LORA)
    for row, stacked in enumerate(together):
        alone = train(fresh, images, members[row : row + 1], LORA)[0]
        for name, value in alone.items():
            torch.testing.assert_close(stacked[name], value, rtol=1e-4, atol=1e-6)


def test_the_identity_of_models_without_a_lora_is_as_before(model, fresh, images):
    names = {"lora_rank", "lora_alpha", "lora_targets"}
    assert not names & RECIPE.identity(model, images).keys()
    identity = LORA.identity(fresh, images)
    assert names <= identity.keys()
    other = replace(LORA, seed=1).identity(fresh, images)
    assert identity["initial_weights"] != other["initial_weights"]


def test_retrain_writes_a_lora_that_diffusers_and_this_program_load(tmp_path):
    flags = ["full", "--dataroot", str(PARITY / "fixture/abc"), "--sd_version", TINY]
    flags += ["--device", "cpu", "--laion_subset_size", "12", "--result_dir", str(tmp_path)]
    flags += ["--train_lora_rank", "2", "--train_lora_alpha", "4", "--train_epochs", "1"]
    retrain.main([*flags, "--train_batch_size", "6", "--train_lr", "1e-2"])
    folder = tmp_path / "retrain/full-seed0"
    path = folder / "model.safetensors"
    record = json.loads((folder / "model.json").read_text())["identity"]
    assert (record["lora_rank"], record["lora_alpha"]) == (2, 4.0)
    assert all(name.startswith("unet.") for name in read_tensors(path))
    assert {pair.scale for pair in read_lora(Named(path, 1.0)).pairs.values()} == {2.0}
    ours = load_model(TINY, "cpu", lora=[str(folder)])
    matrices = read_matrices(path)
    parameters = dict(ours.denoiser.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in matrices.items())
    pipeline = DiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.load_lora_weights(folder, weight_name="model.safetensors")
    expected, text = predict(ours)
    noisy = torch.randn(2, *ours.latent_shape(64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = pipeline.unet(noisy, torch.tensor([10, 700]), text.expand(2, -1, -1)).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    files = sorted(folder.iterdir())
    retrain.main([*flags, "--train_batch_size", "6", "--train_lr", "1e-2"])  # keeps what is there
    assert sorted(folder.iterdir()) == files


def bf16_flags(folder, *more):
    flags = ["full", "--device", "cpu", "--result_dir", str(folder), "--train_lora_rank", "2"]
    flags += ["--train_epochs", "1", "--train_batch_size", "6", "--train_lr", "1e-2"]
    return [*flags, "--weights", "bf16", *more]


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_the_command_measures_a_lora_beside_weights_in_bfloat16_as_its_file_is_loaded(
    family, tmp_path
):
    pipeline = tmp_path / "pipeline"
    make_pipeline(family).save_pretrained(pipeline)
    root = make_root(tmp_path / "root", pipeline)
    flags = ["--dataroot", str(root), "--task_json", str(root / "tasks.json"), "--no_pictures"]
    flags = bf16_flags(tmp_path / "out", *flags, "--loss_time_samples", "2")
    retrain.main(flags)
    folder = tmp_path / "out/retrain/full-seed0"
    assert {value.dtype for value in read_tensors(folder / "model.safetensors").values()} == {
        torch.float32
    }
    record = json.loads((folder / "model.json").read_text())["identity"]
    assert record["weights_precision"] == "bf16"
    model = load_model(pipeline, "cpu", lora=[str(folder)], weights="bf16")
    queries = [encode_query(model, *load_tasks(root / "tasks.json", root), root)]
    grid = timestep_grid(2, model.num_train_timesteps, "")
    measured = json.loads((tmp_path / "out/retrained/full-seed0.json").read_text())["losses"]
    losses = query_losses(model, join_sets(queries), grid, 0, 10)
    assert list(measured.values()) == pytest.approx(losses, rel=1e-6)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    retrain.main(flags)  # keeps what is there
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files


def test_a_lora_trained_beside_weights_of_another_precision_is_refused(fresh, images, tmp_path):
    flags = ["--dataroot", str(PARITY / "fixture/abc"), "--sd_version", TINY]
    flags = bf16_flags(tmp_path, *flags, "--laion_subset_size", "12")
    retrain.main(flags)
    said = (
        "full-seed0/model.safetensors: made with other settings: weights_precision is 'bf16', exp"
    )
    with pytest.raises(UserError, match=said):
        retrain.main([*flags, "--weights", "fp32"])
    half = with_fresh_lora(load_model(TINY, "cpu", weights="bf16"), 2, 4.0, "linear")
    assert LORA.identity(half, images)["weights_precision"] == "bf16"
    assert "weights_precision" not in LORA.identity(fresh, images)  # as before there was a choice


@pytest.mark.parametrize("said_by", ["flag", "root"])
def test_where_all_weights_are_trained_none_can_be_in_bfloat16(said_by, tmp_path):
    settings = {"weights": "bf16"} if said_by == "root" else {}
    root = make_root(tmp_path / "root", TINY, **settings)
    flags = [
        "full",
        "--dataroot",
        str(root),
        "--device",
        "cpu",
        "--result_dir",
        str(tmp_path / "x"),
    ]
    flags += ["--weights", "bf16"] if said_by == "flag" else []
    said = "--weights bf16, or dataset.json's: without --train_lora_rank all weights are trained"
    with pytest.raises(UserError, match=said):
        retrain.main(flags)
    assert not (tmp_path / "x").exists()


def test_each_image_is_left_out_once(training_set):
    plans = make_plans(PlanSettings("each"), training_set.first(5))
    assert [plan.name for plan in plans] == [f"without-{row:04d}" for row in range(5)]
    np.testing.assert_array_equal(
        np.stack([plan.members for plan in plans]), ~np.eye(5, dtype=bool)
    )
    with pytest.raises(UserError, match="fewer than the 1 training images"):
        make_plans(PlanSettings("each"), training_set.first(1))


def test_sets_of_images_are_left_out_by_their_files_or_ids(training_set, tmp_path):
    few = training_set.first(5)
    files = name_images(few.ids, few.paths, np.zeros(5, bool))
    path = tmp_path / "sets.json"
    path.write_text(json.dumps({"a": [files[1], few.ids[3]], "b": [files[0]]}))
    plans = make_plans(PlanSettings("sets", sets=read_sets(path)), few)
    assert [plan.name for plan in plans] == ["set-a", "set-b"]
    assert [np.flatnonzero(~plan.members).tolist() for plan in plans] == [[1, 3], [0]]
    for sets, said in [
        ({"a": ["none.png"]}, "set a: none.png: none of the 5 training images"),
        ({"a": []}, "set a: images left out: 0: expected 1 to 4"),
        ({"a": files}, "set a: images left out: 5: expected 1 to 4"),
        ({"a b": files}, "a b: a set's name has letters"),
        ({"a": "000.png"}, "found a without a list of names"),
        ([files], "found another form"),
    ]:
        path.write_text(json.dumps(sets))
        with pytest.raises(UserError, match=said):
            make_plans(PlanSettings("sets", sets=read_sets(path)), few)


def test_retrain_does_not_need_the_lora_that_it_is_to_train(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    settings = {"lora": ["lora.safetensors"], "train_lora_rank": 2, "pipeline": TINY}
    (root / "dataset.json").write_text(json.dumps(settings))
    args, _ = retrain.parse_arguments(["full", "--dataroot", str(root), "--device", "cpu"])
    assert args.lora == [] and args.train_lora_rank == 2
    with pytest.raises(UserError, match="lora.safetensors: no such file"):
        fisher.parse_arguments(["--dataroot", str(root)])
