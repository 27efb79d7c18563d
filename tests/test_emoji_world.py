"""The embedded emoji world is whole, and the two scripts find the exemplars of its demo."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import compute_influence
import compute_training_loss
from unlearn.commands import fisher
from unlearn.datasets.tasks import group_by_model, load_tasks

REPOSITORY = Path(__file__).parent.parent
EMOJI, DEMO = REPOSITORY / "data/emoji", str(REPOSITORY / "tasks/emoji_demo.json")


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """The emoji world with its first 48 base images, so that a sweep takes seconds."""
    root = tmp_path_factory.mktemp("world") / "emoji"
    shutil.copytree(
        EMOJI,
        root,
        ignore=shutil.ignore_patterns(
            "laion_subset", "laion_*.npy", "laion_*.json", "sd_fisher.*", ".build"
        ),
    )
    (root / "laion_subset/images").mkdir(parents=True)
    for path in sorted((EMOJI / "laion_subset/images").iterdir())[:48]:
        shutil.copy(path, root / "laion_subset/images")
    captions = (EMOJI / "laion_subset/captions.txt").read_text().splitlines()[:48]
    (root / "laion_subset/captions.txt").write_text("\n".join(captions) + "\n")
    return root


def test_every_image_has_a_caption_and_no_held_out_family_is_among_them():
    captions = (EMOJI / "laion_subset/captions.txt").read_text().splitlines()
    assert len(captions) == len(list((EMOJI / "laion_subset/images").iterdir())) >= 1300
    assert len(set(captions)) == len(captions)
    assert not {"red heart", "two oclock", "crying cat", "full moon", "leo"} & set(captions)


def test_reported_and_tuning_models_are_disjoint_and_every_task_is_sound():
    reported, tuning = (
        group_by_model(load_tasks(REPOSITORY / f"tasks/emoji_{use}.json", EMOJI))
        for use in ("reported", "tuning")
    )
    assert not reported.keys() & tuning.keys()
    assert len(reported) == 10 and all(len(tasks) >= 4 for tasks in reported.values())
    assert all(1 <= len(tasks[0].exemplar_paths) <= 10 for tasks in reported.values())


def test_stock_diffusers_generates_from_the_pipeline():
    pipeline = DiffusionPipeline.from_pretrained(EMOJI / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    image = np.asarray(
        pipeline(
            "red apple",
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]
    )
    assert image.shape == (32, 32, 3)
    border = np.concatenate([image[0], image[-1]])
    centre = image[10:24, 8:24].reshape(-1, 3).mean(axis=0)
    assert border.mean() > 225 and centre[0] > centre[1:].max() + 40  # something red on white paper


def test_the_two_scripts_rank_the_exemplars_of_the_demo_far_above_chance(
    small_world, tmp_path, capsys
):
    flags = [
        "--task_json",
        DEMO,
        "--dataroot",
        str(small_world),
        "--result_dir",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    compute_training_loss.main(flags)
    compute_influence.main(
        [
            *flags,
            "--unlearn_grad_accum_steps",
            "20",
            "--fisher_path",
            str(EMOJI / "sd_fisher.safetensors"),
        ]
    )
    folder = (
        tmp_path
        / "influence"
        / Path(json.loads(Path(DEMO).read_text())[0]["synth_image_path"]).relative_to("synth")
    )
    with np.load(folder / "influence.npz") as result:
        is_exemplar, rank = result["is_exemplar"], result["rank"]
        assert is_exemplar[rank[:10]].sum() > 2 * 10 * is_exemplar.mean()
        assert result["query_loss_after"] > result["query_loss_before"]
    assert "exemplar/object" in capsys.readouterr().out


def test_the_fisher_of_the_world_says_that_it_is_of_its_pipeline(small_world):
    record = json.loads((EMOJI / "sd_fisher.json").read_text())["identity"]
    fisher.main(
        [
            "--dataroot",
            str(small_world),
            "--num_samples",
            "50",
            "--output",
            str(small_world / "own.safetensors"),
            "--device",
            "cpu",
        ]
    )
    assert (
        record["weights"]
        == json.loads((small_world / "own.json").read_text())["identity"]["weights"]
    )


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (REPOSITORY / "data/emoji_builder").glob("[a-z]*.py"))
)
def test_every_part_of_the_builder_can_be_imported(name, monkeypatch):
    """It is run once in years, and nothing else would notice that what it imports has moved."""
    pytest.importorskip("fontTools")
    monkeypatch.syspath_prepend(str(REPOSITORY / "data"))
    importlib.import_module(f"emoji_builder.{name}")
