"""The Python interface gives what the scripts give, keeps what it is told to keep, and raises
UserError alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY

import compute_influence
import compute_training_loss
import unlearn
from unlearn.storage.reading import read_tensors

ROOT = Path(__file__).parent.parent
QUERY = "synth/tiny/gpt/blob/samples/00000.png"
PROMPT = "a blob on a table"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data root of one's own, whose base model made a query, and the scripts' results of it."""
    folder = tmp_path_factory.mktemp("api")
    root = Path(shutil.copytree(PARITY / "fixture/abc", folder / "root"))
    shutil.copytree(PARITY / "fixture/sd-tiny", root / "sd-tiny")
    settings = {"name": "mine", "pipeline": "sd-tiny", "time_samples": 2}
    (root / "dataset.json").write_text(json.dumps(settings))
    task = {"synth_image_path": QUERY, "prompt": PROMPT, "category": None}
    (folder / "tasks.json").write_text(json.dumps([task]))
    flags = ["--task_json", str(folder / "tasks.json"), "--dataroot", str(root)]
    flags += ["--result_dir", str(folder / "results"), "--device", "cpu"]
    compute_training_loss.main(flags)
    compute_influence.main([*flags, "--unlearn_lr", "1e-5", "--num_train", "60"])
    [result] = (folder / "results/influence").rglob("influence.npz")
    with np.load(result, allow_pickle=False) as file:
        found = dict(file)
    return root, found, read_tensors(result.parent / "weight_change.safetensors"), result.parent


@pytest.fixture(scope="module")
def steps(world):
    """The nine lines of the interface."""
    root, *_ = world
    model = unlearn.load_model(root / "sd-tiny", device="cpu")
    images = unlearn.open_training_set(root, model)
    fisher = unlearn.load_fisher(root / "sd_fisher.pt", model)
    query = unlearn.encode_query(model, root / QUERY, prompt=PROMPT)
    before = unlearn.compute_losses(model, images)
    delta = unlearn.unlearn(model, query, fisher, lr=1e-5, num_train=60)
    after = unlearn.compute_losses(model, images, delta=delta)
    ranking = unlearn.rank(images, after - before)
    return model, images, fisher, query, before, delta, after, ranking


def test_the_nine_lines_give_the_scripts_ranking_bit_for_bit(world, steps):
    _, found, change, _ = world
    *_, delta, _, ranking = steps
    assert all(torch.equal(delta.tensors[name], value) for name, value in change.items())
    np.testing.assert_array_equal(ranking.scores, found["influence"])
    np.testing.assert_array_equal(ranking.order, found["rank"])
    assert ranking.ids == found["ids"].tolist()


def test_the_model_is_as_it_was_after_unlearning_and_scoring(world, steps):
    model, images, *_ = steps
    again = unlearn.compute_losses(model, images)
    np.testing.assert_array_equal(again, steps[4])


def test_a_ranking_shows_file_names_and_is_written_as_a_table_and_a_picture(
    steps, tmp_path, capsys
):
    ranking = steps[-1]
    ranking.show(3)
    shown = capsys.readouterr().out
    best = ranking.paths[ranking.order[0]]
    assert best.name in shown and "laion/" not in shown
    assert len(ranking.to_csv(tmp_path / "ranking.csv").read_text().splitlines()) == 61
    picture = ranking.picture(steps[3], 3, tmp_path / "ranking.jpg")
    assert picture.size[0] > 600 and (tmp_path / "ranking.jpg").stat().st_size > 1000


def test_a_cache_is_read_again_and_refused_for_other_settings(steps, tmp_path, monkeypatch):
    model, images, *_ = steps
    some = images.first(3)
    first = unlearn.compute_losses(model, some, cache=tmp_path)
    monkeypatch.setattr("unlearn.attribution.sweeps.score_rows", None)
    np.testing.assert_array_equal(unlearn.compute_losses(model, some, cache=tmp_path), first)
    with pytest.raises(unlearn.UserError, match="noise_seed is 0, expected 1"):
        unlearn.compute_losses(model, some, cache=tmp_path, noise_seed=1)


def test_a_change_of_a_file_scores_as_the_one_in_memory(steps, world, tmp_path):
    model, images, fisher, query, *_ = steps
    path = tmp_path / "change.safetensors"
    on_disk = unlearn.unlearn(model, query, fisher, lr=1e-5, num_train=60, path=path)
    assert on_disk.content == steps[5].content and path.with_suffix(".json").exists()
    some = images.first(3)
    np.testing.assert_array_equal(
        unlearn.compute_losses(model, some, delta=unlearn.Delta(path)),
        unlearn.compute_losses(model, some, delta=steps[5]),
    )


def test_a_chosen_step_needs_no_number_of_training_images_and_a_given_one_does(steps):
    model, _, fisher, query, *_ = steps
    delta = unlearn.unlearn(model, query, fisher, draws=4)
    norms = [
        sum(float(value.double().square().sum()) for value in tensors.values())
        for tensors in (
            delta.tensors,
            {name: model.denoiser.get_parameter(name) for name in delta.tensors},
        )
    ]
    assert (norms[0] / norms[1]) ** 0.5 == pytest.approx(0.04, rel=1e-4)
    with pytest.raises(unlearn.UserError, match="needs num_train"):
        unlearn.unlearn(model, query, fisher, lr=0.1)


def test_changes_of_another_length_are_refused(steps):
    _, images, *_ = steps
    with pytest.raises(unlearn.UserError, match=r"expected 120 numbers.*found the shape \[61\]"):
        unlearn.rank(images, np.zeros(61))


def test_the_package_is_imported_without_torch_and_knows_its_public_names():
    code = (
        "import sys, unlearn; assert 'torch' not in sys.modules; print(sorted(unlearn.__all__) == dir(unlearn)); "
        "assert callable(unlearn.unlearn) and 'torch' in sys.modules"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert finished.stdout == "True\n", finished.stderr
    with pytest.raises(AttributeError, match="no attribute 'unlern'"):
        unlearn.unlern  # noqa: B018


def test_a_table_opens_in_a_spreadsheet_and_holds_no_formula(steps, tmp_path):
    ranking = unlearn.rank(steps[1], np.zeros(120))
    ranking.captions[0] = '=HYPERLINK("http://example.org")'
    ranking.captions[1] = "-1.5"
    content = ranking.to_csv(tmp_path / "ranking.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfrank,id,image,caption,score,")
    lines = content.decode("utf-8-sig").splitlines()
    assert ",\"'=HYPERLINK" in lines[1] and ",-1.5,0," in lines[2]


def test_the_notebook_and_the_readme_run_as_they_stand(tmp_path, monkeypatch, capsys):
    """Both on the embedded world, cut to some images so that it takes seconds."""
    for name in "emoji", "emoji_small":
        ignored = shutil.ignore_patterns("laion_subset", "exemplar", "models", "synth")
        shutil.copytree(ROOT / "data" / name, tmp_path / "data" / name, ignore=ignored)
    small, source = tmp_path / "data/emoji_small", ROOT / "data/emoji_small"
    (small / "synth/queries").mkdir(parents=True)
    shutil.copy(source / "synth/queries/00000.png", small / "synth/queries")
    lines = (source / "laion_subset/captions.txt").read_text().splitlines()[:24]
    pictures = sorted((source / "laion_subset/images").iterdir())[: len(lines)]
    (small / "laion_subset/images").mkdir(parents=True)
    (small / "laion_subset/captions.txt").write_text("\n".join(lines) + "\n")
    for picture in pictures:
        shutil.copy(picture, small / "laion_subset/images")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "tasks/python.ipynb").read_text())["cells"]
    notebook = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    readme = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    rankings = []
    for code in notebook, readme:
        names = {}
        exec(compile(code, "code", "exec"), names)
        rankings.append(names["ranking"])
    np.testing.assert_array_equal(rankings[0].scores, rankings[1].scores)
    assert (
        len(rankings[0]) == 24
        and rankings[0].names[rankings[0].order[0]] in capsys.readouterr().out
    )
