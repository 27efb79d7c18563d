"""Queries of the data root's own base model: no customized model, no exemplars, the training set
alone is ranked."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PARITY
from test_bad_input import INFLUENCE_FLAGS, LOSS_FLAGS, encode_images, files, no_model, refused  # noqa: F401 (a fixture)

import compute_influence
import compute_training_loss
from unlearn.commands import evaluate, preparation
from unlearn.datasets import queries
from unlearn.datasets.encoders import encode_prompts
from unlearn.datasets.tasks import load_tasks
from unlearn.evaluation import rankings
from unlearn.storage.reading import read_tensors

FIRST, SECOND = json.loads((PARITY / "fixture/tasks.json").read_text())
BASE = {"synth_image_path": FIRST["synth_image_path"], "prompt": "a photo of a blob"}
OTHER = {
    "synth_image_path": SECOND["synth_image_path"],
    "prompt": "another photo",
    "seed": 7,
    "category": None,
    "model_path": None,
}
PLAIN = {
    **FIRST,
    "prompt": BASE["prompt"],
    "train_prompt": "a blob",
}  # of a customized model, without its token
FOLDER = "influence/tiny/gpt/blob/samples/00000.png"


@pytest.fixture
def lent(monkeypatch, model):
    """Lends the scripts the model that is loaded already, and the latents that it made already."""
    monkeypatch.setattr(queries, "encode_images", encode_images)
    for script in compute_training_loss, compute_influence:
        monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)


@pytest.fixture
def attribute(root, tmp_path, lent):
    """Runs both scripts on tasks; the folder of results."""

    def run(name, tasks, *given):
        flags = write_tasks(tmp_path / f"{name}.json", tasks, root, tmp_path / name)
        compute_training_loss.main([*flags, *LOSS_FLAGS, *given])
        compute_influence.main([*flags, *INFLUENCE_FLAGS, *given])
        return tmp_path / name

    return run


@pytest.fixture
def refusal(root, tmp_path, capsys):
    """What a script says of a task that it refuses, having written nothing."""

    def run(main, task, *given):
        tasks = [BASE, {"synth_image_path": SECOND["synth_image_path"], "prompt": "", **task}]
        flags = write_tasks(tmp_path / "tasks.json", tasks, root, tmp_path / "refused")
        before = files(root)
        said = refused(capsys, main, [*flags, *given])
        assert files(root) == before and not (tmp_path / "refused").exists()
        return said

    return run


def write_tasks(path, tasks, root, result_dir):
    """Writes a task file; the flags of a run on it."""
    path.write_text(json.dumps(tasks))
    return [
        "--task_json",
        str(path),
        "--dataroot",
        str(root),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--result_dir",
        str(result_dir),
        "--device",
        "cpu",
    ]


def customize_with_the_base_weights(model, root):
    """Makes the customized model of the fixture one that changes nothing; its token is in no
    prompt."""
    path = root / "models/tiny/blob/pytorch_custom_diffusion_weights.pt"
    parameters = dict(model.denoiser.named_parameters())
    torch.save({name: parameters[name].detach().clone() for name in read_tensors(path)}, path)


def write_stored(model, root, dtype=np.float32):
    """Stores what the first query's picture and prompt are encoded to as row 2 of 3; the task that
    names it."""
    latent = encode_images(model, [root / BASE["synth_image_path"]], 512).numpy().astype(dtype)
    embedding = encode_prompts(model, [BASE["prompt"]])["embeddings"].numpy().astype(dtype)
    np.save(root / "latents.npy", np.concatenate([latent + 1, latent - 1, latent]))
    np.save(root / "embeddings.npy", np.concatenate([embedding + 1, embedding - 1, embedding]))
    return {**BASE, "latents": "latents.npy", "embeddings": "embeddings.npy", "row": 2}


def encode_query(model, root, task, compat=None):
    """The query of one task, as compute_influence.py takes it."""
    (root / "tasks.json").write_text(json.dumps([task]))
    task = load_tasks(root / "tasks.json", root)[0]
    return queries.encode_query(model, task, str(root), unscaled=compat is not None)


def read_result(folder, name="influence"):
    with np.load(folder / FOLDER / "influence.npz", allow_pickle=False) as file:
        return file[name]


def test_a_query_of_the_base_model_ranks_its_training_set_alone(attribute):
    folder = attribute("base", [BASE, OTHER])
    assert [path.name for path in sorted((folder / "orig_loss").rglob("*.npy"))] == [
        "laion_loss.npy"
    ]
    assert (folder / "orig_loss/base/laion_loss.npy").exists()
    assert {path.name for path in (folder / FOLDER).iterdir()} == {
        "influence.csv",
        "influence.json",
        "influence.npz",
        "influence.pkl",
        "laion_loss.json",
        "laion_loss.npy",
        "visualization.jpg",
        "weight_change.json",
        "weight_change.safetensors",
    }
    assert read_result(folder, "ids").tolist() == ["laion/000000", "laion/000001", "laion/000002"]
    assert not read_result(folder, "is_exemplar").any() and read_result(
        folder, "is_exemplar"
    ).shape == (3,)
    assert len((folder / FOLDER / "influence.csv").read_text().splitlines()) == 4
    arrays = rankings.read_influence(folder / FOLDER / "influence.npz", "")
    effect = rankings.measure_effect(arrays, arrays["is_exemplar"])
    assert np.isnan(effect[3]) and np.isfinite(np.delete(effect, 3)).all()


@pytest.mark.parametrize("given", [[], ["--compat", "abu"]])
def test_a_customized_model_that_changes_nothing_gives_the_bits_of_the_base_model(
    given, attribute, root, model
):
    stored = (
        write_stored(model, root) if given else {}
    )  # where it is encoded, the published arithmetic leaves one of the two unscaled
    base = attribute("base", [{**stored, **BASE}], *given)
    customize_with_the_base_weights(model, root)
    custom = attribute("custom", [{**stored, **PLAIN}], *given)
    for name in (
        "orig_loss/{}/laion_loss.npy",
        f"{FOLDER}/laion_loss.npy",
        f"{FOLDER}/weight_change.safetensors",
    ):
        assert (base / name.format("base")).read_bytes() == (
            custom / name.format("tiny/blob")
        ).read_bytes(), name
    is_exemplar = read_result(custom, "is_exemplar")
    assert is_exemplar.sum() == 5 and np.array_equal(
        read_result(custom)[~is_exemplar], read_result(base)
    )
    assert np.ptp(read_result(base)) > 0


def test_a_customized_model_that_changes_something_gives_other_losses(attribute):
    base, custom = attribute("base", [BASE]), attribute("custom", [PLAIN])
    assert not np.array_equal(
        np.load(base / "orig_loss/base/laion_loss.npy"),
        np.load(custom / "orig_loss/tiny/blob/laion_loss.npy"),
    )


def test_neither_the_order_of_tasks_nor_customized_models_beside_them_change_a_result(attribute):
    alone = attribute("alone", [BASE])
    first = attribute("first", [BASE, SECOND])
    last = attribute("last", [SECOND, OTHER | BASE])
    for name in (
        "orig_loss/base/laion_loss.npy",
        f"{FOLDER}/laion_loss.npy",
        f"{FOLDER}/weight_change.safetensors",
        f"{FOLDER}/influence.npz",
    ):
        assert (
            (alone / name).read_bytes() == (first / name).read_bytes() == (last / name).read_bytes()
        ), name
    for name in (
        "orig_loss/tiny/blob/exemplar_loss.npy",
        "influence/tiny/gpt/blob/samples/00001.png/influence.npz",
    ):
        assert (first / name).read_bytes() == (last / name).read_bytes(), name


def test_a_stored_latent_and_embedding_count_instead_of_picture_and_prompt(attribute, root, model):
    encoded, stored = attribute("encoded", [BASE]), attribute("stored", [write_stored(model, root)])
    assert np.array_equal(read_result(encoded), read_result(stored))
    other = attribute("other", [{**write_stored(model, root), "row": 0}])
    assert not np.array_equal(read_result(encoded), read_result(other))
    embedded = attribute(
        "embedded",
        [{key: value for key, value in write_stored(model, root).items() if key != "embeddings"}],
    )
    assert np.array_equal(read_result(encoded), read_result(embedded))


def test_a_latent_of_half_precision_is_read_as_its_float32_values(model, root):
    query = encode_query(model, root, write_stored(model, root, np.float16))
    assert query.latents.shape == (1, 1, *model.latent_shape(512)) and query.embeddings.shape == (
        1,
        1,
        *model.embedding_shape,
    )
    assert query.latents.dtype == query.embeddings.dtype == np.float32
    assert np.array_equal(query.latents[0, 0], np.load(root / "latents.npy")[2].astype(np.float32))


def test_compat_divides_the_encoded_latent_of_a_customized_models_query_and_no_other(model, root):
    stored = write_stored(model, root)
    for task, divided in (
        (FIRST, True),
        (BASE, False),
        (stored, False),
        ({**FIRST, **stored}, False),
    ):
        native, compat = (encode_query(model, root, task, kind).latents for kind in (None, "abu"))
        assert np.array_equal(
            compat, native / model.pipeline.vae.config.scaling_factor if divided else native
        )


def test_the_identity_of_a_query_says_what_its_latent_and_embedding_were(model, root):
    stored = write_stored(model, root)
    half = {key: value for key, value in stored.items() if key != "embeddings"}
    found = [
        encode_query(model, root, task).identity
        for task in (BASE, half, {**half, "row": 1}, stored, {**stored, "row": 1})
    ]
    assert len(set(found)) == len(found)
    np.save(root / "moved.npy", np.load(root / "latents.npy")[2:])
    moved = {**half, "latents": "moved.npy", "row": 0}
    assert (
        encode_query(model, root, moved).identity == found[1]
    )  # the values count, not where they stand


def test_a_query_unlearned_from_another_latent_is_refused(attribute, root, model, tmp_path, capsys):
    task = write_stored(model, root)
    attribute("results", [task])
    np.save(root / "latents.npy", np.load(root / "latents.npy") * 2)
    flags = write_tasks(tmp_path / "results.json", [task], root, tmp_path / "results")
    said = refused(capsys, compute_influence.main, [*flags, *INFLUENCE_FLAGS])
    assert (
        "weight_change.safetensors: made with other settings: other query: its picture, prompt "
        "or stored latent: " in said
    )


def test_a_finished_run_started_again_and_one_that_lost_a_file_end_in_the_same_files(attribute):
    folder = attribute("results", [BASE])
    content = {
        path: data
        for path, data in files(folder).items()
        if path.suffix in (".npy", ".npz", ".safetensors")
    }
    attribute("results", [BASE])
    assert {path: data for path, data in files(folder).items() if path in content} == content
    (folder / FOLDER / "laion_loss.json").unlink()
    (folder / FOLDER / "laion_loss.npy").unlink()
    (folder / FOLDER / "influence.npz").unlink()
    attribute("results", [BASE])
    assert {path: data for path, data in files(folder).items() if path in content} == content


def test_the_base_models_own_losses_are_asked_for_before_a_model_is_loaded(refusal, no_model):
    said = refusal(compute_influence.main, {})
    assert (
        "orig_loss/base/laion_loss.npy: no cached losses yet; make them: python "
        "compute_training_loss.py" in said
    )


def test_a_dry_run_of_the_base_models_queries_counts_them_and_writes_nothing(
    root, tmp_path, lent, capsys
):
    flags = write_tasks(tmp_path / "tasks.json", [BASE, OTHER], root, tmp_path / "results")
    compute_influence.main([*flags, *INFLUENCE_FLAGS, "--dry_run"])
    assert (
        "1 models, 2 queries, 3 training images" in capsys.readouterr().out
        and not (tmp_path / "results").exists()
    )


def test_an_entry_with_part_of_a_customized_model_is_refused_by_the_missing_key(refusal, no_model):
    keys = ("test_case", "test_case_ind", "model_path", "train_prompt")
    for key in keys:
        first_missing = next(other for other in keys if other != key)
        assert f"task 1: key {first_missing} is missing" in refusal(
            compute_training_loss.main, {key: SECOND[key]}
        )
        others = {name: SECOND[name] for name in SECOND if name != key}
        assert f"task 1: key {key} is missing" in refusal(compute_training_loss.main, others)


@pytest.mark.parametrize(
    "task, said",
    [
        ({"row": 0}, "task 1: key latents is missing, which row needs"),
        ({"latents": "latents.npy"}, "task 1: key row is missing, which latents needs"),
        (
            {"embeddings": "embeddings.npy", "row": 0},
            "task 1: key latents is missing, which row needs",
        ),
        ({"seed": "7"}, "task 1: seed: expected a whole number, found '7'"),
        ({"row": True}, "task 1: row: expected a whole number, found True"),
        ({"latents": 3, "row": 0}, "task 1: latents: expected a string, found 3"),
        ({"category": 3}, "task 1: category: expected a string, found 3"),
        (
            {"latents": "latents.npy", "row": 3},
            "00001.png: latents {root}/latents.npy: expected a row from 0 to 2, found 3",
        ),
        ({"latents": "latents.npy", "row": -1}, "expected a row from 0 to 2, found -1"),
        (
            {"latents": "latents.npy", "embeddings": "short.npy", "row": 2},
            "embeddings {root}/short.npy: expected a row from 0 to 1",
        ),
        (
            {"latents": "embeddings.npy", "row": 0},
            "embeddings.npy: expected [n, C, h, w] of floats, found",
        ),
        (
            {"latents": "ids.npy", "row": 0},
            "ids.npy: expected [n, C, h, w] of floats, found [2, 1, 1, 1] int64",
        ),
        (
            {"latents": "cut.npy", "row": 0},
            "00001.png: latents {root}/cut.npy: not a complete .npy array of numbers",
        ),
        (
            {"latents": "nowhere.npy", "row": 0},
            "00001.png: latents: no such file: {root}/nowhere.npy",
        ),
        ({"latents": "../outside.npy", "row": 0}, "00001.png: latents: expected a path inside"),
        (
            {"prompt": "a <new1> blob"},
            "00001.png: the base model has no token <new1>, which its prompt uses; give the task",
        ),
    ],
)
def test_a_bad_entry_is_named_before_a_model_is_loaded(task, said, refusal, no_model, model, root):
    write_stored(model, root)
    np.save(root / "short.npy", np.load(root / "embeddings.npy")[:2])
    np.save(root / "ids.npy", np.zeros((2, 1, 1, 1), np.int64))
    np.save(root.parent / "outside.npy", np.load(root / "latents.npy"))
    (root / "cut.npy").write_bytes((root / "latents.npy").read_bytes()[:500])
    assert said.format(root=root) in refusal(compute_training_loss.main, task)


def test_a_stored_array_of_another_models_shape_or_with_nan_is_named_before_anything_is_scored(
    refusal, lent, model, root
):
    task = write_stored(model, root)
    np.save(root / "small.npy", np.load(root / "latents.npy")[:, :, ::2])
    bad = np.load(root / "embeddings.npy")
    bad[2, 0, 0] = np.nan
    np.save(root / "bad.npy", bad)
    changes = {"latents": task["latents"], "row": 2}
    for main in compute_training_loss.main, compute_influence.main:
        given = ["--dry_run"] if main is compute_influence.main else []
        shapes = [list(np.load(root / name).shape[1:]) for name in ("latents.npy", "small.npy")]
        said = refusal(main, {**changes, "latents": "small.npy"}, *given)
        assert (
            "latents small.npy, row 2: expected shape {} for this model, found {}".format(*shapes)
            in said
        )
        said = refusal(main, {**changes, "embeddings": "bad.npy"}, *given)
        assert "00001.png: embeddings bad.npy, row 2: has NaN or infinite entries" in said


@pytest.mark.parametrize("name", ["models/base", "base"])
def test_a_customized_model_cannot_share_the_base_models_folder(name, refusal, no_model, root):
    shutil.copytree(root / "models/tiny/blob", root / name)
    assert f"{name}: its losses would stand in the folder of the base model: base" in refusal(
        compute_training_loss.main, {**SECOND, "model_path": name}
    )


def test_metrics_of_exemplars_refuse_queries_that_have_none(root, tmp_path, capsys):
    flags = write_tasks(tmp_path / "tasks.json", [BASE], root, tmp_path / "results")
    said = refused(capsys, evaluate.main, flags)
    assert (
        f"{BASE['synth_image_path']}: expected a customized model with exemplars, whose ranks "
        f"Recall and mAP measure" in said
    )
