"""`--scoring removal`: an ordinary way of scoring, without Fisher, step and losses, whose results are
ordinary results."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from test_roots import run_together

import compute_influence
import unlearn
from unlearn import UserError
from unlearn.commands import evaluate, report
from unlearn.evaluation.rankings import read_influence
from unlearn.evaluation.scores import read_influences
from unlearn.retraining.rankings import method_of
from unlearn.storage.records import MEANINGS

REMOVAL = ["--scoring", "removal", "--sketch_size", "256", "--removal_timesteps", "350", "350"]
QUERY = "synth/tiny/gpt/blob/samples/00000.png"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data root of one's own without a Fisher, a task of its base model, and the flags."""
    folder = tmp_path_factory.mktemp("removal")
    root = Path(shutil.copytree(PARITY / "fixture/abc", folder / "root"))
    for path in root.glob("sd_fisher*"):
        path.unlink()
    settings = {"name": "mine", "pipeline": str(PARITY / "fixture/sd-tiny"), "time_samples": 2}
    (root / "dataset.json").write_text(json.dumps(settings))
    tasks = [{"synth_image_path": QUERY, "prompt": "a blob on a table", "category": None}]
    (folder / "tasks.json").write_text(json.dumps(tasks))
    flags = ["--task_json", str(folder / "tasks.json"), "--dataroot", str(root), "--device", "cpu"]
    flags += [*REMOVAL, "--laion_subset_size", "12"]
    compute_influence.main([*flags, "--result_dir", str(folder / "results")])
    return folder, root, flags


@pytest.fixture
def copy(world, tmp_path):
    """A private copy of its results, and the flags for it."""
    folder, _, flags = world
    results = Path(shutil.copytree(folder / "results", tmp_path / "results"))
    return results, [*flags, "--result_dir", str(results)]


def find(results):
    [path] = results.rglob("influence.npz")
    return path


def refusal(argv):
    with pytest.raises(UserError) as error:
        compute_influence.main(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_results_are_ordinary_results_without_what_belongs_to_losses(world):
    folder, _, _ = world
    path = find(folder / "results")
    arrays = read_influence(path, "")
    assert (arrays["influence"] > 0).all() and len(arrays["ids"]) == 12
    with np.load(path) as file:
        assert not {"query_loss_before", "relative_weight_change", "alpha"} & set(file.files)
    record = json.loads(path.with_suffix(".json").read_text())
    settings = record["identity"]["settings"]
    assert settings["scoring"] == "removal" and settings["weight_selection"] == "all"
    assert not {"weight_change", "losses_before", "fisher"} & record["identity"].keys()
    assert "alpha" not in record["circumstances"]
    with open(path.with_suffix(".csv"), encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and list(rows[0])[:5] == ["rank", "id", "image", "caption", "score"]
    assert list(rows[0])[7:] == ["error", "low", "high", "rank_first", "rank_last"]
    for row in rows:
        assert float(row["low"]) < float(row["score"]) < float(row["high"])
        assert int(row["rank_first"]) <= int(row["rank"]) <= int(row["rank_last"])
    assert (path.parent / "visualization.jpg").stat().st_size > 500
    assert not list((folder / "results").rglob("weight_change*"))


def test_every_setting_of_a_result_has_its_meaning_in_words(world):
    identity = json.loads(find(world[0] / "results").with_suffix(".json").read_text())["identity"]
    assert {*identity, *identity["settings"]} <= MEANINGS.keys()


def test_the_page_says_what_the_score_means(copy):
    results, _ = copy
    report.main([str(results)])
    page = (find(results).parent / "report.html").read_text()
    assert "how much less certain the model would be of this picture" in page
    assert re.search(r"between \S+ and \S+, rank [\d,]+( to [\d,]+)?</p>", page)
    assert "way of scoring" in page and "ridge of the inverse" in page
    assert "the query's own loss" not in page.lower()


def test_the_interface_gives_the_same_bits_and_the_same_features_serve_it(copy, world):
    results, _ = copy
    _, root, _ = world
    model = unlearn.load_model(root, device="cpu")
    images = unlearn.open_training_set(root, model, 12)
    query = unlearn.encode_query(model, root / QUERY, prompt="a blob on a table")
    before = (results / "removal/base/laion/features.txt").stat().st_mtime_ns
    settings = unlearn.RemovalSettings(sketch_size=256, timesteps=(350, 350))
    scores = unlearn.removal_scores(model, images, query, results / "removal/base", settings)
    assert (results / "removal/base/laion/features.txt").stat().st_mtime_ns == before
    with np.load(find(results)) as file:
        arrays = dict(file)
    assert scores.shape == (2, 12)
    ranking = unlearn.rank(images, scores)
    np.testing.assert_array_equal(ranking.scores, arrays["influence"])
    np.testing.assert_array_equal(ranking.order, arrays["rank"])
    for name, values in ranking.intervals.arrays().items():
        np.testing.assert_array_equal(values, arrays[name])
    with pytest.raises(UserError, match="or 12 scores, found the shape .13."):
        unlearn.rank(images, np.ones(13))


def test_run_again_it_gives_the_same_bits_and_its_features_are_kept(copy):
    results, flags = copy
    path, listing = find(results), results / "removal/base/laion/features.txt"
    before, made = read_influence(path, ""), listing.stat().st_mtime_ns
    compute_influence.main(flags)
    assert listing.stat().st_mtime_ns == made
    np.testing.assert_array_equal(read_influence(path, "")["influence"], before["influence"])


def test_several_processes_share_the_features_and_give_the_same_bits(world, tmp_path):
    folder, _, flags = world
    argv = [*flags, "--result_dir", str(tmp_path)]
    works = [lambda: compute_influence.main(argv)] * 2
    assert run_together(*works) == [0, 0]
    found, expected = (read_influence(find(place), "") for place in (tmp_path, folder / "results"))
    np.testing.assert_array_equal(found["influence"], expected["influence"])
    assert not list(tmp_path.rglob("*.claim"))


@pytest.mark.parametrize(
    "more, said",
    [
        (["--unlearn_lr", "0.1"], "--unlearn_lr: means nothing to --scoring removal"),
        (["--index", "x"], "--index: means nothing to --scoring removal"),
        (["--fisher_path", "x.pt"], "--fisher_path: means nothing to --scoring removal"),
        (["--precision", "bf16"], "--precision bf16: --scoring removal knows fp32 alone"),
        (
            ["--scoring", "exact"],
            "--removal_timesteps: means nothing to --scoring exact, only to removal",
        ),
        (["--ridge", "0"], "--ridge 0: expected a positive number"),
        (["--probes", "13"], "--probes 13: more than the 12 training images"),
        (["--removal_timesteps", "1000"], "timesteps 1000: expected 0 to 999"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(more, said, world, tmp_path):
    assert said in refusal([*world[2], "--result_dir", str(tmp_path), *more])


@pytest.mark.parametrize(
    "more, said",
    [
        (["--removal_timesteps", "600"], "timesteps is [350, 350], expected [600]"),
        (["--weight_selection", "attn"], "weight_selection is 'all', expected 'attn'"),
        (["--ridge", "1"], "ridge is 0.1, expected 1.0"),
    ],
)
def test_a_result_of_other_settings_is_kept_unless_overwritten(more, said, copy):
    results, flags = copy
    path = find(results)
    before = path.read_bytes()
    assert said in refusal([*flags, *more]) and path.read_bytes() == before
    compute_influence.main([*flags, *more, "--overwrite"])
    assert path.read_bytes() != before


def test_removal_and_unlearning_do_not_replace_each_others_results(copy):
    results, flags = copy
    exact = flags[: flags.index("--scoring")] + flags[flags.index("--laion_subset_size") :]
    fisher = PARITY / "fixture/abc/sd_fisher.pt"
    said = refusal([*exact, "--fisher_path", str(fisher)])
    assert "was made by --scoring removal, not exact; give --overwrite to replace it" in said


def test_the_printed_command_ranks_by_removal_again(world, copy):
    results, flags = copy
    record = json.loads(find(results).with_suffix(".json").read_text())
    command = record["circumstances"]["command"]
    assert "--scoring removal" in command and "--sketch_size 256" in command
    assert "--weight_selection" not in command and "--unlearn" not in command
    compute_influence.main([*flags, "--weight_selection", "cross-attn-kv", "--overwrite"])
    record = json.loads(find(results).with_suffix(".json").read_text())
    assert "--weight_selection cross-attn-kv" in record["circumstances"]["command"]


def test_a_dry_run_counts_backward_passes_and_writes_nothing(world, tmp_path, capsys):
    compute_influence.main([*world[2], "--result_dir", str(tmp_path / "new"), "--dry_run"])
    shown = capsys.readouterr().out
    assert "48 backward passes for the features, once; 4 for the queries" in shown
    assert not (tmp_path / "new").exists()


def test_evaluations_call_it_removal(copy):
    results, _ = copy
    assert method_of(results / "influence") == "removal"
    name = "tiny/gpt/blob/samples/00000"
    found = read_influences("removal", results / "influence", {name: ""})
    assert found.settings["settings"]["scoring"] == "removal"


def test_exemplars_of_a_customized_model_are_ranked_under_that_model(flags, tmp_path, capsys):
    tasks = json.loads((PARITY / "fixture/tasks.json").read_text())[:1]
    (tmp_path / "one.json").write_text(json.dumps(tasks))
    argv = [*flags, "--task_json", str(tmp_path / "one.json"), "--laion_subset_size", "8"]
    compute_influence.main([*argv, *REMOVAL])
    path = find(tmp_path / "results")
    arrays = read_influence(path, "")
    assert 0 < arrays["is_exemplar"].sum() < len(arrays["ids"])
    groups = dict(np.load(path))
    assert groups["group_names"].tolist() == ["exemplars"]
    np.testing.assert_array_equal(groups["group_of"] == 0, arrays["is_exemplar"])
    assert groups["group_scores"][0] > arrays["influence"][arrays["is_exemplar"]].max()
    report.main([str(tmp_path / "results")])
    page = (path.parent / "report.html").read_text()
    assert "without all of its images together" in page and "not measured</b>" in page
    assert {folder.name for folder in (tmp_path / "results/removal/tiny/blob").iterdir()} == {
        "exemplar",
        "laion",
        "solved",
    }
    capsys.readouterr()
    evaluate.main([*argv, "--output", str(tmp_path / "evaluated")])
    shown = capsys.readouterr().out
    assert "Recall@10" in shown and "nan" not in shown and "What unlearning did" not in shown


def test_a_box_changes_the_scores_and_is_said_wherever_they_are_read(copy, capsys):
    results, flags = copy
    path = find(results)
    before = read_influence(path, "")["influence"]
    boxed = [*flags, "--box", "0", "0", "30", "60"]
    assert "box is None, expected [0, 0, 30, 60]" in refusal(boxed)
    assert "reaches out of" in refusal([*boxed[:-1], "5000", "--overwrite"])
    compute_influence.main([*boxed, "--overwrite"])
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["identity"]["settings"]["box"] == [0, 0, 30, 60]
    assert "--box 0 0 30 60" in record["circumstances"]["command"]
    assert not np.allclose(read_influence(path, "")["influence"], before)
    assert "in the box 0 0 30 60" in capsys.readouterr().out
    report.main([str(results)])
    assert "In the box 0 0 30 60: " in (path.parent / "report.html").read_text()
