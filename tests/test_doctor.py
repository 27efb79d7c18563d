"""`python -m unlearn doctor`: every fault is found and comes with what to do; nothing is written
and no model is loaded."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from test_bad_input import files

import compute_training_loss
from unlearn import noise
from unlearn.commands import doctor, examination, machine
from unlearn.models import pipelines
from unlearn.storage import leases
from unlearn.storage.records import record_path, write_record

TASKS = PARITY / "fixture/tasks.json"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A root with the losses of its model cached."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(PARITY / "fixture/abc", folder / "abc")
    compute_training_loss.main(
        [*flags_of(folder), "--time_samples", "10", "--laion_subset_size", "3"]
    )
    return folder


@pytest.fixture
def folder(scored, tmp_path):
    return Path(shutil.copytree(scored, tmp_path / "copy"))


def flags_of(folder):
    return [
        "--task_json",
        str(TASKS),
        "--dataroot",
        str(folder / "abc"),
        "--sd_version",
        str(PARITY / "fixture/sd-tiny"),
        "--result_dir",
        str(folder / "results"),
        "--device",
        "cpu",
    ]


def examine(folder, capsys, *more):
    """(status, what it printed); the later of two equal flags holds."""
    before = files(folder)
    with pytest.raises(SystemExit) as end:
        doctor.main([*flags_of(folder), "--laion_subset_size", "3", *more])
    assert files(folder) == before, "something was written"
    return end.value.code, capsys.readouterr().out


def test_where_nothing_is_wrong_it_says_how_far_the_runs_have_come(folder, capsys, monkeypatch):
    monkeypatch.setattr(pipelines, "load_model", None)
    status, text = examine(folder, capsys)
    assert status == 0 and "problems: 0" in text
    assert (
        "60 training images, latents and embeddings given" in text
        and "2 queries of 1 models" in text
    )
    assert "1 of 1 models have cached losses" in text and "0 of 2 queries are ranked" in text
    assert "-> python compute_influence.py --task_json" in text


def change_bytes(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def leave_claim(folder, owner=None, age=0):
    """A claim of this living process, or of another owner, so many seconds old."""
    path = folder / "results/influence/work.claim"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(owner or leases.describe_owner()))
    stamp = time.time() - age
    os.utime(path, (stamp, stamp))


def dead_process():
    process = subprocess.Popen(["true"])
    process.wait()
    return {**leases.describe_owner(), "pid": process.pid}


def leave(name, content=b"x"):
    def write(folder):
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def leave_index(folder):
    leave("index/m/shards-0123/000000-of-000002.npy")(folder)
    leave("index/m/shards.txt")(folder)
    write_record(folder / "results/index/m/shards.txt", {})


LOSS = "results/orig_loss/tiny/blob/laion_loss.npy"
FAULTS = {  # what was done -> (how, whether it is a problem, what is said)
    "a damaged loss": (
        lambda folder: change_bytes(folder / LOSS),
        True,
        ["laion_loss.npy: its content is not what its record says", "--overwrite"],
    ),
    "a loss that is gone": (
        lambda folder: (folder / LOSS).unlink(),
        True,
        ["1 records without what they describe", "laion_loss.json", "delete them"],
    ),
    "a record that is gone": (
        lambda folder: record_path(folder / LOSS).unlink(),
        False,
        [
            "1 artefacts without a record",
            "laion_loss.npy",
            "--compat abu",
            "0 of 1 models have cached losses",
        ],
    ),
    "a record that is none": (
        lambda folder: record_path(folder / LOSS).write_text("[]"),
        True,
        ["laion_loss.json: not a record"],
    ),
    "a picture that is none": (
        lambda folder: (folder / "abc/synth/tiny/gpt/blob/samples/00001.png").write_bytes(b"no"),
        True,
        ["00001.png"],
    ),
    "a task that is gone": (
        lambda folder: shutil.rmtree(folder / "abc/models"),
        True,
        ["model_path: no such folder"],
    ),
    "a Fisher that is gone": (
        lambda folder: [path.unlink() for path in (folder / "abc").glob("sd_fisher*")],
        False,
        ["removal does not", "make it: python -m unlearn fisher"],
    ),
    "latents of another number": (
        lambda folder: np.save(
            folder / "abc/laion_latents.npy", np.zeros((5, 4, 8, 8), np.float32)
        ),
        True,
        ["expected 120 rows"],
    ),
    "a root that is gone": (
        lambda folder: shutil.rmtree(folder / "abc"),
        True,
        ["no such folder", "README"],
    ),
    "settings that are wrong": (
        lambda folder: (folder / "abc/dataset.json").write_text('{"nonsense": 1}'),
        True,
        ["unknown key nonsense"],
    ),
    "a claim of a living process": (leave_claim, False, ["at work on 1 pieces"]),
    "a claim of a dead process": (
        lambda folder: leave_claim(folder, dead_process()),
        False,
        ["1 claims whose owner is gone or silent", "work.claim"],
    ),
    "a silent claim of another host": (
        lambda folder: leave_claim(folder, {"host": "elsewhere", "pid": 1}, 1000),
        False,
        ["gone or silent"],
    ),
    "half a file": (
        leave("orig_loss/a.npy.host.1.part"),
        False,
        ["1 half-written files", "a.npy.host.1.part"],
    ),
    "chunks": (
        leave("orig_loss/m/.laion_loss-0123456789abcdef/000000-of-000004.npy"),
        False,
        ["1 of 4 chunks", "run the same command again to go on"],
    ),
    "an index without a shard": (
        leave_index,
        True,
        ["1 of its 2 shards are gone", "python -m unlearn index"],
    ),
    "a checkpoint": (
        leave("influence/q/weight_change.safetensors.0123456789abcdef.checkpoint"),
        False,
        ["unfinished unlearning"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_comes_with_what_to_do(name, folder, capsys):
    break_it, is_problem, words = FAULTS[name]
    break_it(folder)
    status, text = examine(folder, capsys)
    assert status == is_problem, text
    assert all(word in text for word in words), text


def test_given_latents_of_another_model_are_told_by_its_configurations(folder, capsys):
    latents = np.load(folder / "abc/laion_latents.npy")
    np.save(
        folder / "abc/laion_latents.npy",
        np.zeros((len(latents), 8, *latents.shape[2:]), np.float32),
    )
    status, text = examine(folder, capsys)
    assert (
        status == 1
        and f"laion_latents.npy: expected rows {list(latents.shape[1:])} of this model, found "
        f"[{len(latents)}, 8,"
        in text
    )


def test_parts_of_a_pipeline_that_do_not_fit_are_a_problem(folder, capsys):
    pipeline = shutil.copytree(PARITY / "fixture/sd-tiny", folder / "pipeline")
    config = json.loads((pipeline / "unet/config.json").read_text())
    (pipeline / "unet/config.json").write_text(json.dumps({**config, "in_channels": 9}))
    status, text = examine(folder, capsys, "--sd_version", str(pipeline))
    assert (
        status == 1
        and "its UNet takes 9 channels and gives 4" in text
        and "probably an inpainting UNet" in text
    )


def test_losses_cached_with_other_settings_are_told_before_they_are_refused(folder, capsys):
    (folder / "abc/dataset.json").write_text('{"time_samples": 5}')
    status, text = examine(folder, capsys)
    assert status == 0 and "1 models' losses were cached with timesteps 10, by default 5" in text
    assert "num_images 3, by default 4" in examine(folder, capsys, "--laion_subset_size", "4")[1]


@pytest.mark.parametrize(
    "module, name, value, words",
    [
        (
            machine,
            "version",
            lambda name: "0.1",
            ["torch: expected >=2.6, found 0.1", "python -m pip install 'torch>=2.6'"],
        ),
        (
            machine,
            "version",
            lambda name: "5.5.4" if name == "transformers" else "99",
            ["transformers: expected >=5.6, found 5.5.4"],
        ),
        (
            noise,
            "known_answer",
            lambda: "0",
            ["NumPy draws other noise than caches were made with"],
        ),
        (machine.os, "access", lambda *args: False, ["no permission to write in"]),
        (machine, "memory_limit", lambda: 1000, ["may need 0.0 GB", "SLURM: --mem"]),
        (
            machine,
            "choose_device",
            machine.choose_device,
            ["--device cuda:9: this machine has"],
        ),
    ],
)
def test_an_environment_that_does_not_serve_is_a_problem(
    module, name, value, words, folder, capsys, monkeypatch
):
    monkeypatch.setattr(module, name, value)
    status, text = examine(
        folder, capsys, *(["--device", "cuda:9"] if name == "choose_device" else [])
    )
    assert status == 1 and all(word in text for word in words), text


def test_a_hub_name_says_whether_it_is_in_the_cache(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(examination, "try_to_load_from_cache", lambda name, file: None)
    assert (
        "not in the hub's cache; it is downloaded at first use"
        in examine(folder, capsys, "--sd_version", "CompVis/stable-diffusion-v1-4")[1]
    )
    monkeypatch.setattr(
        examination, "try_to_load_from_cache", lambda name, file: "/cache/model_index.json"
    )
    assert (
        "CompVis/stable-diffusion-v1-4, in the hub's cache"
        in examine(folder, capsys, "--sd_version", "CompVis/stable-diffusion-v1-4")[1]
    )
