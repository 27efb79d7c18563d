"""Weights as people have them: what is not loaded as it stands is told by the scripts and the doctor
before anything is loaded, with a command that makes a folder that is."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import PARITY
from safetensors.torch import load_file, save_file
from test_attribute import give_bin, give_variant, name_absent_parts

from unlearn import UserError
from unlearn.commands import convert
from unlearn.commands.examination import examine_pipeline
from unlearn.commands.machine import PROBLEM
from unlearn.models.pipelines import load_model

PIPELINE = PARITY / "fixture/sd-tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"


def give_compiled(folder):
    save_file(
        {f"_orig_mod.{name}": value for name, value in load_file(folder / UNET).items()},
        folder / UNET,
    )


def give_note(folder):
    (folder / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def give_nothing(folder):
    (folder / UNET).unlink()


@pytest.fixture
def copied(tmp_path):
    return Path(shutil.copytree(PIPELINE, tmp_path / "a pipeline"))


def refusal(folder):
    """What a script says of a pipeline; the doctor says the same."""
    with pytest.raises(UserError) as error:
        load_model(str(folder), "cpu")
    said = str(error.value)
    found = examine_pipeline(str(folder), "")
    assert found.status == PROBLEM and found.text == said and "\n" not in said
    return said


@pytest.mark.parametrize("change", [give_variant, give_bin, give_compiled])
def test_the_command_that_is_advised_makes_a_pipeline_of_the_same_weights(
    change, copied, tmp_path, monkeypatch, capsys, model
):
    change(copied)
    said = refusal(copied)
    words = shlex.split(said[said.index("python -m unlearn convert") :])
    monkeypatch.chdir(tmp_path)
    convert.main(words[4:])
    made = capsys.readouterr().out.removeprefix("Pipeline: ").strip()
    assert load_model(made, "cpu").weights_hash == model.weights_hash


@pytest.mark.parametrize(
    "change, said",
    [(give_note, "git lfs pull"), (give_nothing, "its unet has no weights")],
)
def test_weights_that_are_not_there_are_told_with_what_to_do(change, said, copied):
    change(copied)
    assert said in refusal(copied)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "unet", "scheduler"])
@pytest.mark.parametrize("value", [None, [None, None], ["transformers", 3], 7])
def test_an_index_that_names_no_class_of_a_part_is_refused(part, value, copied):
    index = copied / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), part: value}))
    assert f"model_index.json names no class of its {part}" in refusal(copied)


def test_a_folder_or_a_pipe_in_the_place_of_a_configuration_is_refused(copied):
    path = copied / "scheduler/scheduler_config.json"
    path.unlink()
    for make in (Path.mkdir, os.mkfifo):
        make(path)
        assert f"{path} is a folder, pipe or device, and no file" in refusal(copied)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_part_that_no_loss_asks_for_may_be_named_and_absent(copied, model):
    name_absent_parts(copied)
    assert load_model(str(copied), "cpu").weights_hash == model.weights_hash


def test_a_folder_of_the_hubs_cache_is_told_with_the_command_that_finds_its_snapshot(
    tmp_path, capsys
):
    cache = tmp_path / "models--me--mine"
    shutil.copytree(PIPELINE, cache / "snapshots/abc")
    assert f"python -m unlearn convert {cache}" in refusal(cache)
    convert.main([str(cache), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"Pipeline: {cache}/snapshots/abc\n"


def test_a_checkpoint_file_is_told_with_the_command_that_makes_a_folder_of_it(tmp_path):
    path = tmp_path / "my model.safetensors"
    path.write_bytes(b"weights")
    assert refusal(path).endswith(f"is made by: python -m unlearn convert {shlex.quote(str(path))}")
