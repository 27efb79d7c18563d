"""A user's mistake ends in one line that names the item, status 2, no model loaded where none is
needed, nothing written."""

import errno
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image

import compute_influence
import compute_training_loss
from unlearn import UserError, running
from unlearn.attribution import sweeps
from unlearn.commands import examination, inputs, machine, preparation
from unlearn.datasets import encoders, queries
from unlearn.models import checks, parts, pipelines
from unlearn.runtime import programs
from unlearn.storage.artifacts import whole_file, write_array, write_json, write_tensors
from unlearn.storage.records import write_record

TASKS = json.loads((PARITY / "fixture/tasks.json").read_text())
SMALL = ["--laion_subset_size", "3"]
LOSS_FLAGS = [*SMALL, "--time_samples", "2", "--batch_size", "6"]
INFLUENCE_FLAGS = [
    *SMALL,
    "--loss_time_samples",
    "2",
    "--loss_batch_size",
    "6",
    "--unlearn_steps",
    "1",
    "--unlearn_lr",
    "100",
    "--unlearn_batch_size",
    "1",
    "--unlearn_grad_accum_steps",
    "1",
]
SCRIPTS = {
    "loss": (compute_training_loss, LOSS_FLAGS),
    "influence": (compute_influence, INFLUENCE_FLAGS),
}


def refused(capsys, main, argv):
    """Runs a script in this process; the one line with which it ended, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        programs.run(main, argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def files(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def no_model(monkeypatch):
    """Makes loading a model a failure: what is wrong must be told before."""

    def load_model(*arguments, **more):
        raise AssertionError("a model was loaded before the mistake was told")

    for script, _ in SCRIPTS.values():
        monkeypatch.setattr(preparation, "load_model", load_model)


ENCODE = queries.encode_images
ENCODED = {}  # latents of pictures, by their bytes


def encode_images(model, paths, resolution, mirrored=False, batch_size=20, encode=ENCODE):
    """Most of what a run on the miniature data root costs, once."""
    contents = tuple(Path(path).read_bytes() for path in paths)
    key = model.pipeline, contents, resolution, mirrored
    if key not in ENCODED:
        pictures = [io.BytesIO(content) for content in contents]
        ENCODED[key] = encode(model, pictures, resolution, mirrored)
    return ENCODED[key]


@pytest.fixture
def with_model(monkeypatch, model):
    """Lends the scripts the model that is loaded already, and the latents that it made already."""
    monkeypatch.setattr(queries, "encode_images", encode_images)
    for script, _ in SCRIPTS.values():
        monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)


@pytest.fixture(scope="session")
def cached(tmp_path_factory, model):
    """A result folder with the losses of the first query's model."""
    folder = tmp_path_factory.mktemp("cached")
    (folder / "tasks.json").write_text(json.dumps(TASKS[:1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "load_model", lambda *names, **more: model)
        patch.setattr(queries, "encode_images", encode_images)
        compute_training_loss.main(
            [
                "--task_json",
                str(folder / "tasks.json"),
                "--dataroot",
                str(PARITY / "fixture/abc"),
                "--device",
                "cpu",
                "--sd_version",
                str(PARITY / "fixture/sd-tiny"),
                "--result_dir",
                str(folder / "results"),
                *LOSS_FLAGS,
            ]
        )
    return folder / "results"


@pytest.fixture
def results(tmp_path, cached):
    """A private copy of the result folder with cached losses."""
    return shutil.copytree(cached, tmp_path / "results")


@pytest.fixture
def task_flags(flags, tmp_path):
    """Flags of both scripts with a private task file of one task, which `edit` may change."""
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(TASKS[:1]))
    return [str(path) if value == flags[1] else value for value in flags]


def change_task(**changes):
    """Writes a task file whose second task (index 1) differs from a good one; a value of ...
    removes the key."""

    def edit(root, path):
        second = {**TASKS[1], **changes}
        path.write_text(
            json.dumps(
                [TASKS[0], {key: value for key, value in second.items() if value is not ...}]
            )
        )

    return edit


def write_task_file(text):
    return lambda root, path: path.write_bytes(text)


def link_out(root, path):
    (path.parent / "outside.png").write_bytes((root / TASKS[1]["synth_image_path"]).read_bytes())
    (root / "synth/link.png").symlink_to(path.parent / "outside.png")
    change_task(synth_image_path="synth/link.png")(root, path)


def link_loop(root, path):
    (root / "synth/loop.png").symlink_to(root / "synth/loop.png")
    change_task(synth_image_path="synth/loop.png")(root, path)


def share_result_folder(root, path):
    source = root / TASKS[0]["synth_image_path"]
    Image.open(source).save(source.with_suffix(".jpg"))
    change_task(synth_image_path=str(Path(TASKS[0]["synth_image_path"]).with_suffix(".jpg")))(
        root, path
    )


def share_loss_folder(root, path):
    shutil.copytree(root / "models/tiny", root / "tiny")
    change_task(model_path="tiny/blob")(root, path)


def edit_test_case(entries):
    return lambda root, path: (root / "json/test_tiny.json").write_text(
        entries if isinstance(entries, str) else json.dumps(entries)
    )


def truncate(name, keep):
    return lambda root, path: (root / name).write_bytes((root / name).read_bytes()[:keep])


def remove(name):
    return lambda root, path: (root / name).unlink()


def rewrite_array(name, change):
    return lambda root, path: np.save(root / name, change(np.load(root / name)))


def write_settings(settings):
    return lambda root, path: (root / "dataset.json").write_text(json.dumps(settings))


class Evil:
    """Leaves a file named `ran` where a reader of pickles runs it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


WEIGHTS = "models/tiny/blob/pytorch_custom_diffusion_weights.pt"
FAULTS = {  # what the user did -> (how, what the error says: item, expected, found)
    "task file that is not JSON": (
        write_task_file(b'[{"prompt": }]'),
        ["--task_json", "tasks.json: not valid JSON", "line 1 column 13"],
    ),
    "task file that is not text": (
        write_task_file(b"\xff\xfe\x00["),
        ["--task_json", "tasks.json: UTF-16 text; save it as UTF-8"],
    ),
    "task file with a number of thousands of digits": (
        write_task_file(b"[" + b"9" * 5000 + b"]"),
        ["--task_json", "tasks.json: not valid JSON"],
    ),
    "task file nested too deep": (
        write_task_file(b"[" * 100_000),
        ["--task_json", "tasks.json: not valid JSON"],
    ),
    "task file with an object": (
        write_task_file(b"{}"),
        ["--task_json", "expected a list", "found dict"],
    ),
    "task file with no task": (
        write_task_file(b"[]"),
        ["--task_json", "expected a list with at least one entry", "found an empty list"],
    ),
    "task file with a string": (
        write_task_file(b'["a"]'),
        ["tasks.json, task 0", "expected an object", "found str"],
    ),
    "task without a key": (change_task(prompt=...), ["tasks.json, task 1: key prompt is missing"]),
    "task with another name for its model": (
        change_task(model_dir="models/x"),
        ["task 1: unknown key model_dir; did you mean model_path? expected some of"],
    ),
    "task with exemplars of its own": (
        change_task(exemplars=["a.png"]),
        ["task 1: unknown key exemplars; expected some of synth_image_path"],
    ),
    "task with a misspelt key": (
        change_task(latent=None),
        ["task 1: unknown key latent; did you mean latents?"],
    ),
    "task with a key twice": (
        write_task_file(b'[{"prompt": "a", "seed": 1, "prompt": "b"}]'),
        ["tasks.json: not valid JSON (the key prompt is written twice"],
    ),
    "prompt that is a number": (
        change_task(prompt=3),
        ["task 1: prompt: expected a string, found 3"],
    ),
    "prompt with half a character": (
        change_task(prompt="\ud800"),
        ["task 1: prompt: expected Unicode text", r"\ud800"],
    ),
    "test_case_ind that is a string": (
        change_task(test_case_ind="0"),
        ["task 1: test_case_ind: expected a whole number, found '0'"],
    ),
    "test_case_ind that is a truth value": (
        change_task(test_case_ind=True),
        ["task 1: test_case_ind: expected a whole number, found True"],
    ),
    "test_case_ind out of range": (
        change_task(test_case_ind=7),
        ["task 1: test_case_ind: expected 0 to 0 in test_tiny, found 7"],
    ),
    "negative test_case_ind": (
        change_task(test_case_ind=-1),
        ["task 1: test_case_ind: expected 0 to 0 in test_tiny, found -1"],
    ),
    "unknown test_case": (
        change_task(test_case="test_other"),
        ["test_case test_other", "this data root has: test_artchive, test_tiny"],
    ),
    "test_case that goes up": (
        change_task(test_case="../../x"),
        ["test_case ../../x: expected a path inside"],
    ),
    "synth_image_path that goes up": (
        change_task(synth_image_path="../a.png"),
        ["task 1: synth_image_path: expected a path inside the data root", "../a.png"],
    ),
    "synth_image_path that goes up and down": (
        change_task(synth_image_path="synth/../" + TASKS[1]["synth_image_path"]),
        ["task 1: synth_image_path: expected a path inside the data root"],
    ),
    "absolute synth_image_path": (
        change_task(synth_image_path="/etc/passwd"),
        ["task 1: synth_image_path: expected a path inside", "/etc/passwd"],
    ),
    "symlink out of the data root": (
        link_out,
        ["task 1: synth_image_path: expected a path inside", "synth/link.png"],
    ),
    "symlink to itself": (link_loop, ["task 1: synth_image_path", "loop.png"]),
    "path with NUL": (
        change_task(synth_image_path="a\0b"),
        ["task 1: synth_image_path: expected text without NUL", r"a\x00b"],
    ),
    "path that is too long": (
        change_task(synth_image_path="a" * 5000),
        ["task 1: synth_image_path: expected a path of names of at most 200 bytes"],
    ),
    "missing synth_image_path": (
        change_task(synth_image_path="synth/x.png"),
        ["task 1: synth_image_path: no such file", "synth/x.png"],
    ),
    "missing model_path": (
        change_task(model_path="models/x"),
        ["task 1: model_path: no such folder", "models/x"],
    ),
    "model_path that goes up": (
        change_task(model_path="models/../../x"),
        ["task 1: model_path: expected a path inside the data root", "models/../../x"],
    ),
    "the same query twice": (
        change_task(**TASKS[0]),
        ["task 1: synth_image_path", "the folder of task 0", TASKS[0]["synth_image_path"]],
    ),
    "the same query spelled otherwise": (
        change_task(**{**TASKS[0], "synth_image_path": "./" + TASKS[0]["synth_image_path"]}),
        ["task 1: synth_image_path", "the folder of task 0"],
    ),
    "queries that differ by suffix": (
        share_result_folder,
        ["task 1: synth_image_path", "00000.jpg", "the folder of task 0", "00000.png"],
    ),
    "models that share a folder of losses": (
        share_loss_folder,
        ["tiny/blob: its losses would stand in the folder of models/tiny/blob"],
    ),
    "tasks that disagree on one model": (
        change_task(train_prompt="other"),
        [
            "models/tiny/blob",
            TASKS[0]["synth_image_path"],
            TASKS[1]["synth_image_path"],
            "different exemplars or train prompts",
        ],
    ),
    "test case that is not JSON": (
        edit_test_case("{"),
        ["test case", "json/test_tiny.json: not valid JSON"],
    ),
    "test case without exemplars": (
        edit_test_case([{"category": "x"}]),
        ["json/test_tiny.json, entry 0", "a list `exemplar`", "found {'category': 'x'}"],
    ),
    "exemplar that is a number": (
        edit_test_case([{"exemplar": [3]}]),
        ["json/test_tiny.json, entry 0", "a list `exemplar` of paths"],
    ),
    "exemplar outside the data root": (
        edit_test_case([{"exemplar": ["dataset/../../x.png"]}]),
        ["task 0: exemplar: expected a path inside"],
    ),
    "missing exemplar": (
        edit_test_case([{"exemplar": ["dataset/exemplar/x.png"]}]),
        ["task 0: exemplar: no such file", "exemplar/x.png"],
    ),
    "truncated query": (
        truncate(TASKS[0]["synth_image_path"], 300),
        ["image ", "00000.png: cannot be read, it may be truncated"],
    ),
    "query that is no image": (
        truncate(TASKS[0]["synth_image_path"], 3),
        ["image ", "00000.png: cannot be read"],
    ),
    "truncated exemplar": (
        truncate("exemplar/tiny/0.png", 300),
        ["image ", "exemplar/tiny/0.png: cannot be read"],
    ),
    "truncated customized weights": (
        truncate(WEIGHTS, 500),
        ["customized weights", "pytorch_custom_diffusion_weights.pt: cannot be read as tensors"],
    ),
    "no customized weights": (
        remove(WEIGHTS),
        ["customized weights", "pytorch_custom_diffusion_weights.pt: no such file"],
    ),
    "truncated latents": (
        truncate("laion_latents.npy", 1000),
        ["latents", "laion_latents.npy: not a complete .npy array"],
    ),
    "latents of too few rows": (
        rewrite_array("laion_latents.npy", lambda array: array[:-1]),
        ["laion_latents.npy: expected 120 rows", "60 images", "found 119"],
    ),
    "latents of whole numbers": (
        rewrite_array("laion_latents.npy", lambda array: array.astype(int)),
        ["laion_latents.npy: expected [2N, C, h, w] of floats", "int64"],
    ),
    "embeddings without tokens": (
        rewrite_array("laion_text_embeddings.npy", lambda array: array[:, 0]),
        ["laion_text_embeddings.npy: expected [N, tokens, features] of floats, found [60, "],
    ),
    "no rows": (
        rewrite_array("laion_text_embeddings.npy", lambda array: array[:0]),
        ["laion_text_embeddings.npy: expected [N, tokens, features]", "found [0, "],
    ),
    "latents of Python objects": (
        lambda root, path: np.save(
            root / "laion_latents.npy", np.array([Evil(root / "ran")], object), allow_pickle=True
        ),
        ["latents", "laion_latents.npy: not a complete .npy array of numbers"],
    ),
    "a caption too few": (
        lambda root, path: (root / "laion_subset/captions.txt").write_text("one\n"),
        ["laion_subset: 1 captions for 60 rows"],
    ),
    "captions that are not UTF-8": (
        lambda root, path: (root / "laion_subset/captions.txt").write_bytes(b"\xff\n"),
        ["captions.txt: not UTF-8 text"],
    ),
    "neither latents nor captions": (
        lambda root, path: [
            (root / name).unlink() for name in ("laion_latents.npy", "laion_subset/captions.txt")
        ],
        ["nor laion_subset/images", "60 images, 0 lines"],
    ),
    "dataset.json with an unknown key": (
        write_settings({"batchsize": 3}),
        ["dataset.json: unknown key batchsize; did you mean batch_size?"],
    ),
    "dataset.json with a key twice": (
        lambda root, path: (root / "dataset.json").write_text('{"top_k": 3, "top_k": 4}'),
        ["dataset.json: not valid JSON (the key top_k is written twice"],
    ),
    "dataset.json with a wrong type": (
        write_settings({"batch_size": "3"}),
        ["dataset.json: batch_size: expected int, found '3'"],
    ),
    "dataset.json with a list": (
        write_settings([]),
        ["dataset.json: expected an object, found list"],
    ),
    "dataset.json with a negative number": (
        write_settings({"batch_size": -3}),
        ["dataset.json: batch_size -3: expected a positive whole number"],
    ),
    "dataset.json with NaN": (
        write_settings({"damping": float("nan")}),
        ["dataset.json: damping nan: expected a non-negative number"],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_told_before_a_model_is_loaded(
    fault, script, root, task_flags, results, no_model, capsys
):
    module, script_flags = SCRIPTS[script]
    edit, said = FAULTS[fault]
    edit(root, Path(task_flags[1]))
    before = files(results)
    line = refused(capsys, module.main, [*task_flags, *script_flags])
    assert all(text in line for text in said), line
    assert len(line) < 600
    assert files(results) == before and not (root / "ran").exists()


FLAG_FAULTS = {
    "missing task file": (
        ["--task_json", "nowhere.json"],
        ["--task_json nowhere.json: no such file"],
    ),
    "task file that is a folder": (["--task_json", "."], ["--task_json .: cannot be read"]),
    "missing data root": (["--dataroot", "nowhere"], ["--dataroot nowhere: no such folder"]),
    "empty data root": (["--dataroot", ""], ["--dataroot '': no such folder"]),
    "subset larger than the data": (
        ["--laion_subset_size", "61"],
        ["--laion_subset_size 61: this data root has 60 images"],
    ),
    "empty subset": (
        ["--laion_subset_size", "0"],
        ["--laion_subset_size 0: expected a positive whole number"],
    ),
    "cuda where there is none": (
        ["--device", "cuda:99"],
        ["--device cuda:99: this machine has", "try --device cpu"],
    ),
    "unknown device": (["--device", "abacus"], ["--device abacus: expected cpu, cuda or cuda:N"]),
}
OWN_FLAG_FAULTS = {
    "loss": {
        "negative batch": (
            ["--batch_size", "-1"],
            ["--batch_size -1: expected a positive whole number"],
        ),
        "no timesteps": (
            ["--time_samples", "0"],
            ["--time_samples 0: expected a positive whole number"],
        ),
    },
    "influence": {
        "negative lr": (
            ["--unlearn_lr", "-0.1"],
            ["--unlearn_lr -0.1: expected a non-negative number"],
        ),
        "NaN lr": (["--unlearn_lr", "nan"], ["--unlearn_lr nan: expected a non-negative number"]),
        "infinite lr": (
            ["--unlearn_lr", "inf"],
            ["--unlearn_lr inf: expected a number of at most"],
        ),
        "negative damping": (
            ["--damping", "-0.1"],
            ["--damping -0.1: expected a non-negative number"],
        ),
        "NaN damping": (["--damping", "nan"], ["--damping nan: expected a non-negative number"]),
        "negative steps": (
            ["--unlearn_steps", "-1"],
            ["--unlearn_steps -1: expected a non-negative whole number"],
        ),
        "no passes": (
            ["--unlearn_grad_accum_steps", "0"],
            ["--unlearn_grad_accum_steps 0: expected a positive whole number"],
        ),
        "N of zero": (["--num_train", "0"], ["--num_train 0: expected a positive whole number"]),
        "N too large to divide by": (
            ["--num_train", "9" * 400],
            ["--num_train 9999", "expected a whole number of at most"],
        ),
        "negative top_k": (["--top_k", "-1"], ["--top_k -1: expected a non-negative whole number"]),
        "more pictures than a JPEG holds": (
            ["--top_k", "1001"],
            ["--top_k 1001: expected a whole number of at most 1,000"],
        ),
        "missing Fisher": (
            ["--fisher_path", "nowhere.pt"],
            ["--fisher_path nowhere.pt: no such file", "python -m unlearn fisher"],
        ),
    },
}


@pytest.mark.parametrize(
    "script, fault",
    [(script, fault) for script in SCRIPTS for fault in {**FLAG_FAULTS, **OWN_FLAG_FAULTS[script]}],
)
def test_a_bad_flag_is_told_before_a_model_is_loaded(
    script, fault, task_flags, results, no_model, capsys
):
    module, script_flags = SCRIPTS[script]
    given, said = {**FLAG_FAULTS, **OWN_FLAG_FAULTS[script]}[fault]
    before = files(results)
    line = refused(capsys, module.main, [*task_flags, *script_flags, *given])
    assert all(text in line for text in said), line
    assert files(results) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_without_an_index_is_refused_where_there_is_none(
    script, task_flags, no_model, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refused(capsys, SCRIPTS[script][0].main, [*task_flags, "--device", "cuda"])
    assert "--device cuda: this machine has 0 CUDA devices" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_result_dir_inside_a_file_is_told_before_a_model_is_loaded(
    script, task_flags, tmp_path, no_model, capsys
):
    (tmp_path / "file").write_text("kept")
    line = refused(
        capsys,
        SCRIPTS[script][0].main,
        [*task_flags, "--result_dir", str(tmp_path / "file/results")],
    )
    assert (
        f"--result_dir {tmp_path}/file/results: cannot be written: {tmp_path}/file is no folder"
        in line
    )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_result_dir_without_permission_is_told_before_a_model_is_loaded(
    script, task_flags, tmp_path, no_model, monkeypatch, capsys
):
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode, **how: Path(path) != tmp_path and access(path, mode, **how)
    )
    line = refused(
        capsys,
        SCRIPTS[script][0].main,
        [*task_flags, "--result_dir", str(tmp_path / "new/results")],
    )
    assert (
        f"--result_dir {tmp_path}/new/results: cannot be written: no permission to write in "
        f"{tmp_path}" in line
    )
    assert not (tmp_path / "new").exists()


def test_a_task_file_of_gigabytes_is_refused_unread(task_flags, no_model, capsys):
    with open(task_flags[1], "wb") as file:
        file.truncate(8 << 30)  # sparse
    assert "tasks.json: expected a text file of at most 64 MB, found 8192 MB" in refused(
        capsys, compute_training_loss.main, task_flags
    )


@pytest.mark.parametrize("name", ["pytorch_custom_diffusion_weights.pt", "<new1>.bin"])
@pytest.mark.parametrize(
    "write",
    [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))],
    ids=["torch.save", "pickle"],
)
def test_a_malicious_pickle_is_refused_and_runs_no_code(
    name, write, root, task_flags, tmp_path, no_model, capsys
):
    write({"<new1>": Evil(tmp_path / "ran")}, root / "models/tiny/blob" / name)
    line = refused(capsys, compute_training_loss.main, task_flags)
    assert (
        f"{name}: holds something else than tensors, which is never unpickled" in line
        or f"{name}: cannot be read as tensors" in line
    )
    assert not (tmp_path / "ran").exists()


def write_compressed(path):
    """A torch file whose records are compressed: a bomb, for all that its size says."""
    torch.save({"weight": torch.zeros(4)}, path.with_suffix(".plain"))
    with (
        zipfile.ZipFile(path.with_suffix(".plain")) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))


@pytest.mark.parametrize(
    "write, said",
    [
        (write_compressed, "it is compressed, as torch's own files never are"),
        (
            lambda path: torch.save({"<new1>": torch.zeros(1).expand(10**10)}, path),
            "expected a plain dense tensor",
        ),
        (
            lambda path: torch.save({"<new1>": torch.zeros(32).to_sparse()}, path),
            "expected a plain dense tensor",
        ),
        (
            lambda path: torch.save({"<new1>": torch.zeros(32, dtype=torch.complex64)}, path),
            "expected a plain dense tensor",
        ),
        (
            lambda path: torch.save({7: torch.zeros(32)}, path),
            "expected a dictionary of tensors by name",
        ),
        (
            lambda path: torch.save({"a</w>": torch.zeros(32)}, path),
            "expected new tokens such as <new1>",
        ),
        (lambda path: path.symlink_to("/etc/passwd"), "expected a path inside"),
    ],
)
def test_tokens_that_would_fill_the_memory_or_change_other_models_are_refused(
    write, said, root, task_flags, no_model, capsys
):
    path = root / "models/tiny/blob/<new1>.bin"
    path.unlink()
    write(path)
    assert said in refused(capsys, compute_training_loss.main, task_flags)


def test_a_picture_in_postscript_is_not_run(root, task_flags, tmp_path, no_model, capsys):
    (root / "synth/tiny/gpt/blob/samples/00000.png").write_text(
        f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({tmp_path}/run) (w) file "
        f"closefile\nshowpage\n"
    )
    assert "00000.png: cannot be read" in refused(capsys, compute_training_loss.main, task_flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names", [["synth/...png"], ["synth/a/...png"], ["synth/x.png", "synth/x/influence.npz.png"]]
)
def test_results_that_would_stand_elsewhere_or_in_one_another_are_refused(
    names, root, task_flags, no_model, capsys
):
    tasks = [dict(json.loads(Path(task_flags[1]).read_text())[0]) for _ in names]
    for task, name in zip(tasks, names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / task["synth_image_path"], root / name)
        task["synth_image_path"] = name
    Path(task_flags[1]).write_text(json.dumps(tasks))
    line = refused(capsys, compute_training_loss.main, task_flags)
    assert "leaves no folder for results" in line or "would stand within that of x" in line


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"latents": "sub/a.npy"}, "latents: expected a path inside"),
        ({"name": "\ud800"}, "name: expected Unicode text"),
        ({"latents": "\0.npy"}, "latents: expected text without NUL"),
        ({"captions": "a" * 300 + ".txt"}, "names of at most 200 bytes"),
        ({"resolution": 20_000}, "at most 4,096"),
        ({"num_train": -(10**400)}, "num_train -1000"),
        ({"images": "."}, "put the pictures into a folder of it"),
    ],
)
def test_settings_that_would_write_elsewhere_or_ask_for_absurdly_much_are_refused(
    settings, said, root, tmp_path, task_flags, no_model, capsys
):
    (tmp_path / "outside").mkdir()
    (root / "sub").symlink_to(tmp_path / "outside")
    (root / "dataset.json").write_text(json.dumps(settings))
    assert said in refused(capsys, compute_training_loss.main, task_flags)


def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path):
    (tmp_path / "victim").write_text("whole")
    part = tmp_path / "a.json.0123456789abcdef.part"
    part.symlink_to(tmp_path / "victim")
    with (
        pytest.raises(UserError, match="a.json: cannot be written"),
        whole_file(tmp_path / "a.json", "0123456789abcdef"),
    ):
        pass
    part.unlink()
    os.mkfifo(part)
    with (
        pytest.raises(UserError, match="a.json: cannot be written"),
        whole_file(tmp_path / "a.json", "0123456789abcdef"),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "whole"


def test_a_malicious_fisher_is_refused_and_runs_no_code(
    root, task_flags, results, with_model, capsys
):
    torch.save({"weight": Evil(root / "ran")}, root / "sd_fisher.pt")
    assert "sd_fisher.pt: holds something else than tensors" in refused(
        capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS]
    )
    assert not (root / "ran").exists() and not (results / "influence").exists()


def edit_tensors(path, change):
    tensors = torch.load(path, weights_only=True)
    torch.save(change(tensors), path)


def set_first(entries):
    """Changes one entry of the first tensor to each of the given values in turn."""

    def change(tensors):
        name = next(iter(tensors))
        tensors[name].view(-1)[0] = entries
        return tensors

    return change


def without_kv(tensors):
    return {name: value for name, value in tensors.items() if "attn2.to_k" not in name}


FISHER_FAULTS = {
    "lacks names": (without_kv, ["--fisher_path", "sd_fisher.pt: lacks", "attn2.to_k.weight"]),
    "of another shape": (
        lambda tensors: {name: value[:1] for name, value in tensors.items()},
        ["sd_fisher.pt", "attn2", "expected shape [", "found [1, "],
    ),
    "with NaN": (
        lambda tensors: {name: value * float("nan") for name, value in tensors.items()},
        ["sd_fisher.pt", "attn2", "NaN or infinite"],
    ),
    "with negative entries": (
        lambda tensors: {name: -value for name, value in tensors.items()},
        ["sd_fisher.pt", "attn2", "negative entries"],
    ),
    "with zero entries": (
        lambda tensors: {
            name: value * (torch.arange(value.numel()).view_as(value) > 0)
            for name, value in tensors.items()
        },
        ["sd_fisher.pt", "attn2", "1 zero entries", "--damping"],
    ),
}


@pytest.mark.parametrize("fault", FISHER_FAULTS)
def test_a_bad_fisher_is_told_before_the_training_set_is_opened(
    fault, root, task_flags, results, with_model, monkeypatch, capsys
):
    change, said = FISHER_FAULTS[fault]
    edit_tensors(root / "sd_fisher.pt", change)
    monkeypatch.setattr(preparation, "prepare_training_set", None)
    before = files(results)
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert all(text in line for text in said), line
    assert files(results) == before


def test_a_fisher_made_for_another_model_is_refused(
    root, task_flags, results, with_model, monkeypatch, capsys
):
    path = root / "sd_fisher.safetensors"
    write_tensors(path, torch.load(root / "sd_fisher.pt", weights_only=True))
    write_record(path, {"weights": "another"})
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert (
        "sd_fisher.safetensors: made with other settings: other weights of the model: " in line
        and "python -m unlearn fisher" in line
    )


MODEL_FAULTS = {  # of files that only the model can judge
    "weight of another name": (
        lambda root: edit_tensors(
            root / WEIGHTS, lambda tensors: {f"x.{name}": value for name, value in tensors.items()}
        ),
        ["pytorch_custom_diffusion_weights.pt: weight x.", "matches no weight of this model"],
    ),
    "weight of another shape": (
        lambda root: edit_tensors(
            root / WEIGHTS, lambda tensors: {name: value[:3] for name, value in tensors.items()}
        ),
        ["pytorch_custom_diffusion_weights.pt: weight", "expected shape [", "found [3, "],
    ),
    "token of another length": (
        lambda root: torch.save({"<new1>": torch.ones(3)}, root / "models/tiny/blob/<new1>.bin"),
        ["models/tiny/blob: token <new1>: expected 32 numbers, found [3]"],
    ),
    "latents of another model": (
        lambda root: rewrite_array("laion_latents.npy", lambda array: array[..., :5])(root, None),
        ["laion_latents.npy: expected rows [4, ", "for this model, found [120, 4, "],
    ),
    "embeddings of another model": (
        lambda root: rewrite_array("laion_text_embeddings.npy", lambda array: array[..., :5])(
            root, None
        ),
        ["laion_text_embeddings.npy: expected rows [", "found [60, "],
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_file_that_does_not_fit_the_model_is_told_before_anything_is_scored(
    fault, script, root, task_flags, results, with_model, monkeypatch, capsys
):
    module, script_flags = SCRIPTS[script]
    edit, said = MODEL_FAULTS[fault]
    edit(root)
    monkeypatch.setattr(sweeps.Sweep, "fill", None)
    before = files(results)
    line = refused(capsys, module.main, [*task_flags, *script_flags])
    assert all(text in line for text in said), line
    assert files(results) == before


@pytest.mark.parametrize(
    "name, position, said",
    [
        ("laion_latents.npy", (60 + 2, 0, 0, 0), "laion/000002"),
        ("laion_text_embeddings.npy", (1, 0, 0), "laion/000001"),
    ],
)
def test_one_nan_in_the_training_set_is_told_before_anything_is_scored(
    name, position, said, root, task_flags, results, with_model, monkeypatch, capsys
):
    array = np.load(root / name)
    array[position] = np.nan
    np.save(root / name, array)
    monkeypatch.setattr(sweeps.Sweep, "fill", None)
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert f"{name}, {said}: has NaN or infinite entries" in line


def test_a_nan_in_customized_weights_is_told_before_a_model_is_loaded(
    root, task_flags, no_model, capsys
):
    edit_tensors(root / WEIGHTS, set_first(float("nan")))
    assert (
        "models/tiny/blob: " in (line := refused(capsys, compute_training_loss.main, task_flags))
        and "NaN" in line
    )


@pytest.mark.parametrize(
    "script, flag", [("loss", "--time_samples"), ("influence", "--loss_time_samples")]
)
def test_time_samples_that_do_not_divide_the_grid_are_refused(
    script, flag, task_flags, results, with_model, monkeypatch, capsys
):
    module, script_flags = SCRIPTS[script]
    monkeypatch.setattr(preparation, "prepare_training_set", None)
    line = refused(capsys, module.main, [*task_flags, *script_flags, flag, "7"])
    assert "time_samples 7: must divide the model's 1000 training timesteps" in line


def test_missing_losses_are_told_with_a_command_that_makes_them(
    task_flags, tmp_path, no_model, with_model, capsys, monkeypatch
):
    argv = [*task_flags, *INFLUENCE_FLAGS, "--noise_seed", "3"]
    line = refused(capsys, compute_influence.main, argv)
    assert (
        "exemplar_loss.npy: no cached losses yet; make them: python compute_training_loss.py"
        in line
    )
    command = shlex.split(line.partition("make them: ")[2])[2:]
    compute_training_loss.main(command)  # the very flags: no other losses would be accepted
    compute_influence.main(argv)
    assert (tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png/influence.json").exists()


@pytest.mark.parametrize(
    "given, field",
    [
        (["--loss_time_samples", "4"], "timesteps is [0, 500], expected [0, 250, 500, 750]"),
        (["--noise_seed", "1"], "noise_seed is 0, expected 1"),
        (["--laion_subset_size", "4"], "num_images is 3, expected 4"),
    ],
)
def test_losses_made_with_other_settings_are_refused_before_unlearning(
    given, field, task_flags, results, with_model, monkeypatch, capsys
):
    monkeypatch.setattr(running, "unlearn_queries", None)
    before = files(results)
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS, *given])
    assert field in line and "python compute_training_loss.py" in line
    assert files(results) == before


def test_losses_of_the_last_model_are_checked_before_the_first_query(
    root, task_flags, results, with_model, monkeypatch, capsys
):
    shutil.copytree(root / "models/tiny/blob", root / "models/tiny/other")
    change_task(model_path="models/tiny/other")(root, Path(task_flags[1]))
    shutil.copytree(results / "orig_loss/tiny/blob", results / "orig_loss/tiny/other")
    record = results / "orig_loss/tiny/other/laion_loss.json"
    record.write_text(record.read_text().replace('"noise_seed": 0', '"noise_seed": 9'))
    monkeypatch.setattr(running, "unlearn_queries", None)
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert "other/laion_loss.npy: made with other settings: noise_seed is 9, expected 0" in line
    assert not (results / "influence").exists()


def test_losses_whose_bytes_were_changed_are_refused(task_flags, results, with_model, capsys):
    np.save(results / "orig_loss/tiny/blob/laion_loss.npy", np.zeros(6, np.float32))
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert "laion_loss.npy: its content is not what its record says" in line


def test_results_of_another_program_are_refused_before_a_model_is_loaded(
    task_flags, results, no_model, capsys
):
    stranger = results / "influence/tiny/gpt/blob/samples/00000.png/laion_loss.npy"
    stranger.parent.mkdir(parents=True)
    np.save(stranger, np.zeros(6, np.float32))
    line = refused(capsys, compute_influence.main, [*task_flags, *INFLUENCE_FLAGS])
    assert (
        "laion_loss.npy: stands there without the weight_change.safetensors" in line
        and "--overwrite" in line
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_full_memory_names_the_flag_that_helps(
    error, task_flags, with_model, monkeypatch, capsys
):
    def prepare_training_set(*arguments):
        raise error

    monkeypatch.setattr(preparation, "prepare_training_set", prepare_training_set)
    assert "out of memory: run the same command with a smaller --batch_size" in refused(
        capsys, compute_training_loss.main, task_flags
    )


@pytest.mark.parametrize(
    "number", [errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOSPC]
)
def test_a_disk_that_fails_anywhere_ends_with_one_line_that_names_the_file(
    number, task_flags, with_model, monkeypatch, capsys
):
    def prepare_training_set(*arguments):
        raise OSError(number, os.strerror(number), "/scratch/results/a")

    monkeypatch.setattr(preparation, "prepare_training_set", prepare_training_set)
    assert f"/scratch/results/a: {os.strerror(number)}; see to the disk" in refused(
        capsys, compute_training_loss.main, task_flags
    )


def test_a_full_disk_leaves_no_part_of_a_file(
    task_flags, tmp_path, with_model, monkeypatch, capsys
):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    line = refused(capsys, compute_training_loss.main, [*task_flags, *LOSS_FLAGS])
    assert (
        "the disk is full; free some space and run the same command again" in line
        and "orig_loss" in line
    )
    assert not files(tmp_path / "results")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_run_goes_on_after_a_really_full_disk_was_freed(
    task_flags, small_disk, with_model, cached, capsys
):
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    argv = [*task_flags, *LOSS_FLAGS, "--result_dir", str(small_disk / "results")]
    assert "the disk is full" in refused(capsys, compute_training_loss.main, argv)
    assert not files(small_disk / "results")
    (small_disk / "filler").unlink()
    compute_training_loss.main(argv)
    assert (small_disk / "results/orig_loss/tiny/blob/laion_loss.npy").read_bytes() == (
        cached / "orig_loss/tiny/blob/laion_loss.npy"
    ).read_bytes()


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: write_array(path, np.ones(30_000)), id="array"),
        pytest.param(lambda path: write_tensors(path, {"a": torch.ones(60_000)}), id="tensors"),
        pytest.param(lambda path: write_json(path, "x" * 200_000), id="json"),
    ],
)
def test_a_file_larger_than_the_disk_says_so_and_leaves_nothing(write, small_disk):
    with pytest.raises(UserError, match="the disk is full"):
        write(small_disk / "file")
    assert not files(small_disk)


def test_an_interrupt_ends_with_one_line_and_no_traceback(task_flags, monkeypatch, capsys):
    def load_model(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "load_model", load_model)
    with pytest.raises(SystemExit) as end:
        programs.run(compute_training_loss.main, task_flags)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted; run the same command again to go on\n"


def edit_pipeline(name, change):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return edit


def drop_first(tensors):
    return {name: tensors[name] for name in sorted(tensors)[1:]}


TEXT_ENCODER, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
PIPELINE_FAULTS = {
    "no model_index.json": (
        lambda folder: (folder / "model_index.json").unlink(),
        "a folder with model_index.json",
    ),
    "no tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        "a folder without tokenizer",
    ),
    "index that is no object": (
        lambda folder: (folder / "model_index.json").write_text("[]"),
        "expected an object whose _class_name is",
    ),
    "index that names a file beside it": (
        lambda folder: (folder / "model_index.json").write_text(
            (folder / "model_index.json")
            .read_text()
            .replace('"scheduler": [', '"scheduler": ["evil", "X"], "was": [')
        ),
        "scheduler: expected a class of diffusers or transformers, found ['evil', 'X']",
    ),
    "configuration of a billion timesteps": (
        lambda folder: (folder / "scheduler/scheduler_config.json").write_text(
            (folder / "scheduler/scheduler_config.json").read_text().replace("1000", str(10**9))
        ),
        "num_train_timesteps: found 1000000000",
    ),
    "tokenizer longer than its text encoder": (
        lambda folder: (folder / "tokenizer/tokenizer_config.json").write_text(
            (folder / "tokenizer/tokenizer_config.json").read_text().replace(": 77", ": 200")
        ),
        "its tokenizer's model_max_length: expected 3 to 77",
    ),
    "truncated UNet": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9]),
        "cannot be loaded",
    ),
    "truncated text encoder": (
        lambda folder: (folder / TEXT_ENCODER).write_bytes(
            (folder / TEXT_ENCODER).read_bytes()[:-9]
        ),
        "cannot be loaded",
    ),
    "UNet without a weight": (
        edit_pipeline(UNET, drop_first),
        "its unet lacks 1 weights, first conv_in.bias",
    ),
    "text encoder without a weight": (
        edit_pipeline(TEXT_ENCODER, drop_first),
        "its text_encoder lacks 1 weights, first",
    ),
    "text encoder of another shape": (
        edit_pipeline(
            TEXT_ENCODER,
            lambda tensors: {name: value[..., :1].clone() for name, value in tensors.items()},
        ),
        "cannot be loaded",
    ),
}


@pytest.mark.parametrize("fault", PIPELINE_FAULTS)
def test_a_damaged_pipeline_is_refused_not_made_up(
    fault, tmp_path, task_flags, capsys, monkeypatch
):
    edit, said = PIPELINE_FAULTS[fault]
    folder = shutil.copytree(PARITY / "fixture/sd-tiny", tmp_path / "pipeline")
    edit(folder)
    monkeypatch.setattr(preparation, "load_model", inputs.load_model)
    with pytest.raises(SystemExit) as end:
        programs.run(compute_training_loss.main, [*task_flags, "--sd_version", str(folder)])
    line = capsys.readouterr().err.splitlines()[-1]  # the libraries may have warned above it
    assert (
        end.value.code == 2 and line.startswith(f"error: --sd_version {folder}: ") and said in line
    )


def configure(part, **values):
    """Changes a part's configuration in a pipeline's folder; a value of ... removes the key."""

    def edit(folder):
        [path] = (
            (folder / part).glob("*config.json")
            if part != "tokenizer"
            else [folder / "tokenizer/tokenizer_config.json"]
        )
        config = {**json.loads(path.read_text()), **values}
        path.write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )

    return edit


def replace_part(part, library, name, config=None):
    """Names another class in a pipeline's index, with another configuration where one is given."""

    def edit(folder):
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, part: [library, name]}))
        if config is not None:
            (folder / part).mkdir(exist_ok=True)
            (
                folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            ).write_text(json.dumps(config))

    return edit


def shrink_vocabulary(folder):
    configure("text_encoder", vocab_size=50)(folder)


def drop_text_encoder(folder):
    replace_part("text_encoder_2", "transformers", "CLIPTextModelWithProjection")(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))


MISFITS = {  # what a pipeline has -> (how, what is said)
    "inpainting UNet": (
        configure("unet", in_channels=9),
        [
            "its UNet takes 9 channels and gives 4, its VAE's latents have 4 (probably an "
            "inpainting UNet)"
        ],
    ),
    "UNet that edits": (
        configure("unet", in_channels=8),
        ["takes 8 channels and gives 4", "InstructPix2Pix or of a latent upscaler"],
    ),
    "upscaler": (
        configure("unet", in_channels=7),
        ["takes 7 channels", "probably an upscaler's UNet"],
    ),
    "depth": (
        configure("unet", in_channels=5),
        ["takes 5 channels", "probably a depth-to-image UNet"],
    ),
    "learned sigma": (
        configure("unet", out_channels=8),
        ["takes 4 channels and gives 8", "learned sigma"],
    ),
    "VAE of more channels": (
        configure("vae", latent_channels=16),
        ["its VAE's latents have 16", "UNet and VAE of different models"],
    ),
    "channels that are defaults": (
        configure("unet", in_channels=..., out_channels=16),
        ["takes 4 channels and gives 16"],
    ),
    "VAE of grey pictures": (
        configure("vae", in_channels=1),
        ["its VAE takes 1 channels and gives 3; expected 3"],
    ),
    "text of another width": (
        configure("unet", cross_attention_dim=768),
        ["its UNet attends to texts of 768 features, its text encoder's have 32"],
    ),
    "text of several widths": (
        configure("unet", cross_attention_dim=[32, 64, 32, 32]),
        ["attends to texts of [32, 64, 32, 32] features"],
    ),
    "tokenizer of another model": (
        shrink_vocabulary,
        ["its tokenizer numbers 90 tokens, its text encoder has 50"],
    ),
    "tokenizer that is too long": (
        configure("tokenizer", model_max_length=99),
        ["model_max_length: expected 3 to 77", "found 99"],
    ),
    "SDXL UNet": (
        configure("unet", addition_embed_type="text_time"),
        ["addition_embed_type is text_time", "Stable Diffusion XL"],
    ),
    "UNet with classes": (
        configure("unet", num_class_embeds=1000),
        ["num_class_embeds is 1000", "supported are Stable Diffusion 1 and 2"],
    ),
    "UNet that projects its text": (
        configure("unet", encoder_hid_dim=32, encoder_hid_dim_type="text_proj"),
        ["encoder_hid_dim is 32"],
    ),
    "flow matching": (
        replace_part(
            "scheduler",
            "diffusers",
            "FlowMatchEulerDiscreteScheduler",
            {"num_train_timesteps": 1000},
        ),
        [
            "its scheduler, FlowMatchEulerDiscreteScheduler, has no alphas_cumprod, because it "
            "matches flows",
            "DDPMScheduler",
        ],
    ),
    "scheduler of sigmas": (
        replace_part("scheduler", "diffusers", "EDMEulerScheduler", {}),
        ["its scheduler, EDMEulerScheduler, has no alphas_cumprod"],
    ),
    "scheduler that is unknown": (
        replace_part("scheduler", "diffusers", "NoScheduler"),
        ["its scheduler cannot be made of its configuration"],
    ),
    "betas of another number": (
        replace_part(
            "scheduler",
            "diffusers",
            "DDPMScheduler",
            {"trained_betas": [0.1] * 10, "num_train_timesteps": 1000},
        ),
        ["has 10 noise levels (trained_betas) for 1000 timesteps"],
    ),
    "betas that are none": (
        replace_part("scheduler", "diffusers", "DDPMScheduler", {"beta_start": 2, "beta_end": 3}),
        ["not all between 0 and 1"],
    ),
    "unknown prediction": (
        configure("scheduler", prediction_type="x0"),
        ["unknown prediction type x0; expected one of epsilon, sample, v_prediction"],
    ),
    "tiny VAE": (
        replace_part("vae", "diffusers", "AutoencoderTiny"),
        ["its vae is of the class AutoencoderTiny; supported: AutoencoderKL"],
    ),
    "VQ": (replace_part("vae", "diffusers", "VQModel"), ["its vae is of the class VQModel"]),
    "VAE without a scale": (
        configure("vae", scaling_factor=0),
        ["its VAE's scaling_factor: expected a number, found 0"],
    ),
    "UNet without text": (
        replace_part("unet", "diffusers", "UNet2DModel"),
        ["its unet is of the class UNet2DModel; supported: UNet2DConditionModel"],
    ),
    "T5": (
        replace_part(
            "text_encoder",
            "transformers",
            "T5EncoderModel",
            {"model_type": "t5", "d_model": 32, "vocab_size": 90},
        ),
        ["its text encoder, T5EncoderModel, has no max_position_embeddings", "CLIPTextModel"],
    ),
    "text encoder that is unknown": (
        replace_part("text_encoder", "transformers", "NoModel"),
        ["its text_encoder cannot be made of its configuration"],
    ),
    "SDXL in part": (
        replace_part("text_encoder_2", "transformers", "CLIPTextModelWithProjection"),
        ["a folder without text_encoder_2 is no pipeline of Stable Diffusion XL"],
    ),
    "SDXL refiner": (
        drop_text_encoder,
        ["it has the second text encoder alone, as the refiner of Stable Diffusion XL has"],
    ),
    "FLUX.2": (
        replace_part("transformer", "diffusers", "Flux2Transformer2DModel"),
        [
            "StableDiffusionPipeline has a transformer of the class Flux2Transformer2DModel; "
            "supported are Stable Diffusion 1 and 2"
        ],
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_parts_that_do_not_fit_are_told_by_their_configurations_before_anything_is_loaded_and_by_doctor(
    misfit, tmp_path, monkeypatch
):
    edit, words = MISFITS[misfit]
    folder = shutil.copytree(PARITY / "fixture/sd-tiny", tmp_path / "pipeline")
    edit(folder)
    monkeypatch.setattr(pipelines.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(UserError) as error:
        pipelines.load_model(str(folder), "cpu")
    assert str(error.value).startswith(f"--sd_version {folder}: ") and all(
        word in str(error.value) for word in words
    ), error.value
    found = examination.examine_pipeline(str(folder), "")
    assert (found.status, found.text) == (machine.PROBLEM, str(error.value))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"in_channels": 9}, "takes 9 channels and gives 4"),
        ({"cross_attention_dim": 16}, "attends to texts of 16 features"),
    ],
)
def test_the_unet_of_a_data_root_is_compared_with_the_pipeline_that_it_goes_into(
    values, words, tmp_path, monkeypatch
):
    own = tmp_path / "unet"
    own.mkdir()
    for source, name in (
        ("unet/config.json", "config.json"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
    ):
        (own / name).write_bytes((PARITY / "fixture/sd-tiny" / source).read_bytes())
    assert (
        examination.examine_pipeline(str(PARITY / "fixture/sd-tiny"), str(own)).status == machine.OK
    )
    (own / "config.json").write_text(
        json.dumps({**json.loads((own / "config.json").read_text()), **values})
    )
    monkeypatch.setattr(pipelines, "load_unet", None)
    with pytest.raises(UserError, match=f"the UNet of {own} {words}"):
        pipelines.load_model(str(PARITY / "fixture/sd-tiny"), "cpu", str(own))
    assert words in examination.examine_pipeline(str(PARITY / "fixture/sd-tiny"), str(own)).text
    (own / "scheduler_config.json").unlink()
    assert (
        "found no scheduler_config.json"
        in examination.examine_pipeline(str(PARITY / "fixture/sd-tiny"), str(own)).text
    )


def test_a_pipeline_that_is_loaded_from_elsewhere_is_compared_by_what_was_loaded(model):
    described = parts.parts_of(model.pipeline, model.family)
    checks.check_fit("hub/name", described)
    read = parts.read_parts(PARITY / "fixture/sd-tiny")
    assert (read.classes, read.tokens) == (described.classes, described.tokens)
    assert all(
        described.denoiser[key] == value
        for key, value in read.denoiser.items()
        if key in ("in_channels", "out_channels", "cross_attention_dim")
    )
    with pytest.raises(UserError, match="takes 9 channels"):
        changed = {**described.denoiser, "in_channels": 9}
        checks.check_fit("hub/name", described._replace(denoiser=changed))


def test_a_part_that_gives_another_shape_than_its_configuration_says_is_refused(model, monkeypatch):
    monkeypatch.setattr(
        type(model.pipeline), "vae_scale_factor", 2 * model.pipeline.vae_scale_factor, raising=False
    )
    monkeypatch.setattr(model.pipeline, "vae_scale_factor", 2 * model.pipeline.vae_scale_factor)
    with pytest.raises(
        UserError,
        match="its vae cannot be used: it gives .1, 4, 16, 16. where .1, 4, 8, 8. is expected",
    ):
        checks.check_passes(model, "mine")


def test_a_token_that_the_text_encoder_does_not_have_is_named(model, monkeypatch):
    # Not setattr, whose undoing takes the module's parameter away.
    monkeypatch.setitem(
        model.pipeline.text_encoder.get_input_embeddings()._parameters,
        "weight",
        torch.nn.Parameter(torch.zeros(3, 32)),
    )
    with pytest.raises(
        UserError,
        match="prompt 'a cat': the tokenizer knows .*, the text encoder has no embedding of it",
    ):
        encoders.encode_prompts(model, ["a cat"])


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("compute_training_loss.py", marks=pytest.mark.slow),  # ends as the other does
        "compute_influence.py",
    ],
)
def test_the_scripts_themselves_end_with_one_line_and_status_2(script, task_flags, tmp_path):
    change_task(test_case_ind=7)(None, Path(task_flags[1]))
    ended = subprocess.run(
        [sys.executable, script, *task_flags],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert (
        ended.stderr
        == f"error: {task_flags[1]}, task 1: test_case_ind: expected 0 to 0 in test_tiny, found 7\n"
    )
    assert ended.stdout == "" and not (tmp_path / "results").exists()
