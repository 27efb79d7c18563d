"""`--scoring output`: how far unlearning a query moves the model's predictions of an image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from test_scoring import stopped_after

import compute_influence
import unlearn
from unlearn import UserError, noise
from unlearn.attribution import draws
from unlearn.attribution.outputs import changed_copy, changed_outputs
from unlearn.attribution.sweeps import Sweep
from unlearn.commands import report
from unlearn.evaluation.rankings import read_influence
from unlearn.models.pipelines import changed_weights, select_parameters
from unlearn.retraining.rankings import method_of

GRID = [0, 500]
QUERY = "synth/tiny/gpt/blob/samples/00000.png"


def some_change(model, selection, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in select_parameters(model.denoiser, selection).items()
    }


def sweep(model, images, folder, changes, of_text=True, batch_size=10):
    """Changes of outputs [2n, changes] by a sweep."""
    folder.mkdir(parents=True)
    with changed_outputs(model, changes, of_text) as measure_of:
        return Sweep(images, GRID, batch_size).run(
            model, folder, "", measure_of(range(len(changes)))
        )


def written_out(model, images, change):
    """|| eps_theta' - eps_theta ||^2 of each view, every sample alone."""
    values = []
    for row in range(2 * len(images)):
        view, image = divmod(row, len(images))
        latent, conditioning = images.image_tensors(view, image, model.device)
        with torch.no_grad():
            squares = []
            for timestep in GRID:
                normal = torch.from_numpy(
                    noise.image_noise(
                        0, images.name, images.ids[image], [(view, 0, timestep, 0)], latent.shape
                    )
                )
                times = torch.tensor([timestep])
                noisy = model.diffuse(latent[None], normal, times)
                before = model.predict(noisy, times, conditioning).double()
                with changed_weights(model.denoiser, change):
                    after = model.predict(noisy, times, conditioning).double()
                squares.append(float((after - before).square().mean()))
        values.append(np.mean(squares))
    return np.array(values)


@pytest.mark.parametrize("selection", ["cross-attn-kv", "all"])
def test_a_score_is_the_mean_squared_change_of_the_prediction(
    selection, model, training_set, tmp_path
):
    images, change = training_set.first(3), some_change(model, selection)
    before = {name: value.clone() for name, value in model.denoiser.named_parameters()}
    found = sweep(model, images, tmp_path / "all", [change], selection == "cross-attn-kv")
    np.testing.assert_allclose(found[:, 0], written_out(model, images, change), rtol=1e-5)
    for name, value in model.denoiser.named_parameters():
        assert torch.equal(value, before[name])


def test_batch_and_company_do_not_change_it(model, training_set, tmp_path):
    images, changes = (
        training_set.first(3),
        [some_change(model, "cross-attn-kv", s) for s in (0, 1)],
    )
    both = sweep(model, images, tmp_path / "both", changes)
    for number, change in enumerate(changes):
        alone = sweep(model, images, tmp_path / str(number), [change], batch_size=1)
        np.testing.assert_allclose(both[:, number], alone[:, 0], rtol=2e-5)


def test_a_copy_has_the_change_and_the_model_stays(model):
    change = some_change(model, "cross-attn-kv")
    name, delta = next(iter(change.items()))
    before = dict(model.denoiser.named_parameters())[name].clone()
    copied = changed_copy(model, change)
    assert torch.equal(dict(copied.denoiser.named_parameters())[name], before + delta)
    assert torch.equal(dict(model.denoiser.named_parameters())[name], before)
    assert copied.weights_hash == model.weights_hash and copied.pipeline.vae is model.pipeline.vae


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Three chunks of a dozen images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws.chunk_rows, "__defaults__", (5,))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data root of one's own, two tasks of its base model, and the flags."""
    folder = tmp_path_factory.mktemp("output")
    root = Path(shutil.copytree(PARITY / "fixture/abc", folder / "root"))
    settings = {"name": "mine", "pipeline": str(PARITY / "fixture/sd-tiny"), "time_samples": 2}
    (root / "dataset.json").write_text(json.dumps(settings))
    shutil.copy(root / QUERY, (root / QUERY).with_name("other.png"))
    tasks = [
        {"synth_image_path": QUERY.replace("00000", name), "prompt": prompt, "category": None}
        for name, prompt in (("00000", "a blob on a table"), ("other", "a blob"))
    ]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    flags = ["--task_json", str(folder / "tasks.json"), "--dataroot", str(root), "--device", "cpu"]
    flags += ["--laion_subset_size", "12", "--unlearn_grad_accum_steps", "1"]
    compute_influence.main([*flags, "--scoring", "output", "--result_dir", str(folder / "results")])
    return folder, root, flags


@pytest.fixture
def copy(world, tmp_path):
    """A private copy of its results, and the flags for it."""
    results = Path(shutil.copytree(world[0] / "results", tmp_path / "results"))
    return results, [*world[2], "--result_dir", str(results)]


def find(results):
    return {path.parent.name: path for path in results.rglob("influence.npz")}


def test_it_needs_no_losses_and_says_what_it_is(copy, capsys):
    results, _ = copy
    assert not (results / "orig_loss").exists()
    paths = find(results)
    assert paths.keys() == {"00000.png", "other.png"}
    for path in paths.values():
        arrays = read_influence(path, "")
        assert (arrays["influence"] > 0).all() and "median_change" not in arrays
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["identity"]["settings"]["scoring"] == "output"
        assert "--scoring output" in record["circumstances"]["command"]
    assert method_of(results / "influence") == "output"
    report.main([str(results)])
    assert "predictions of a training image move" in (path.parent / "report.html").read_text()


def test_the_interface_gives_the_scripts_bits(copy, world, tmp_path):
    results, _ = copy
    model = unlearn.load_model(str(world[1]), "cpu")
    images = unlearn.open_training_set(world[1], model, 12)
    path = find(results)["00000.png"]
    delta = unlearn.Delta(path.with_name("weight_change.safetensors"))
    changes = unlearn.compute_output_changes(model, images, delta, cache=tmp_path / "kept")
    ranking = unlearn.rank(images, changes)
    np.testing.assert_array_equal(ranking.scores, read_influence(path, "")["influence"])


def test_killed_it_goes_on_to_the_same_bits(copy, world, monkeypatch):
    results, flags = copy
    expected = {name: read_influence(path, "") for name, path in find(results).items()}
    shutil.rmtree(results)
    argv = [*flags, "--scoring", "output"]
    with stopped_after(2, monkeypatch), pytest.raises(KeyboardInterrupt):
        compute_influence.main(argv)
    compute_influence.main(argv)
    for name, path in find(results).items():
        np.testing.assert_array_equal(
            read_influence(path, "")["influence"], expected[name]["influence"]
        )


def test_a_box_of_the_published_way_is_recorded_said_and_never_mixed(copy, capsys):
    results, flags = copy
    path = find(results)["other.png"]
    before = read_influence(path, "")["influence"]
    boxed = [*flags, "--scoring", "output", "--box", "0", "0", "30", "60"]
    with pytest.raises(
        UserError, match=r"box is None, expected \[0, 0, 30, 60\] \(box of the query's"
    ):
        compute_influence.main(boxed)
    compute_influence.main([*boxed, "--overwrite"])
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["identity"]["settings"]["box"] == [0, 0, 30, 60]
    assert "--box 0 0 30 60" in record["circumstances"]["command"]
    assert not np.allclose(read_influence(path, "")["influence"], before)
    shown = capsys.readouterr().out
    assert (
        'other.png, in the box 0 0 30 60: "' in shown and "own loss in the box 0 0 30 60" in shown
    )
    report.main([str(results)])
    assert "In the box 0 0 30 60: " in (path.parent / "report.html").read_text()


def test_other_scores_do_not_replace_its_own(copy):
    results, flags = copy
    for scoring in "exact", "midpoint":
        with pytest.raises(UserError, match=f"was made by --scoring output, not {scoring}; give"):
            compute_influence.main([*flags, "--scoring", scoring])
    for path in find(results).values():
        path.unlink()
    with pytest.raises(UserError, match="laion_change.npy: made with other settings: scoring"):
        compute_influence.main([*flags, "--scoring", "midpoint"])


@pytest.mark.parametrize(
    "more, said",
    [
        (["--precision", "bf16"], "--precision bf16: the difference of two predictions is lost"),
        (["--index", "x"], "--index: estimates changes of losses, beside which those of predict"),
        (["--compat", "abu"], "--compat abu: the published program knows --scoring exact only"),
    ],
)
def test_what_does_not_go_together_is_refused(more, said, world, tmp_path):
    with pytest.raises(UserError, match=said):
        compute_influence.main(
            [*world[2], "--scoring", "output", "--result_dir", str(tmp_path), *more]
        )
