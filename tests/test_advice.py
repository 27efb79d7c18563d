"""What messages tell people to type runs as printed, and what differs is told in words, never by a
hash alone."""

import ast
import json
import logging
import re
import shlex
import shutil
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution import estimation
from unlearn.attribution.fishers import has_other_images
from unlearn.attribution.settings import ScoreSettings, UnlearnSettings
from unlearn.baselines import methods
from unlearn.commands import advice, baselines, doctor, encode, fisher, index, removal_flags
from unlearn.commands.retrain_plans import ranking_command
from unlearn.datasets.captions import list_folder
from unlearn.evaluation.rankings import read_influence, warnings_of
from unlearn.retraining.measures import MeasureSettings
from unlearn.retraining.recipes import Recipe
from unlearn.storage import records
from unlearn.storage.records import MEANINGS, compare_identity, explain_difference, record_path

PROGRAMS = {
    "compute_training_loss.py": compute_training_loss.main,
    "compute_influence.py": compute_influence.main,
    "fisher": fisher.main,
    "encode": encode.main,
    "index": index.main,
}
ROOT = Path(__file__).parent.parent
COMMAND = re.compile(
    r"python (?:-m unlearn \w+|\S*compute_\w+\.py)(?: --\w+(?: "
    r"(?!and\b)(?:'[^']*'|[^-\s';][^\s;]*))*)*"
)


def run(command):
    """Runs a command line as it was printed."""
    words = shlex.split(command)
    assert words[0] == "python"
    name, argv = (
        (words[3], words[4:])
        if words[1:3] == ["-m", "unlearn"]
        else (Path(words[1]).name, words[2:])
    )
    PROGRAMS[name](argv)


def commands_of(text):
    """The commands in a message, without what follows them."""
    return [match[0].rstrip(",") for match in COMMAND.finditer(text)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small root of one's own in a folder whose name has a space: pictures, captions, a query,
    and a pipeline that is no default."""
    home = tmp_path / "my data"
    for name in "laion_subset/images", "synth":
        (home / "root" / name).mkdir(parents=True)
    shutil.copytree(PARITY / "fixture/sd-tiny", home / "tiny pipeline")
    for path in list_folder(PARITY / "fixture/abc/laion_subset/images")[:5]:
        shutil.copy(path, home / "root/laion_subset/images")
    (home / "root/laion_subset/captions.txt").write_text(
        "".join(f"picture {number}\n" for number in range(5))
    )
    shutil.copy(PARITY / "fixture/abc/laion_subset/images/000007.png", home / "root/synth/0.png")
    (home / "root/dataset.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "time_samples": 2,
                "unlearn_batch_size": 4,
                "unlearn_grad_accum_steps": 1,
            }
        )
    )
    (home / "tasks.json").write_text(
        json.dumps([{"synth_image_path": "synth/0.png", "prompt": "a picture"}])
    )
    monkeypatch.chdir(tmp_path)  # not the folder of the scripts
    monkeypatch.setattr(estimation, "FEWEST_SAMPLES", 60)
    return home


def flags_of(folder, *more):
    return [
        "--task_json",
        str(folder / "tasks.json"),
        "--dataroot",
        str(folder / "root"),
        "--sd_version",
        str(folder / "tiny pipeline"),
        "--result_dir",
        str(folder / "results"),
        *more,
    ]


def examine(folder, capsys):
    """(status, what it printed)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        doctor.main(flags_of(folder))
    return end.value.code, capsys.readouterr().out


def test_what_the_doctor_says_of_a_fresh_root_of_ones_own_run_in_its_order_leaves_nothing_to_do(
    folder, capsys
):
    status, text = examine(folder, capsys)
    commands = commands_of(text)
    assert status == 0 and [command.split(" --")[0].split("/")[-1] for command in commands] == [
        "python -m unlearn encode",
        "python -m unlearn fisher",
        "compute_training_loss.py",
        "compute_influence.py",
    ], text
    for command in commands:
        assert "--sd_version" in command and "''" not in command
        run(command)
    status, text = examine(folder, capsys)
    assert status == 0 and "all is well" in text and not commands_of(text)
    assert json.loads((folder / "root/sd_fisher.json").read_text())["identity"]["num_samples"] == 60
    assert not np.load(folder / "results/influence/0.png/influence.npz")["warnings"].size


def refuse(program, argv):
    with pytest.raises(UserError) as error:
        program(argv)
    return str(error.value)


def test_each_refusal_on_the_way_to_a_ranking_names_the_command_that_leads_on(folder, tmp_path):
    flags = flags_of(folder, "--loss_time_samples", "4")
    said = refuse(compute_influence.main, flags)
    assert "no such file; make it: python -m unlearn fisher" in said
    run(*commands_of(said))
    said = refuse(compute_influence.main, flags)
    assert "no cached losses yet; make them: python" in said and "--time_samples 4" in said
    run(*commands_of(said))
    compute_influence.main(flags)
    said = refuse(compute_influence.main, flags_of(folder))  # other timesteps than were cached
    assert "timesteps is [0, 250, 500, 750], expected [0, 500]" in said
    run(*commands_of(said))  # with --overwrite
    said = refuse(compute_influence.main, flags_of(folder, "--index", str(tmp_path / "an index")))
    assert "has no index of base; build it: python -m unlearn index" in said
    run(*commands_of(said))
    compute_influence.main(
        flags_of(
            folder,
            "--index",
            str(tmp_path / "an index"),
            "--shortlist",
            "2",
            "--audit",
            "1",
            "--overwrite",
        )
    )


def test_a_step_too_small_names_the_command_that_lets_it_be_chosen(folder, capsys):
    run(
        f"python -m unlearn fisher --dataroot {shlex.quote(str(folder / 'root'))} --sd_version "
        f"{shlex.quote(str(folder / 'tiny pipeline'))}"
    )
    compute_training_loss.main(flags_of(folder))
    compute_influence.main(flags_of(folder, "--unlearn_lr", "1e-12"))
    text = capsys.readouterr().out
    assert "Warning: the weights moved by" in text
    run(*commands_of(text[text.index("Let the step be chosen") :]))
    assert "Warning" not in capsys.readouterr().out


def test_corrupt_pictures_name_the_command_that_leaves_them_out(folder):
    (folder / "root/laion_subset/images/000001.png").write_bytes(b"no picture")
    said = refuse(compute_training_loss.main, flags_of(folder))
    assert "1 of 5 images cannot be read" in said
    run(*commands_of(said))
    assert len(np.load(folder / "root/laion_text_embeddings.npy")) == 4


@pytest.mark.slow
def test_a_second_models_fisher_stands_beside_the_first_ones_and_each_program_says_which_to_give(
    folder, caplog
):
    first = ["--dataroot", str(folder / "root"), "--sd_version", str(folder / "tiny pipeline")]
    fisher.main(first)
    kept = (folder / "root/sd_fisher.safetensors").read_bytes()
    second = shutil.copytree(folder / "tiny pipeline", folder / "second pipeline")
    weights = next((second / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1  # a digit of a weight
    weights.write_bytes(content)
    flags = [
        str(second) if value == str(folder / "tiny pipeline") else value
        for value in flags_of(folder)
    ]
    compute_training_loss.main(flags)
    said = refuse(compute_influence.main, flags)
    assert (
        f"other weights of the model: that of {folder / 'tiny pipeline'}, expected that of {second}"
        in said
        and not re.search("[0-9a-f]{16}", said)
    )
    [command] = commands_of(said)
    given = shlex.split(said.split(" and give ")[1])
    run(command)
    assert (folder / "root/sd_fisher.safetensors").read_bytes() == kept
    compute_influence.main([*flags, *given])
    assert refuse(compute_influence.main, flags).endswith(
        f"; give --fisher_path {shlex.quote(given[1])}"
    )
    with caplog.at_level(logging.INFO, "unlearn"):
        fisher.main(
            ["--dataroot", str(folder / "root"), "--sd_version", str(second)]
        )  # without --output: nothing is refused, nothing replaced
    assert (
        f"sd_fisher.safetensors: belongs to {folder / 'tiny pipeline'}, and stays" in caplog.text
        and given[1] in caplog.text
    )
    assert (folder / "root/sd_fisher.safetensors").read_bytes() == kept


def test_a_fisher_of_other_training_images_is_refused_as_a_roots_own_and_warned_of_wherever_its_results_stand(
    folder, capsys, caplog
):
    make = ["--dataroot", str(folder / "root"), "--sd_version", str(folder / "tiny pipeline")]
    fisher.main([*make, "--laion_subset_size", "4"])
    other = folder / "other root"
    shutil.copytree(
        folder / "root",
        other,
        ignore=lambda _, names: [
            name for name in names if name.startswith("laion_") and "." in name
        ],
    )
    for image, text in zip(
        list_folder(PARITY / "fixture/abc/laion_subset/images")[30:],
        list_folder(other / "laion_subset/images"),
    ):
        shutil.copy(image, text)
    flags = [
        str(other) if value == str(folder / "root") else value
        for value in flags_of(folder, "--scoring", "gradient")
    ]
    said = refuse(compute_influence.main, flags)
    assert (
        f"{other / 'sd_fisher.safetensors'}: was made from other training images than those of "
        f"{other}; make it anew: python" in said
    )
    for program in index.main, baselines.main:
        more = (
            ["--output", str(folder / "index")]
            if program is index.main
            else ["--methods", "influence", "--result_dir", str(folder / "results")]
        )
        assert "was made from other training images" in refuse(program, [*flags[:6], *more])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        doctor.main(flags[:8])
    text = capsys.readouterr().out
    assert re.search(r"note +Fisher .* was made from other training images than those of", text)
    given = ["--fisher_path", str(folder / "root/sd_fisher.safetensors")]
    with caplog.at_level(logging.WARNING, "unlearn"):
        compute_influence.main([*flags, *given])
    baselines.main([*flags[:8], "--methods", "influence", *given])
    words = f"the Fisher {given[1]} was made from other training images than those of {other}"
    screen = capsys.readouterr().out
    assert (
        words in caplog.text
        and f"Warning: {words}." in screen
        and "Let the step be chosen" not in screen
    )
    for path in (
        folder / "results/influence/0.png/influence.npz",
        folder / "results/baselines/influence/0.png/influence.npz",
    ):
        assert warnings_of(read_influence(path, "")) == [words]
    assert words in (folder / "results/influence/0.png/influence.csv").read_text()
    run(next(command for command in commands_of(said) if "fisher" in command))
    compute_influence.main([*flags, "--overwrite"])
    assert warnings_of(read_influence(folder / "results/influence/0.png/influence.npz", "")) == []


def test_a_fisher_of_some_or_all_images_of_a_root_serves_whichever_are_ranked(folder):
    root = folder / "root"
    path = root / "sd_fisher.safetensors"
    make = ["--dataroot", str(root), "--sd_version", str(folder / "tiny pipeline")]
    fisher.main(make)
    assert not any(has_other_images(path, root, count) for count in (None, 3, 5))
    fisher.main([*make, "--laion_subset_size", "3", "--overwrite"])
    assert not any(has_other_images(path, root, count) for count in (None, 3, 5))
    record = json.loads(record_path(path).read_text())
    assert (
        record["circumstances"].pop("num_images") == 3
    )  # as before records told it: of all images or of as many as are used
    record_path(path).write_text(json.dumps(record))
    assert not has_other_images(path, root, 3) and has_other_images(path, root, 4)
    path.rename(path.with_suffix(".pt"))
    assert not has_other_images(path.with_suffix(".pt"), root, 4), "published ones have no record"


@pytest.mark.parametrize(
    "num_images, expected",
    [(1, 4000), (40, 4000), (800, 4000), (1448, 7240), (118_287, 591_435), (10**7, 1_000_000)],
)
def test_a_fishers_samples_follow_the_number_of_images_and_are_as_published_on_mscoco(
    num_images, expected, tmp_path
):
    assert estimation.choose_num_samples(tmp_path, num_images) == expected


def test_a_fishers_samples_are_as_published_on_abc(root):
    assert estimation.choose_num_samples(root, 60) == 1_000_000


def test_a_command_leaves_out_defaults_and_what_was_not_given(root):
    args = Namespace(
        task_json="t.json",
        dataroot=str(root),
        sd_version="",
        result_dir="results",
        laion_subset_size=None,
        loss_time_samples=10,
        precision="bf16",
        device=None,
        vae_batch_size=3,
        compat=None,
    )
    assert advice.loss_command(args) == (
        f"python {ROOT}/compute_training_loss.py --task_json t.json --dataroot {root} "
        f"--vae_batch_size 3"
    ).replace(f"{ROOT}/" if Path("compute_training_loss.py").is_file() else "\0", "")


@pytest.mark.parametrize("flag", ["damping", "unlearn_steps", "top_k"])
def test_a_command_carries_a_flag_that_is_zero(flag, root):
    (root / "dataset.json").write_text('{"top_k": 5}')
    words = shlex.split(
        advice.influence_command(
            Namespace(task_json="t.json", dataroot=str(root), device=None, **{flag: 0})
        )
    )
    assert words[-2:] == [f"--{flag}", "0"]


def test_the_command_of_a_run_carries_every_flag_that_its_result_depends_on(root, tmp_path):
    given = {
        "task_json": "t.json",
        "result_dir": "r",
        "dataroot": str(root),
        "sd_version": str(PARITY / "fixture/sd-tiny"),
        "laion_subset_size": 7,
        "vae_batch_size": 3,
        "noise_seed": 5,
        "device": "cpu",
        "compat": "abu",
        "precision": "tf32",
        "scoring": "exact",
        "fisher_path": "f.pt",
        "weight_selection": "attn",
        "damping": 0.3,
        "num_train": 9,
        "unlearn_lr": 0.5,
        "unlearn_steps": 2,
        "unlearn_batch_size": 6,
        "unlearn_grad_accum_steps": 11,
        "loss_batch_size": 13,
        "loss_time_samples": 5,
        "seed": -4,
        "top_k": 0,
    }
    args = compute_influence.parse_arguments(
        [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
    )
    assert vars(args).keys() - given.keys() == {
        "overwrite",
        "dry_run",
        "shard",
        "index",
        "shortlist",
        "audit",
        "unet",
        "lora",
        "weights",
        "box",
        *removal_flags.OWN,
    }
    words = shlex.split(advice.influence_command(args))
    again = compute_influence.parse_arguments([*words[2:], "--device", "cpu"])
    assert vars(again) == vars(args)


def test_the_images_that_retrain_leaves_out_are_no_flag_of_the_command_that_ranks(root):
    args = Namespace(task_json=["t.json"], dataroot=str(root), top_k=[3, 12])
    assert "--top_k" not in ranking_command(args, Path("results/influence"), "ours")


# --- differences in words


def fields_of(tree):
    """Keys of dictionaries that are identities: returned by functions of that name, or assigned to
    a variable of that name."""
    for node in ast.walk(tree):
        is_identity = (
            isinstance(node, ast.FunctionDef)
            and node.name.endswith("identity")
            or isinstance(node, ast.Assign)
            and any("identity" in ast.unparse(target) for target in node.targets)
        )
        for part in ast.walk(node) if is_identity else ():
            if isinstance(part, ast.Dict):
                yield from (key.value for key in part.keys if isinstance(key, ast.Constant))
            elif (
                isinstance(part, ast.Subscript)
                and ast.unparse(part.value) == "identity"
                and isinstance(part.slice, ast.Constant)
            ):
                yield part.slice.value


def all_fields():
    paths = [*(ROOT / "unlearn").rglob("*.py"), *ROOT.glob("compute_*.py")]
    found = {
        field for path in paths for field in fields_of(ast.parse(path.read_text(encoding="utf-8")))
    }
    found |= {
        *UnlearnSettings().identity,
        *ScoreSettings.of_index("exact", 1, 1).identity,
        *estimation.FisherSettings.__dataclass_fields__,
    }
    kinds = (*methods.METHODS.values(), Recipe, MeasureSettings)
    found |= {field.name for kind in kinds for field in fields(kind)}
    committed = [
        *(ROOT / "data").rglob("sd_fisher.json"),
        *(ROOT / "results/evidence").rglob("*.json"),
    ]
    identities = [
        content.get("identity")
        for path in committed
        for content in [json.loads(path.read_text())]
        if isinstance(content, dict)
    ]
    return sorted(
        found
        | {field for identity in identities if isinstance(identity, dict) for field in identity}
    )


def test_the_fields_of_all_identities_are_found():
    assert {
        "weights",
        "training_set",
        "query",
        "fisher",
        "weight_change",
        "members",
        "prompts",
        "schedule",
        "target_change",
        "views",
        "captions",
        "num_samples",
        "fit_images",
        "query_seed",
    } <= set(all_fields())


@pytest.mark.parametrize("field", all_fields())
def test_every_field_of_an_identity_is_explained_in_words_without_a_hash(field):
    words, kind = MEANINGS[field]
    names = {"model": "models/a", "data root": "data/a", "query": "synth/a.png", "Fisher": "a.pt"}
    for found, expected in (
        ("bc9c" * 8, "d0cb" * 8),
        (["bc9c" * 8], ["d0cb" * 8]),
        ({"laion": "bc9c" * 8}, {"laion": "d0cb" * 8}),
    ):
        said = explain_difference(field, found, expected, {}, {})
        assert words in said and not re.search("[0-9a-f]{16}", said)
        if kind:
            other = names[kind].replace("a", "b")
            assert f"that of {names[kind]}, expected that of {other}" in explain_difference(
                field, found, expected, names, {kind: other}
            )
            assert f"{names[kind]} has changed since" in explain_difference(
                field, found, expected, names, names
            )
    assert f"{field} is 3, expected 4 ({words})" == explain_difference(field, 3, 4, {}, {})


def test_of_settings_the_one_that_differs_is_told():
    assert explain_difference(
        "settings", {"damping": 0, "seed": 1}, {"damping": 0.1, "seed": 1}, {}, {}
    ) == ("damping is 0, expected 0.1 (added to the Fisher)")


def test_losses_of_another_data_root_are_told_by_its_name(folder, capsys):
    compute_training_loss.main(flags_of(folder))
    other = shutil.copytree(folder / "root", folder / "other root")
    shutil.copy(
        PARITY / "fixture/abc/laion_subset/images/000030.png",
        other / "laion_subset/images/000000.png",
    )
    flags = [str(other) if value == str(folder / "root") else value for value in flags_of(folder)]
    said = refuse(compute_training_loss.main, flags)
    assert (
        f"other training images, their order and what they were encoded by: that of "
        f"{folder / 'root'}, expected that of {other}" in said
    )
    assert not re.search("[0-9a-f]{16}", said)


def test_a_record_that_names_nothing_is_explained_too(tmp_path):
    records.NAMES.clear()
    with pytest.raises(
        UserError, match="a.npy: made with other settings: other weights of the model; try"
    ):
        compare_identity(
            tmp_path / "a.npy",
            {"weights": "bc9c" * 8},
            {"format_version": 1, "weights": "d0cb" * 8},
            "try",
        )
