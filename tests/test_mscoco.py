"""The MSCOCO experiment whole, on a miniature in COCO's own formats: download, encode, losses,
Fisher, influence."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_miniature import CONFIG, NUM_IMAGES, build_miniature
from test_bad_input import files
from test_download import ABU, Hub, command, pack

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution.losses import sample_losses
from unlearn.commands import encode, evaluate, fisher, retrain, tasks
from unlearn.datasets.settings import read_settings
from unlearn.datasets.training_sets import open_training_set
from unlearn.evaluation.rankings import read_influence
from unlearn.models.pipelines import load_model
from unlearn.models.unets import load_unet
from unlearn.noise import image_noise
from unlearn.runtime.programs import run
from unlearn.storage.reading import read_array, read_json

SCRIPT = Path(__file__).parent.parent / "data/download_mscoco.sh"
INFLUENCE = "influence/sample/0.png/influence.npz"


@pytest.fixture(scope="module")
def attributed(tmp_path_factory):
    """The miniature from annotations and images to the influence of one query, by the commands of
    the README: its data root and its results."""
    folder = tmp_path_factory.mktemp("mscoco")
    root, results = build_miniature(folder / "mscoco"), folder / "results"
    flags = ["--dataroot", str(root), "--device", "cpu"]
    both = ["--task_json", str(folder / "tasks.json"), "--result_dir", str(results), *flags]
    tasks.main(["--dataroot", str(root), "--output", str(folder / "tasks.json")])
    (folder / "tasks.json").write_text(json.dumps(read_json(folder / "tasks.json")[:1]))
    run(encode.main, flags)
    run(fisher.main, [*flags, "--num_samples", "60"])
    run(compute_training_loss.main, both)
    run(compute_influence.main, both)
    return root, results


def test_the_miniature_runs_from_coco_files_to_the_influence_of_each_training_image(attributed):
    root, results = attributed
    influence = read_influence(results / INFLUENCE, "run it")
    names = [
        image["file_name"]
        for image in json.loads((root / "annotations/captions_train2017.json").read_text())[
            "images"
        ]
    ]
    assert (
        list(influence["ids"]) == [f"laion/{row:06d}" for row in range(NUM_IMAGES)]
        and not influence["is_exemplar"].any()
    )
    assert np.isfinite(influence["influence"]).all() and sorted(influence["rank"]) == list(
        range(NUM_IMAGES)
    )
    assert (
        influence["relative_weight_change"] < 0.3
        and influence["query_loss_after"] > influence["query_loss_before"]
    )
    rows = (results / INFLUENCE).with_suffix(".csv").read_text().splitlines()[1:]
    best = int(influence["rank"][0])
    assert names[best] in rows[0] and (results / INFLUENCE).with_name("visualization.jpg").exists()
    assert (results / "orig_loss/base/laion_loss.npy").exists() and not (
        results / "orig_loss/base/exemplar_loss.npy"
    ).exists()


def test_a_loss_is_the_mean_over_five_captions_and_twenty_timesteps_each_with_noise_of_its_own(
    attributed,
):
    root, results = attributed
    model = load_model(str(root / "pipeline"), "cpu", str(root / "unet"))
    training_set = open_training_set(root, "mscoco", (4, 4, 4), {"embeddings": (77, 32)})
    losses, view, row = read_array(results / "orig_loss/base/laion_loss.npy"), 1, 7
    places = [
        (view, caption, timestep, 0) for caption in range(5) for timestep in range(0, 1000, 50)
    ]
    normals = torch.from_numpy(image_noise(0, "mscoco", training_set.ids[row], places, (4, 4, 4)))
    latents = torch.from_numpy(training_set.latents[view, row].copy()).expand(100, -1, -1, -1)
    embeddings = torch.from_numpy(training_set.embeddings[row].copy()).repeat_interleave(20, dim=0)
    with torch.no_grad():
        expected = sample_losses(
            model,
            latents,
            normals,
            torch.arange(0, 1000, 50).repeat(5),
            {"embeddings": embeddings},
        ).mean()
    assert losses.shape == (2 * NUM_IMAGES,) and float(
        losses[view * NUM_IMAGES + row]
    ) == pytest.approx(float(expected), rel=1e-5)
    assert len({normal.numpy().tobytes() for normal in normals}) == 100


def test_a_dry_run_counts_every_caption(attributed, capsys):
    root, results = attributed
    where = [
        "--task_json",
        str(results.parent / "tasks.json"),
        "--dataroot",
        str(root),
        "--device",
        "cpu",
    ]
    compute_training_loss.main([*where, "--dry_run"])
    printed = capsys.readouterr().out
    assert f"1 sweeps of {NUM_IMAGES * 2 * 5 * 20:,} forward passes" in printed and re.search(
        r"batch_size +8000\n", printed
    )


def test_the_committed_configuration_is_the_papers_unet_and_settings(tmp_path):
    parts = load_unet(CONFIG / "unet", trained=False)
    num_weights = sum(parameter.numel() for parameter in parts["unet"].parameters())
    assert round(8 * num_weights / 2**20) == 438, (
        "FACTS section 5: its Fisher, float64 of every weight, takes 438 MB"
    )
    assert (
        parts["scheduler"].config.num_train_timesteps == 1000
        and parts["scheduler"].config.prediction_type == "epsilon"
    )
    shutil.copytree(CONFIG, tmp_path / "mscoco")
    settings = read_settings(tmp_path / "mscoco")
    assert (
        settings["unet"] == str(tmp_path / "mscoco/unet")
        and settings["num_train"] == settings["largest_subset"] == 118_287
    )
    assert (settings["unlearn_steps"], settings["unlearn_lr"]) == (1, 0.01)
    assert (settings["unlearn_batch_size"], settings["unlearn_grad_accum_steps"]) == (80, 625)
    assert settings["batch_size"] == 80 * 5 * settings["time_samples"] == 8000
    assert (settings["train_epochs"], settings["train_lr"], settings["train_batch_size"]) == (
        200,
        1e-4,
        128,
    )


@pytest.fixture
def root(attributed, tmp_path):
    """A private copy of the miniature."""
    return Path(shutil.copytree(attributed[0], tmp_path / "mscoco", symlinks=True))


def test_published_samples_become_tasks_of_the_base_model_with_their_rows(root, tmp_path):
    tasks.main(["--dataroot", str(root), "--output", str(tmp_path / "tasks.json")])
    captions = (root / "sample_caption.txt").read_text().splitlines()
    assert read_json(tmp_path / "tasks.json") == [
        {
            "synth_image_path": f"sample/{row}.png",
            "prompt": caption,
            "latents": "coco17_sample_latents.npy",
            "embeddings": "coco17_sample_text_embeddings.npy",
            "row": row,
        }
        for row, caption in enumerate(captions)
    ]


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda root: (root / "sample/1.png").unlink(),
            "sample/1.png: no such file, but sample_caption.txt has 2 lines",
        ),
        (
            lambda root: (root / "sample_caption.txt").write_text("\nb\n"),
            "sample_caption.txt: line 1 is empty",
        ),
        (
            lambda root: (root / "sample_caption.txt").write_text("a\n\n"),
            "expected 1 rows, as sample_caption.txt has lines, found [2, ",
        ),
        (
            lambda root: [
                (root / "sample_caption.txt").write_text("a\n\n"),
                (root / "coco17_sample_latents.npy").unlink(),
            ],
            "sample/1.png: has no caption, sample_caption.txt has 1 lines",
        ),
        (
            lambda root: (root / "sample_caption.txt").write_text(""),
            "expected a caption a line, found an empty file",
        ),
        (
            lambda root: np.save(root / "coco17_sample_latents.npy", np.zeros((3, 4, 4, 4))),
            "expected 2 rows, as sample_caption.txt has lines, found [3, ",
        ),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(change, said, root, tmp_path):
    change(root)
    with pytest.raises(UserError) as error:
        tasks.main(["--dataroot", str(root), "--output", str(tmp_path / "tasks.json")])
    assert said in str(error.value) and not (tmp_path / "tasks.json").exists()


class Coco(ThreadingHTTPServer):
    """A stand-in of images.cocodataset.org: path -> bytes, ranges of them too. A GET of `cut`
    breaks off halfway."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), CocoAnswer)
        self.files, self.cut, self.ranges = files, None, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class CocoAnswer(BaseHTTPRequestHandler):
    """One request to it."""

    def log_message(self, *args):
        """Stays silent."""

    def do_GET(self):
        """A file or its end."""
        content = self.server.files[self.path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.ranges.append((self.path, start))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(
                content[start : len(content) // 2 if self.path == self.server.cut else None]
            )

    do_HEAD = do_GET


def zip_bytes(contents):
    """A zip archive of the files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def published(attributed, tmp_path_factory):
    """What hub and COCO hold of the miniature, as published: (data root as it should become, hub,
    COCO)."""
    folder = tmp_path_factory.mktemp("published")
    root = build_miniature(folder / "mscoco")
    (root / "pipeline").unlink()
    np.save(root / "coco17_train_latents.npy", np.zeros((2 * NUM_IMAGES, 4, 4, 4), np.float16))
    np.save(root / "coco17_train_text_embeddings.npy", np.ones((NUM_IMAGES, 5, 77, 32), np.float16))
    torch.save({"a": torch.ones(3)}, root / "fisher_info.pt")
    for name in "dataset.json", "unet/config.json", "unet/scheduler_config.json":
        shutil.copy(CONFIG / name, root / name)
    content = {path.relative_to(root).as_posix(): data for path, data in files(root).items()}
    packed = {
        "coco17_train_text_embeddings.7z": ["coco17_train_text_embeddings.npy"],
        "sample.7z": [name for name in content if "sample/" in name],
    }
    plain = [
        "fisher_info.pt",
        "coco17_train_latents.npy",
        "coco17_sample_latents.npy",
        "coco17_sample_text_embeddings.npy",
        "sample_caption.txt",
    ]
    hub = {(ABU, f"mscoco/{name}"): content[name] for name in plain} | {
        (ABU, "mscoco/model.bin"): content["unet/model.bin"]
    }
    for name, members in packed.items():
        volumes = pack(
            folder / name, {Path(member).name: content[member] for member in members}, "20k"
        )
        hub |= {(ABU, f"mscoco/{name}{suffix}"): data for suffix, data in volumes.items()}
    coco = {
        "/zips/train2017.zip": zip_bytes(
            {name: data for name, data in content.items() if name.startswith("train2017/")}
        ),
        "/annotations/annotations_trainval2017.zip": zip_bytes(
            {
                "annotations/instances_train2017.json": b"{}",
                **{name: data for name, data in content.items() if name.startswith("annotations/")},
            }
        ),
    }
    return content, Hub(hub | {(ABU, "abc/not_wanted.bin"): b"not wanted"}), Coco(coco)


def download(published, root):
    """Runs the script to its end."""
    _, hub, coco = published
    options = command(hub, root, COCO_ENDPOINT=f"http://127.0.0.1:{coco.server_port}")
    options["args"][1] = str(SCRIPT)
    return subprocess.run(**options, capture_output=True, text=True, timeout=60)


def content_of(root):
    """What a data root holds: path -> bytes, without the script's own files."""
    return {
        path.relative_to(root).as_posix(): data
        for path, data in files(root).items()
        if ".download" not in path.parts
    }


needs_tools = [
    pytest.mark.skipif(
        not all(map(shutil.which, ("7z", "curl"))), reason="needs 7z and curl, as the script does"
    ),
    pytest.mark.skipif(
        not (Path(sys.executable).parent / "hf").exists(), reason="needs the hf command"
    ),
]


class TestDownload:
    """data/download_mscoco.sh against small stand-ins of the hub and of COCO."""

    pytestmark = needs_tools

    def test_an_interrupted_download_goes_on_and_gives_the_layout(self, published, tmp_path):
        content, _, coco = published
        root, coco.cut = tmp_path / "mscoco", "/zips/train2017.zip"
        result = download(published, root)
        assert (
            result.returncode == 2
            and "train2017.zip failed (see above); run the same command again to go on"
            in result.stderr
        )
        assert "unet/model.bin" in content_of(root) and "train2017" not in {
            name.split("/")[0] for name in content_of(root)
        }
        coco.cut, coco.ranges = None, []
        result = download(published, root)
        assert result.returncode == 0, result.stderr
        assert content_of(root) == content
        assert [path for path, _ in coco.ranges] == ["/zips/train2017.zip"] and coco.ranges[0][
            1
        ] > 0, "only what was missing"
        assert f"{NUM_IMAGES} images with" in result.stdout and "2 samples" in result.stdout
        assert f"next: python -m unlearn tasks --dataroot {root}" in result.stdout
        coco.ranges = []
        assert download(published, root).returncode == 0 and not coco.ranges, (
            "running again downloads nothing"
        )
        assert read_settings(root)["fisher"] == "fisher_info.pt"
        (root / f"train2017/{sorted(os.listdir(root / 'train2017'))[0]}").unlink()
        result = download(published, root)
        assert (
            result.returncode == 2
            and f"no such file (1 of the {NUM_IMAGES} annotated images are missing)"
            in result.stderr
        )

    def test_a_damaged_archive_of_coco_comes_anew_with_the_same_command(self, published, tmp_path):
        content, _, coco = published
        whole, root = coco.files["/annotations/annotations_trainval2017.zip"], tmp_path / "mscoco"
        middle = len(whole) // 2
        coco.files["/annotations/annotations_trainval2017.zip"] = (
            whole[:middle] + bytes(400) + whole[middle + 400 :]
        )
        result = download(published, root)
        coco.files["/annotations/annotations_trainval2017.zip"] = whole
        assert (
            result.returncode == 2
            and "annotations_trainval2017.zip: damaged or incomplete, it was removed"
            in result.stderr
        )
        assert not content_of(root)
        result = download(published, root)
        assert result.returncode == 0, result.stderr
        assert content_of(root) == content

    def test_help_says_how_to_use_it_and_downloads_nothing(self, tmp_path):
        result = subprocess.run(
            ["bash", str(SCRIPT), "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=20,
        )
        assert (
            result.returncode == 0
            and "bash data/download_mscoco.sh /scratch/mscoco" in result.stdout
        )
        assert not list(tmp_path.iterdir())
        result = subprocess.run(
            ["bash", str(SCRIPT), "--what"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=20,
        )
        assert (
            result.returncode == 2
            and result.stderr == "error: --what: unknown option; expected a folder or --help\n"
        )


def test_the_miniature_goes_on_to_leave_k_out(attributed, tmp_path):
    """Models of the downloaded images retrained without the top 3, without 3 at random and on
    halves; the tables of both."""
    root, results = attributed
    flags = [
        "--dataroot",
        str(root),
        "--device",
        "cpu",
        "--result_dir",
        str(shutil.copytree(results, tmp_path / "results")),
        "--task_json",
        str(results.parent / "tasks.json"),
    ]
    recipe = [
        "--train_epochs",
        "1",
        "--train_batch_size",
        "8",
        "--loss_time_samples",
        "4",
        "--no_pictures",
    ]
    retrain.main(["full", *flags, *recipe])
    retrain.main(
        [
            "without",
            *flags,
            *recipe,
            "--top_k",
            "3",
            "--influence",
            str(tmp_path / "results/influence"),
        ]
    )
    retrain.main(["random", *flags, *recipe, "--top_k", "3"])
    retrain.main(["subsets", *flags, *recipe, "--count", "3", "--stack", "3"])
    evaluate.main(
        [
            *flags,
            "--retrained",
            str(tmp_path / "results/retrained"),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    rows = list(csv.DictReader((tmp_path / "out/leave_k_out.csv").read_text().splitlines()))
    assert [(row["method"], row["k"]) for row in rows] == [
        ("full, seed 0", "0"),
        ("ours", "3"),
        ("random", "3"),
    ]
    assert float(rows[0]["dL"]) == 0 and all(float(row["dL"]) != 0 for row in rows[1:])
    assert [
        row["method"] for row in csv.DictReader((tmp_path / "out/lds.csv").read_text().splitlines())
    ] == ["ours", "random"]
