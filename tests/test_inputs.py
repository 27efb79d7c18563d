"""Flags and data roots: which value counts, what a dry run tells, what is read and what is left
alone."""

import argparse
import io
import json
import logging
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image
from test_bad_input import INFLUENCE_FLAGS, LOSS_FLAGS, TASKS, encode_images, files

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.commands import advice, preparation
from unlearn.commands.flags import resolve
from unlearn.commands.inputs import find_fisher, prepare_training_set
from unlearn.datasets import encoding, queries
from unlearn.datasets.encoders import load_image, transform_image
from unlearn.datasets.encoding import encode_training_set
from unlearn.datasets.settings import ABC_TEST_CASES, OWN_ROOT, is_published_root, read_settings
from unlearn.datasets.tasks import (
    find_named_result,
    find_result,
    load_tasks,
    tell_older_results,
)
from unlearn.datasets.training_sets import open_training_set
from unlearn.storage.records import record_path


def parse(script, root, *given):
    """A script's resolved arguments on a data root."""
    return script.parse_arguments(
        ["--task_json", "tasks.json", "--dataroot", str(root), "--device", "cpu", *given]
    )


def write_settings(root, **settings):
    (root / "dataset.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    "flag, setting, published",
    [
        ("sd_version", "pipeline", "CompVis/stable-diffusion-v1-4"),
        ("vae_batch_size", "vae_batch_size", 20),
        ("loss_batch_size", "batch_size", 200),
        ("loss_time_samples", "time_samples", 10),
        ("num_train", "num_train", 400_000_000),
        ("damping", "damping", 0.0),
        ("unlearn_lr", "unlearn_lr", 0.1),
        ("unlearn_steps", "unlearn_steps", 100),
        ("unlearn_batch_size", "unlearn_batch_size", 16),
        ("unlearn_grad_accum_steps", "unlearn_grad_accum_steps", 10),
        ("top_k", "top_k", 10),
    ],
)
def test_a_flag_goes_before_the_data_root_and_the_data_root_before_the_published_value(
    flag, setting, published, root
):
    assert getattr(parse(compute_influence, root), flag) == published
    own, given = ("own", "given") if flag == "sd_version" else (3, 5)
    write_settings(root, **{"unlearn_lr": 0.5, setting: own})  # several steps need one
    assert getattr(parse(compute_influence, root), flag) == own
    assert getattr(parse(compute_influence, root, f"--{flag}", str(given)), flag) == given
    assert (
        getattr(parse(compute_influence, root, f"--{flag}", str(published)), flag) == published
    )  # the default, given explicitly


PUBLISHED_STEP, CHOSEN_STEP = (400_000_000, 0.1, 100, 0.0), (60, "auto", 1, 0.1)


def step_of(root, *given):
    """N, alpha, number of steps and damping."""
    args = parse(compute_influence, root, *given)
    return args.num_train, args.unlearn_lr, args.unlearn_steps, args.damping


@pytest.mark.parametrize("name", ABC_TEST_CASES)
def test_the_published_step_belongs_to_abc_by_any_of_its_four_test_cases(name, root):
    (root / "json/test_artchive.json").rename(root / "json" / f"{name}.json")
    assert is_published_root(root) and step_of(root) == PUBLISHED_STEP


def own_captions(root):
    shutil.rmtree(root / "json")


def own_customized_models(root):
    (root / "json/test_artchive.json").unlink()


def own_dataset(root):
    write_settings(root, name="mine")


def without_arrays(root):
    own_captions(root)
    for name in "laion_latents.npy", "laion_text_embeddings.npy":
        (root / name).unlink()


@pytest.mark.parametrize(
    "make_own", [own_captions, own_customized_models, own_dataset, without_arrays]
)
def test_on_a_data_root_of_ones_own_n_is_the_number_of_its_images_and_the_step_is_chosen(
    make_own, root
):
    make_own(root)
    assert not is_published_root(root) and step_of(root) == CHOSEN_STEP
    assert (
        step_of(root, "--laion_subset_size", "3") == CHOSEN_STEP
    )  # the model was trained on all of them
    assert step_of(root, "--unlearn_lr", "0.5", "--num_train", "7", "--damping", "0") == (
        7,
        0.5,
        1,
        0.0,
    )


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"unlearn_lr": 0.0003}, (60, 0.0003, 1, 0.1)),
        ({"unlearn_lr": "auto"}, CHOSEN_STEP),
        ({"damping": 0.3}, (60, "auto", 1, 0.3)),
        ({"unlearn_lr": 0.1, "num_train": 9}, (9, 0.1, 1, 0.1)),
        ({"unlearn_lr": 0.1, "unlearn_steps": 100, "damping": 0.0}, (60, 0.1, 100, 0.0)),
    ],
)
def test_a_step_means_the_same_as_flags_and_in_dataset_json(settings, expected, root):
    write_settings(root, name="mine")
    assert (
        step_of(
            root, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))
        )
        == expected
    )
    write_settings(root, **settings)
    assert step_of(root) == expected


@pytest.mark.parametrize(
    "world, expected",
    [
        ("emoji", (1448, 0.001, 1, 0.1)),
        ("emoji_small", (362, 0.001, 1, 0.1)),
        ("mscoco_config", (118_287, 0.01, 1, 0.0)),
    ],
)
def test_the_committed_data_roots_keep_their_steps(world, expected):
    root = Path(__file__).parent.parent / "data" / world
    assert (
        step_of(root) == expected
        and OWN_ROOT.keys() <= json.loads((root / "dataset.json").read_text()).keys()
    ), "each says all of its step"


@pytest.mark.parametrize(
    "given, said",
    [
        (
            ["--unlearn_lr", "auto"],
            "--unlearn_lr auto: scales one Newton step, found --unlearn_steps 100; give "
            "--unlearn_steps 1",
        ),
        (["--unlearn_lr", "auto", "--unlearn_steps", "0"], "found --unlearn_steps 0"),
        (["--unlearn_lr", "nan"], "--unlearn_lr nan: expected a non-negative number"),
    ],
)
def test_a_step_that_cannot_be_chosen_is_refused(given, said, root):
    with pytest.raises(UserError, match=said):
        parse(compute_influence, root, *given)


def test_a_key_that_begins_with_an_underscore_is_a_remark(root, tmp_path):
    write_settings(root, _why="for a small card", top_k=3)
    assert read_settings(root)["top_k"] == 3 and "_why" not in read_settings(root)
    (tmp_path / "tasks.json").write_text(json.dumps([{**TASKS[0], "_note": "as published"}]))
    assert load_tasks(tmp_path / "tasks.json", root)[0].prompt == TASKS[0]["prompt"]


def test_the_published_defaults_hold_where_nothing_is_given(root):
    args = parse(compute_training_loss, root)
    assert (
        args.result_dir,
        args.sd_version,
        args.vae_batch_size,
        args.batch_size,
        args.time_samples,
        args.noise_seed,
        args.precision,
    ) == ("results", "CompVis/stable-diffusion-v1-4", 20, 200, 10, 0, "fp32")


def test_flags_may_be_abbreviated_as_in_the_published_readme(root):
    args = parse(
        compute_influence, root, "--loss_time_sample", "5", "--unlearn_b", "7", "--fisher", "x.pt"
    )
    assert (args.loss_time_samples, args.unlearn_batch_size, args.fisher_path) == (5, 7, "x.pt")
    assert (
        parse(compute_training_loss, root, "--time_sample", "4", "--laion", "9").laion_subset_size
        == 9
    )


def test_every_flag_of_the_published_scripts_is_there(root):
    common = [
        "--result_dir",
        "r",
        "--sd_version",
        "s",
        "--laion_subset_size",
        "7",
        "--vae_batch_size",
        "8",
    ]
    parse(compute_training_loss, root, *common, "--batch_size", "9", "--time_samples", "5")
    parse(
        compute_influence,
        root,
        *common,
        "--fisher_path",
        "f.pt",
        "--weight_selection",
        "attn",
        "--unlearn_lr",
        "0.2",
        "--unlearn_steps",
        "3",
        "--unlearn_batch_size",
        "4",
        "--unlearn_grad_accum_steps",
        "5",
        "--loss_batch_size",
        "6",
        "--loss_time_samples",
        "10",
    )


def test_a_command_without_precision_device_or_batch_flags_can_resolve_and_open_a_training_set(
    root, model
):
    args = argparse.Namespace(dataroot=str(root))
    resolve(args)
    assert args.device.type in ("cpu", "cuda")
    assert len(prepare_training_set(model, args)) == 60


def test_seeds_may_be_negative_and_steps_and_top_k_zero(root):
    args = parse(
        compute_influence,
        root,
        "--seed",
        "-3",
        "--noise_seed",
        "-4",
        "--unlearn_steps",
        "0",
        "--top_k",
        "0",
        "--damping",
        "0",
    )
    assert (args.seed, args.noise_seed, args.unlearn_steps, args.top_k, args.damping) == (
        -3,
        -4,
        0,
        0,
        0,
    )


def test_a_pipeline_of_the_data_root_is_a_path_below_it(root):
    shutil.copytree(PARITY / "fixture/sd-tiny", root / "pipeline")
    write_settings(root, pipeline="pipeline")
    assert parse(compute_influence, root).sd_version == str(root / "pipeline")
    write_settings(root, pipeline="org/name")
    assert parse(compute_influence, root).sd_version == "org/name"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"damping": True}, "damping: expected float, found True"),
        ({"num_train": 1.5}, "num_train: expected int, found 1.5"),
        ({"resolution": 0}, "resolution 0: expected a positive whole number"),
        ({"unlearn_lr": -1}, "unlearn_lr -1: expected a non-negative whole number"),
        ({"unlearn_lr": float("inf")}, "unlearn_lr inf: expected a number of at most"),
        ({"unlearn_lr": "Auto"}, "unlearn_lr: expected float, found 'Auto'"),
        ({"name": None}, "name: expected str, found None"),
    ],
)
def test_a_bad_value_in_dataset_json_is_named(settings, said, root):
    write_settings(root, **settings)
    with pytest.raises(UserError, match="dataset.json") as error:
        read_settings(root)
    assert said in str(error.value)


@pytest.fixture
def lent(monkeypatch, model):
    """Lends the scripts a model that is loaded already."""
    for script in compute_training_loss, compute_influence:
        monkeypatch.setattr(preparation, "load_model", lambda *names, **more: model)
    monkeypatch.setattr(queries, "encode_images", encode_images)


@pytest.fixture
def one_task(flags, tmp_path):
    """Flags with a task file of one query."""
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS[:1]))
    return [str(tmp_path / "tasks.json") if value == flags[1] else value for value in flags]


def printed_plan(text):
    """A dry run's flags {name: value} and its lines of costs."""
    table, _, costs = text.partition("\n\n")
    return dict(line.split(maxsplit=1) for line in table.splitlines()), costs


def test_a_dry_run_prints_every_resolved_flag_and_the_costs_and_writes_nothing(
    one_task, root, tmp_path, lent, capsys
):
    before = files(root)
    compute_influence.main([*one_task, *INFLUENCE_FLAGS, "--dry_run"])
    values, costs = printed_plan(capsys.readouterr().out)
    assert (
        values.items()
        >= {
            "unlearn_lr": "100.0",
            "num_train": "400000000",
            "top_k": "10",
            "laion_subset_size": "3",
            "device": "cpu",
            "precision": "fp32",
            "fisher_path": str(root / "sd_fisher.pt"),
            "loss_time_samples": "2",
        }.items()
    )
    assert "1 models, 1 queries, 3 training images" in costs
    assert (
        "1 sweeps of 12 forward passes; 1 forward and backward passes of unlearning" in costs
    )  # 3 images, 2 views, 2 timesteps
    assert (
        "MB of inputs in a batch" in costs
        and "MB of losses and" in costs
        and "MB of weight changes on disk" in costs
    )
    assert not (tmp_path / "results").exists() and files(root) == before


def test_a_dry_run_encodes_nothing(one_task, root, tmp_path, lent, monkeypatch, capsys):
    for name in "laion_latents.npy", "laion_text_embeddings.npy":
        (root / name).unlink()
    monkeypatch.setattr(queries, "encode_images", None)
    monkeypatch.setattr(encoding, "encode_images", None)
    before = files(root)
    compute_training_loss.main([*one_task, *LOSS_FLAGS[2:], "--dry_run"])
    values, costs = printed_plan(capsys.readouterr().out)
    assert values["laion_subset_size"] == "60" and "1 sweeps of 240 forward passes" in costs
    assert files(root) == before and not (tmp_path / "results").exists()
    with pytest.raises(UserError, match="--laion_subset_size 61: this data root has 60 images"):
        compute_training_loss.main([*one_task, "--laion_subset_size", "61", "--dry_run"])


def test_a_top_k_above_the_number_of_candidates_shows_them_all(
    one_task, root, tmp_path, lent, caplog, capsys
):
    compute_training_loss.main([*one_task, *LOSS_FLAGS])
    (root / "laion_subset/images/000001.png").write_bytes(
        b"broken"
    )  # its latents are there: no reason to lose the result
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_influence.main([*one_task, *INFLUENCE_FLAGS, "--top_k", "1000"])
    folder = tmp_path / "results/influence/tiny/gpt/blob/samples/00000.png"
    num_exemplars = len(np.load(tmp_path / "results/orig_loss/tiny/blob/exemplar_loss.npy")) // 2
    assert len((folder / "influence.csv").read_text().splitlines()) == 1 + num_exemplars + 3
    with Image.open(folder / "visualization.jpg") as picture:
        assert picture.height > 200
    assert "000001.png: cannot be read" in caplog.text


def test_overwrite_replaces_losses_made_with_other_settings(one_task, tmp_path, lent):
    compute_training_loss.main([*one_task, *LOSS_FLAGS])
    path = tmp_path / "results/orig_loss/tiny/blob/laion_loss.npy"
    first = path.read_bytes()
    with pytest.raises(
        UserError,
        match="noise_seed is 0, expected 1 .seed of the noise.; give --overwrite to "
        "replace it, or another --result_dir",
    ):
        compute_training_loss.main([*one_task, *LOSS_FLAGS, "--noise_seed", "1"])
    assert path.read_bytes() == first
    compute_training_loss.main([*one_task, *LOSS_FLAGS, "--noise_seed", "1", "--overwrite"])
    assert path.read_bytes() != first
    assert json.loads(record_path(path).read_text())["identity"]["noise_seed"] == 1


def test_the_command_that_makes_losses_repeats_what_is_no_default(root):
    write_settings(root, time_samples=5)
    args = parse(compute_influence, root, "--result_dir", "my results")
    assert (
        advice.loss_command(args)
        == f"python compute_training_loss.py --task_json tasks.json --dataroot {root} "
        f"--result_dir 'my results'"
    )
    args = parse(
        compute_influence,
        root,
        "--loss_time_samples",
        "10",
        "--precision",
        "tf32",
        "--laion_subset_size",
        "9",
        "--compat",
        "abu",
        "--loss_batch_size",
        "30",
    )
    for part in (
        "--time_samples 10",
        "--precision tf32",
        "--laion_subset_size 9",
        "--compat abu",
        "--batch_size 30",
    ):
        assert part in advice.loss_command(args)


def test_latents_of_the_data_root_are_never_replaced(root, model):
    before = files(root)
    encode_training_set(model, root, 512, 20)
    assert files(root) == before


def test_a_nan_made_by_the_encoder_leaves_no_file(root, model, monkeypatch):
    for name in "laion_latents.npy", "laion_text_embeddings.npy":
        (root / name).unlink()
    before = files(root)
    monkeypatch.setattr(
        encoding,
        "encode_images",
        lambda pipeline, paths, *how: torch.full(
            (len(paths), *model.latent_shape(512)), float("nan")
        ),
    )
    with pytest.raises(
        UserError,
        match="the pipeline made NaN or infinite entries of the latents of the training set",
    ):
        encode_training_set(model, root, 512, 20)
    assert files(root) == before


def test_a_truncated_training_image_is_named_and_leaves_no_file(root, model):
    for name in "laion_latents.npy", "laion_text_embeddings.npy":
        (root / name).unlink()
    (root / "laion_subset/images/000000.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = files(root)
    with pytest.raises(UserError, match="laion_subset/images/000000.png: cannot be read"):
        encode_training_set(model, root, 512, 1)
    assert files(root) == before


@pytest.mark.parametrize("text", ["[]", "{}", '{"identity": 3}'])
def test_a_record_of_latents_that_is_none_is_named(text, root, model):
    record_path(root / "laion_latents.npy").write_text(text)
    with pytest.raises(UserError, match="laion_latents.json: not a record"):
        open_training_set(root, "abc", model.latent_shape(512), model.conditioning_shapes)


def png_of_size(width, height):
    """A PNG of a hundred bytes that claims to hold width x height pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("width, height", [(14_200, 14_200), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_before_it_unfolds(width, height, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_size(width, height))
    with pytest.raises(UserError, match="bomb.png: more than 200,000,000 pixels"):
        load_image(path)


def test_a_strip_that_resizing_would_unfold_is_refused(tmp_path):
    Image.new("L", (1, 1000)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="strip.png: 1 x 1000 pixels; at most 200 times"):
        load_image(tmp_path / "strip.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_no_damage_to_an_image_raises_anything_but_a_user_error(form, tmp_path):
    generator, file, path = np.random.default_rng(0), io.BytesIO(), tmp_path / "damaged"
    Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, form)
    refusals = 0
    for trial in range(150):
        content = bytearray(file.getvalue())
        if trial % 2:
            content = content[: generator.integers(len(content))]
        else:
            content[generator.integers(min(len(content), 200))] = generator.integers(256)
        path.write_bytes(content)
        try:
            load_image(path)
        except UserError as error:
            refusals += 1
            assert "damaged" in str(error)
    assert refusals > 50


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16", "LA"])
def test_an_image_of_any_mode_becomes_rgb_pixels_between_minus_one_and_one(mode, tmp_path):
    Image.new(mode, (40, 30)).save(tmp_path / "image.tif")
    pixels = transform_image(load_image(tmp_path / "image.tif"), 16)
    assert (
        pixels.shape == (3, 16, 16)
        and pixels.dtype == torch.float32
        and -1 <= pixels.min()
        and pixels.max() <= 1
    )


def test_the_fisher_of_the_data_root_is_found_ours_before_the_published_one(root):
    args = SimpleNamespace(dataroot=str(root), fisher_path=None)
    assert find_fisher(args) == root / "sd_fisher.pt"
    (root / "sd_fisher.safetensors").touch()
    assert find_fisher(args) == root / "sd_fisher.safetensors"
    args.fisher_path = str(root / "sd_fisher.pt")
    assert find_fisher(args) == Path(args.fisher_path)
    for nowhere in "/", ".", "..":
        args.fisher_path = nowhere
        with pytest.raises(UserError, match="no such file; make it: python -m unlearn fisher"):
            find_fisher(args)


def test_a_pipeline_that_is_a_link_to_nowhere_is_named_and_not_sought_on_the_hub(tmp_path):
    (tmp_path / "dataset.json").write_text('{"pipeline": "pipeline"}')
    (tmp_path / "pipeline").symlink_to("../emoji/pipeline")
    with pytest.raises(
        UserError,
        match="pipeline is a link to ../emoji/pipeline, which is not there; put what it leads to "
        "in its place",
    ):
        read_settings(tmp_path)


def test_results_stand_in_the_published_folder_and_older_ones_are_used_and_said(
    root, tmp_path, caplog
):
    """Published: influence/<synth path less synth/>/, the picture's suffix kept."""
    tasks = load_tasks(PARITY / "fixture/tasks.json", root)
    assert tasks[0].result_name == "tiny/gpt/blob/samples/00000.png"
    folder = tmp_path / "influence"
    assert find_result(folder, tasks[0]) == folder / tasks[0].result_name
    older = folder / "tiny/gpt/blob/samples/00000"
    older.mkdir(parents=True)
    assert find_result(folder, tasks[0]) == find_named_result(folder, tasks[0].query_name) == older
    with caplog.at_level("INFO", "unlearn"):
        tell_older_results(folder, tasks)
    [line] = caplog.messages
    assert "1 of 2 queries have results in folders of an older name" in line and str(older) in line
    (folder / tasks[0].result_name).mkdir()
    new = folder / tasks[0].result_name
    assert find_result(folder, tasks[0]) == find_named_result(folder, tasks[0].query_name) == new
