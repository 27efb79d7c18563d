"""`generate` and `retrain` as commands: queries of a model trained from scratch, and models without
some of its images."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import PARITY
from diffusers import AutoencoderKL
from test_bad_input import files, refused

from unlearn.commands import generate, retrain
from unlearn.datasets.tasks import load_tasks
from unlearn.datasets.training_sets import open_training_set
from unlearn.errors import UserError
from unlearn.evaluation.score_files import write_scores
from unlearn.evaluation.scores import MethodScores
from unlearn.models import generation
from unlearn.retraining import models, plans, rankings
from unlearn.storage.artifacts import write_json
from unlearn.storage.hashes import hash_file
from unlearn.storage.reading import read_json, read_tensors
from unlearn.storage.records import record_path, write_record

TINY = PARITY / "fixture/sd-tiny"
RECIPE = {"train_epochs": 1, "train_lr": 1e-3, "train_batch_size": 20, "train_schedule": "linear"}
QUICK = ["--loss_time_samples", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data root with a UNet to be trained, its trained model, and two queries that the model
    made."""
    folder = tmp_path_factory.mktemp("world")
    root = Path(shutil.copytree(PARITY / "fixture/abc", folder / "root"))
    shutil.copytree(TINY / "unet", root / "unet", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(TINY / "scheduler/scheduler_config.json", root / "unet")
    write_json(
        root / "dataset.json", {"pipeline": str(TINY), "unet": "unet", "num_train": 60, **RECIPE}
    )
    flags = ["--dataroot", str(root), "--device", "cpu", "--result_dir", str(folder / "results")]
    retrain.main(["full", *flags])
    shutil.copy(folder / "results/retrain/full-seed0/model.safetensors", root / "unet")
    (folder / "prompts.txt").write_text("a red ball\n\na blue ball\n")
    make = [
        "--prompts",
        str(folder / "prompts.txt"),
        "--task_json",
        str(folder / "tasks.json"),
        "--dataroot",
        str(root),
        "--device",
        "cpu",
    ]
    generate.main([*make, "--num_inference_steps", "2"])
    training_set = open_training_set(root, "abc", (4, 16, 16), {"embeddings": (77, 32)})
    write_influence(
        folder / "results/influence",
        [f"laion/{row:06d}" for row in range(60)],
        training_set.identity,
    )
    return folder


@pytest.fixture
def place(world, tmp_path):
    """A private copy of the results, with flags that use it."""
    shutil.copytree(world / "results", tmp_path / "results")
    return [
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
        "--result_dir",
        str(tmp_path / "results"),
    ]


def write_influence(folder, ids, training_set):
    """Influence files of both queries: the first one's most influential image is number 5, the
    second one's number 6."""
    for query, first in ("queries/00000", 5), ("queries/00001", 6):
        rank = np.array([first, *(row for row in range(len(ids)) if row != first)])
        influence = np.empty(len(ids))
        influence[rank] = np.linspace(1, 0, len(ids))
        (folder / query).mkdir(parents=True)
        np.savez(
            folder / query / "influence.npz",
            ids=np.array(ids),
            influence=influence,
            rank=rank,
            is_exemplar=np.zeros(len(ids), bool),
        )
        write_record(folder / query / "influence.npz", {"candidates": [training_set]})


def measures(folder, name):
    return json.loads((folder / f"results/retrained/{name}.json").read_text())


def test_generated_queries_are_the_same_in_any_batch(world, tmp_path):
    make = [
        "--prompts",
        str(world / "prompts.txt"),
        "--task_json",
        str(tmp_path / "tasks.json"),
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
        "--num_inference_steps",
        "2",
        "--batch_size",
        "1",
        "--name",
        "single",
    ]
    generate.main(make)
    one, many = (
        np.load(world / f"root/synth/{name}/latents.npy") for name in ("single", "queries")
    )
    np.testing.assert_allclose(one, many, rtol=1e-4, atol=1e-5)
    shutil.rmtree(world / "root/synth/single")


def test_a_task_file_of_generated_queries_says_prompt_and_seed(world):
    first, second = json.loads((world / "tasks.json").read_text())
    assert (first["prompt"], first["seed"], second["prompt"], second["seed"]) == (
        "a red ball",
        0,
        "a blue ball",
        1,
    )
    assert (world / "root" / second["synth_image_path"]).exists()


def test_generate_keeps_what_is_there_and_refuses_other_settings(world, capsys):
    make = [
        "--prompts",
        str(world / "prompts.txt"),
        "--task_json",
        str(world / "tasks.json"),
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
        "--num_inference_steps",
    ]
    before = files(world / "root/synth")
    generate.main([*make, "2"])
    said = refused(capsys, generate.main, [*make, "3"])
    assert (
        "num_inference_steps is 2, expected 3" in said
        and "--overwrite" in said
        and files(world / "root/synth") == before
    )


def schedule(world, folder, **values):
    """A copy of the root whose schedule has these values, and flags that generate there."""
    root = Path(
        shutil.copytree(world / "root", folder / "root", ignore=shutil.ignore_patterns("synth"))
    )
    config = json.loads((root / "unet/scheduler_config.json").read_text())
    write_json(root / "unet/scheduler_config.json", {**config, **values})
    return root, [
        "--prompts",
        str(world / "prompts.txt"),
        "--task_json",
        str(folder / "t.json"),
        "--dataroot",
        str(root),
        "--device",
        "cpu",
        "--num_inference_steps",
        "2",
    ]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_noise_alone_and_a_model_that_predicts_it_are_refused_before_anything_is_written(
    spacing, world, tmp_path, capsys
):
    root, make = schedule(world, tmp_path, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    assert (
        "rescale_betas_zero_snr" in (said := refused(capsys, generate.main, make))
        and "v_prediction" in said
    )
    assert not (root / "synth").exists() and not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_schedule_that_ends_in_noise_alone_is_fine_where_the_sample_is_predicted(
    prediction, world, tmp_path
):
    root, make = schedule(
        world,
        tmp_path,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    generate.main(make)
    assert np.isfinite(np.load(root / "synth/queries/latents.npy")).all()


@pytest.mark.parametrize("where", ["latents", "pixels"])
def test_a_picture_that_is_not_finite_is_never_saved(where, world, tmp_path, capsys, monkeypatch):
    root, make = schedule(world, tmp_path)
    if where == "latents":
        monkeypatch.setattr(
            generation,
            "initial_noise",
            lambda dataset_id, seeds, shape: np.full((len(seeds), *shape), np.nan, np.float32),
        )
    else:
        decode = AutoencoderKL.decode
        monkeypatch.setattr(
            AutoencoderKL,
            "decode",
            lambda self, latents: SimpleNamespace(sample=decode(self, latents).sample * np.inf),
        )
    assert (
        f"2 of 2 pictures have NaN or infinite {where}"
        in refused(capsys, generate.main, make)[-300:]
    )
    assert not (root / "synth").exists() and not (tmp_path / "t.json").exists()


def test_stored_queries_that_are_not_finite_are_made_again_by_the_command_that_is_advised(
    world, tmp_path
):
    root, make = schedule(world, tmp_path)
    generate.main(make)
    path = root / "synth/queries/latents.npy"
    expected, record = np.load(path), read_json(record_path(path))
    np.save(path, np.full_like(expected, np.nan))  # as an earlier version saved them, with a record
    write_json(record_path(path), {**record, "content": hash_file(path)})
    generate.main(make)
    np.testing.assert_array_equal(np.load(path), expected)


def test_measures_that_are_not_finite_are_never_saved(world, place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "query_losses", lambda *how: np.array([0.1, np.nan]))
    said = refused(
        capsys,
        retrain.main,
        ["full", *place, *QUICK, "--task_json", str(world / "tasks.json"), "--no_pictures"],
    )
    assert (
        "full-seed0: losses of 1 queries are NaN or infinite" in said
        and not (tmp_path / "results/retrained").exists()
    )


def test_the_model_that_made_the_queries_makes_them_again(world, place, tmp_path):
    retrain.main(["full", *place, *QUICK, "--task_json", str(world / "tasks.json")])
    found = measures(tmp_path, "full-seed0")
    assert found["kind"] == "full" and set(found["losses"]) == {"queries/00000", "queries/00001"}
    assert max(found["mse"].values()) < 1e-6 and min(found["similarity"].values()) > 0.9999


def test_models_without_images_are_measured_beside_the_full_one(world, place, tmp_path):
    flags = [*place, *QUICK, "--task_json", str(world / "tasks.json")]
    retrain.main(
        [
            "without",
            *flags,
            "--top_k",
            "1",
            "20",
            "--influence",
            str(tmp_path / "results/influence"),
            "--num_queries",
            "1",
        ]
    )
    retrain.main(["subsets", *flags, "--count", "2", "--stack", "2"])
    retrain.main(["random", *flags, "--top_k", "20"])
    retrain.main(["full", *flags, "--seeds", "0", "1"])
    names = {path.stem for path in (tmp_path / "results/retrained").iterdir()}
    assert names == {
        "full-seed0",
        "full-seed1",
        "half-000",
        "half-001",
        "random-k20-000",
        "without-ours-queries-00000-k1",
        "without-ours-queries-00000-k20",
    }
    identities = [measures(tmp_path, name)["identity"] for name in names]
    assert len({identity["recipe"] for identity in identities}) == 1
    assert (
        len({identity["members"] for identity in identities}) == 6
    )  # both seeds of the full model saw all images
    losses = [tuple(measures(tmp_path, name)["losses"].values()) for name in names]
    assert len(set(losses)) == 7


def test_the_images_left_out_are_the_top_of_the_influence_file(world, place, tmp_path):
    retrain.main(
        [
            "without",
            *place,
            *QUICK,
            "--no_pictures",
            "--task_json",
            str(world / "tasks.json"),
            "--top_k",
            "1",
            "--influence",
            str(tmp_path / "results/influence"),
        ]
    )
    import base64

    for query, image in ("queries/00000", 5), ("queries/00001", 6):
        found = measures(tmp_path, f"without-ours-{query.replace('/', '-')}-k1")
        kept = np.unpackbits(
            np.frombuffer(base64.b64decode(found["identity"]["members"]), np.uint8), count=60
        )
        assert np.flatnonzero(kept == 0).tolist() == [image] and found["removed"] == {
            "method": "ours",
            "query": query,
            "k": 1,
        }


def test_score_files_and_influence_files_leave_the_same_images_out(world):
    training_set = open_training_set(world / "root", "abc", (4, 16, 16), {"embeddings": (77, 32)})
    tasks = load_tasks(world / "tasks.json", world / "root")
    made = [world / "results/influence"]
    ranked = list(rankings.read_rankings(made, tasks, training_set, "", lambda *_: ""))
    scores = MethodScores(
        "mine",
        training_set.identity,
        training_set.ids,
        np.stack([ranking.scores for ranking in ranked]).astype(np.float32),
        {},
        {tasks[1].query_name: ["moved too little"]},
    )
    folder = world / "scores"
    write_scores(folder, scores, [task.query_name for task in tasks])
    scored = list(rankings.read_scored(folder, ["mine"], tasks, training_set, ""))
    assert [ranking.query for ranking in scored] == [ranking.query for ranking in ranked]
    for one, other in zip(scored, ranked):
        np.testing.assert_array_equal(one.order, other.order)
    assert [ranking.warnings for ranking in scored] == [[], ["moved too little"]]
    with pytest.raises(UserError, match="--methods other: .* has no scores of it; it has: mine"):
        next(rankings.read_scored(folder, ["other"], tasks, training_set, ""))
    with pytest.raises(UserError, match="scores other training images, 60, than the 30 of ROOT"):
        next(rankings.read_scored(folder, [], tasks, training_set.take(range(30)), "ROOT"))


def test_finished_models_are_neither_trained_nor_measured_again(
    world, place, tmp_path, monkeypatch
):
    flags = ["subsets", *place, *QUICK, "--task_json", str(world / "tasks.json"), "--count", "1"]
    retrain.main(flags)
    before = files(tmp_path)
    monkeypatch.setattr(models, "train", lambda *arguments: pytest.fail("was trained again"))
    monkeypatch.setattr(
        models, "query_losses", lambda *arguments: pytest.fail("was measured again")
    )
    retrain.main(flags)
    assert files(tmp_path) == before


def test_a_killed_retraining_leaves_the_bits_of_an_uninterrupted_one(world, place, tmp_path):
    """The process is killed after its first checkpoint, and once more; the third start finishes."""
    command = [
        sys.executable,
        "-m",
        "unlearn",
        "subsets",
        *place,
        "--count",
        "2",
        "--stack",
        "2",
        "--train_epochs",
        "4",
    ]
    command.insert(3, "retrain")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    checkpoints = lambda: {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "results/retrain").glob(".half-000-*.checkpoint")
    }
    for _ in range(2):
        seen = checkpoints()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while checkpoints() == seen and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert checkpoints() and not (tmp_path / "results/retrain/half-000").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert not checkpoints()
    other = [*place[:-1], str(tmp_path / "whole")]
    retrain.main(["subsets", *other, "--count", "2", "--stack", "2", "--train_epochs", "4"])
    for name in "half-000", "half-001":
        whole, resumed = (
            read_tensors(tmp_path / f"{folder}/retrain/{name}/model.safetensors")
            for folder in ("whole", "results")
        )
        assert all((whole[key] == resumed[key]).all() for key in whole)


def bad(world, tmp_path, *flags, kind="without"):
    """A command that trains without images, with other flags."""
    return [
        kind,
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
        "--result_dir",
        str(tmp_path / "results"),
        "--task_json",
        str(world / "tasks.json"),
        *flags,
    ]


@pytest.mark.parametrize(
    "kind, flags, said",
    [
        (
            "random",
            ["--top_k", "60"],
            "--top_k 60: expected 1 to 59, fewer than the 60 training images",
        ),
        ("random", ["--top_k", "0"], "--top_k 0: expected 1 to 59"),
        ("random", [], "retrain random: needs --top_k"),
        ("without", ["--top_k", "3"], "retrain without: needs --influence, folders of"),
        ("full", ["--methods", "vae"], "--methods: means nothing without --scores"),
        (
            "without",
            ["--top_k", "3", "--scores", "x", "--chosen_sets"],
            "--chosen_sets: needs --influence, the results of removal",
        ),
        (
            "without",
            ["--top_k", "3", "--influence", "nowhere"],
            "--influence nowhere: no such folder",
        ),
        ("subsets", ["--fraction", "0.001"], "--fraction 0.001: images kept: 0: expected 1 to 59"),
        ("subsets", ["--fraction", "1"], "--fraction 1.0: images kept: 60: expected 1 to 59"),
        ("subsets", ["--count", "0"], "--count 0: expected a positive whole number"),
        (
            "full",
            ["--seeds", "0", "0"],
            "retrain full: would train full-seed0 twice; give each seed",
        ),
        ("random", ["--top_k", "3", "3"], "retrain random: would train random-k3-000 twice"),
        ("subsets", ["--seeds", "0", "1"], "only full models are trained with several"),
        ("full", ["--loss_time_samples", "3"], "--loss_time_samples 3: must divide"),
        ("full", ["--train_epochs", "0"], "--train_epochs 0: expected a positive whole number"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_written(
    world, tmp_path, capsys, kind, flags, said
):
    assert said in refused(capsys, retrain.main, bad(world, tmp_path, *flags, kind=kind))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    "kind, seed, flags",
    [("random", 0, []), ("random", 1, []), ("without", 2, ["--influence", "INFLUENCE"])],
)
def test_models_of_a_seed_without_a_full_model_are_refused_with_the_command_that_trains_it(
    world, tmp_path, capsys, monkeypatch, kind, seed, flags
):
    """The command of the refusal, pasted, makes the refused one pass its checks."""
    flags = [
        *(str(world / "results/influence") if flag == "INFLUENCE" else flag for flag in flags),
        "--top_k",
        "3",
        "--seeds",
        str(seed),
    ]
    said = refused(capsys, retrain.main, bad(world, tmp_path, *flags, kind=kind))
    assert (
        f"{tmp_path}/results/retrained has no full model of seed {seed} to compare models of "
        f"that seed with; train it first: " in said
    )
    assert not files(tmp_path)
    command = shlex.split(said.strip().partition("train it first: ")[2])
    assert command[:4] == ["python", "-m", "unlearn", "retrain"]
    retrain.main([*command[4:], *QUICK, "--no_pictures", "--device", "cpu"])
    retrain.main([*bad(world, tmp_path, *flags, kind=kind), *QUICK, "--no_pictures", "--dry_run"])
    assert sorted(path.name for path in (tmp_path / "results/retrained").iterdir()) == [
        f"full-seed{seed}.json"
    ]


def test_an_influence_file_of_another_training_set_is_refused(world, tmp_path, capsys):
    write_influence(
        tmp_path / "influence", [f"laion/{row:06d}" for row in range(60)], "of another root"
    )
    said = refused(
        capsys,
        retrain.main,
        bad(world, tmp_path, "--top_k", "3", "--influence", str(tmp_path / "influence")),
    )
    assert (
        "ranks other training images, 60 of " in said
        and "than the 60 of" in said
        and not files(tmp_path / "results")
    )


def test_where_scores_do_not_decide_which_images_are_the_first_k_no_model_is_trained(caplog):
    """Refused where none does; else the others' models are trained, and it is said."""
    images = SimpleNamespace(ids=[str(row) for row in range(6)])

    def ranking(query, *scores):
        found = np.array(scores, float)
        return rankings.MethodRanking(Path(query), "text", query, found, np.argsort(-found), [])

    tied, plain = ranking("00", 5, 4, 3, 3, 1, 0), ranking("01", 5, 4, 3, 2, 1, 0)
    said = (
        "text: in 1 of {} queries the images ranked 3 and 4 have the same score; the order of the files, "
        "not text, would decide which are removed"
    )
    with pytest.raises(UserError) as error:
        plans.plan_without(plans.PlanSettings("without", top_k=(3,)), images, [tied])
    assert str(error.value) == f"{said.format(1)}; give another --top_k, or leave this method out"
    made = plans.plan_without(plans.PlanSettings("without", top_k=(2, 3)), images, [tied, plain])
    names = ["without-text-00-k2", "without-text-01-k2", "without-text-01-k3"]
    assert [plan.name for plan in made] == names
    assert f"{said.format(2)}: no models without these" in caplog.text


def test_models_without_a_chosen_set_are_without_its_first_k_images(tmp_path):
    images = SimpleNamespace(ids=[str(row) for row in range(5)])
    path, scores = tmp_path / "influence.npz", np.array([5.0, 4, 3, 2, 1])
    np.savez(path, set_rows=np.array([0, 4, 2]), set_rises=np.array([5.0, 6, 3]))
    ranking = rankings.MethodRanking(path, "removal", "00", scores, np.argsort(-scores), [])
    chosen = rankings.put_set_first(ranking, 3, "")
    assert chosen.order.tolist() == [0, 4, 2, 1, 3]
    made = plans.plan_without(plans.PlanSettings("without", top_k=(2, 3)), images, [chosen])
    assert [plan.name for plan in made] == [
        "without-removal-set-00-k2",
        "without-removal-set-00-k3",
    ]
    assert [np.flatnonzero(~plan.members).tolist() for plan in made] == [[0, 4], [0, 2, 4]]
    with pytest.raises(UserError, match="holds 3 images .* 4 are to be left out; .* --top_k 4"):
        rankings.put_set_first(ranking, 4, "")
    for rows in [0, 4, 5], [0, 4, -1], [0, 4, 4]:
        np.savez(path, set_rows=np.array(rows), set_rises=np.array([5.0, 6, 3]))
        with pytest.raises(UserError, match="chosen together are not among its 5; remedy"):
            rankings.put_set_first(ranking, 3, "remedy")


def test_weights_of_another_recipe_are_refused_by_the_name_of_the_field(
    world, place, capsys, tmp_path
):
    before = files(tmp_path)
    said = refused(capsys, retrain.main, ["full", *place, "--train_lr", "0.002"])
    assert (
        "full-seed0/model.safetensors: made with other settings: rate is 0.001, expected 0.002"
        in said
        and "--overwrite" in said
    )
    assert files(tmp_path) == before


def test_measures_of_another_recipe_are_refused(world, place, capsys, tmp_path):
    flags = ["full", *place, *QUICK, "--no_pictures", "--task_json", str(world / "tasks.json")]
    retrain.main(flags)
    said = refused(capsys, retrain.main, [*flags, "--noise_seed", "5"])
    assert "full-seed0.json: made with other settings: noise_seed is 0, expected 5" in said


def test_pictures_can_be_compared_by_a_model_of_features(world, place, tmp_path, monkeypatch):
    """The encoder sees the queries' own files and the pictures made again, which are kept."""
    seen = []

    def encode(paths):
        seen.append([Path(path) for path in paths])
        return (
            np.stack([np.eye(2), np.eye(2)])
            if len(seen) == 1
            else np.stack([np.ones((2, 2)), np.eye(2)])
        )

    monkeypatch.setattr(retrain, "feature_encoder", lambda *arguments: encode)
    retrain.main(
        ["full", *place, *QUICK, "--task_json", str(world / "tasks.json"), "--features", "clip"]
    )
    found = measures(tmp_path, "full-seed0")
    assert found["identity"]["features"] == "clip" and list(
        found["similarity"].values()
    ) == pytest.approx([0.5**0.5] * 2)
    assert seen[0] == [world / f"root/synth/queries/0000{row}.png" for row in (0, 1)]
    assert (
        seen[1]
        == [
            tmp_path / f"results/retrain/full-seed0/pictures/queries/0000{row}.png"
            for row in (0, 1)
        ]
        and seen[1][1].exists()
    )


def test_measures_without_pictures_are_made_again_where_pictures_are_asked_for(
    world, place, tmp_path
):
    flags = ["full", *place, *QUICK, "--task_json", str(world / "tasks.json")]
    retrain.main([*flags, "--no_pictures"])
    assert "mse" not in measures(tmp_path, "full-seed0")
    retrain.main(flags)
    assert set(measures(tmp_path, "full-seed0")["mse"]) == {"queries/00000", "queries/00001"}


@pytest.mark.slow
def test_a_stack_killed_while_it_was_written_is_the_same_again(world, place, tmp_path, monkeypatch):
    """Two of three models stand there: without the third, all are trained again from the
    checkpoint, together."""
    flags = ["subsets", *place, "--count", "3", "--stack", "3", "--train_epochs", "3"]
    retrain.main(flags)
    whole = {
        number: (tmp_path / f"results/retrain/half-00{number}/model.safetensors").read_bytes()
        for number in range(3)
    }
    shutil.rmtree(tmp_path / "results/retrain/half-002")
    retrain.main(flags)
    assert all(
        (tmp_path / f"results/retrain/half-00{number}/model.safetensors").read_bytes() == content
        for number, content in whole.items()
    )


def test_a_task_file_of_other_tasks_is_not_replaced_unasked(world, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text("[1]")
    make = [
        "--prompts",
        str(world / "prompts.txt"),
        "--task_json",
        str(tmp_path / "tasks.json"),
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
    ]
    assert "tasks.json: holds other tasks; give --overwrite" in refused(
        capsys, generate.main, [*make, "--num_inference_steps", "2"]
    )
    assert (tmp_path / "tasks.json").read_text() == "[1]"


def test_measures_of_other_queries_are_refused(world, place, capsys, tmp_path):
    flags = ["full", *place, *QUICK, "--no_pictures", "--task_json"]
    retrain.main([*flags, str(world / "tasks.json")])
    write_json(tmp_path / "one.json", json.loads((world / "tasks.json").read_text())[:1])
    assert "was measured on other queries than the 1 of these task files" in refused(
        capsys, retrain.main, [*flags, str(tmp_path / "one.json")]
    )


def test_a_query_without_a_seed_is_refused_where_pictures_are_made(world, tmp_path, capsys):
    entries = json.loads((world / "tasks.json").read_text())
    del entries[1]["seed"]
    (tmp_path / "tasks.json").write_text(json.dumps(entries))
    flags = [
        "full",
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
        "--result_dir",
        str(tmp_path / "r"),
        "--task_json",
        str(tmp_path / "tasks.json"),
    ]
    assert "synth/queries/00001.png: has no seed in its task file" in refused(
        capsys, retrain.main, flags
    )


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "expected at least one prompt, found none"),
        (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
        (b"\xff", "not UTF-8 text"),
        ("{}", "expected COCO's caption annotations"),
    ],
)
def test_prompts_that_are_none_are_refused(world, tmp_path, capsys, content, said):
    path = tmp_path / ("prompts.json" if content == "{}" else "prompts.txt")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = [
        "--prompts",
        str(path),
        "--task_json",
        str(tmp_path / "t.json"),
        "--dataroot",
        str(world / "root"),
        "--device",
        "cpu",
    ]
    assert said in refused(capsys, generate.main, flags)


def test_a_unet_without_weights_is_no_model_to_attribute_to(world, tmp_path, capsys):
    root = shutil.copytree(world / "root", tmp_path / "root")
    (root / "unet/model.safetensors").unlink()
    flags = [
        "--prompts",
        str(world / "prompts.txt"),
        "--task_json",
        str(tmp_path / "t.json"),
        "--dataroot",
        str(root),
        "--device",
        "cpu",
    ]
    assert (
        "has no weights" in (said := refused(capsys, generate.main, flags))
        and "python -m unlearn retrain" in said
    )


def test_two_processes_train_different_models(world, place, tmp_path, monkeypatch):
    for index in 0, 1:
        monkeypatch.setattr(retrain, "process_share", lambda: (index, 2))
        retrain.main(["subsets", *place, "--count", "3"])
        names = sorted(path.name for path in (tmp_path / "results/retrain").iterdir())
        assert (
            names
            == [
                ["full-seed0", "half-000", "half-002"],
                ["full-seed0", "half-000", "half-001", "half-002"],
            ][index]
        )
