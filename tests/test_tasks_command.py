"""`python -m unlearn tasks` on a data root laid out like the AbC benchmark."""

import json
from collections import Counter
from pathlib import Path

import pytest

from unlearn import UserError
from unlearn.commands import tasks

SETS = {"imagenet": ("gpt", "media"), "artchive": ("gpt", "object"), "bamfg": ("gpt", "object")}
EXAMPLE = Path(__file__).parent.parent / "tasks/demo_task.json"


def make_entry(domain, model, category):
    """The entry of one customized model: two sets of 40 synthesized images."""
    return {
        "exemplar": [f"dataset/exemplar/{domain}/{model}/0.png"],
        "class_id": 0,
        "category": category,
        "synth": {
            name: [f"dataset/synth/{domain}/{name}/{model}/samples/{i:05d}.png" for i in range(40)]
            for name in SETS[domain]
        },
    }


@pytest.fixture
def dataroot(tmp_path):
    """A data root with as many entries as the rule reaches for, and empty files where images
    stand."""
    root, prompts = tmp_path / "abc", {}
    for test_case, indices in tasks.CHOSEN_ENTRIES.items():
        domain = "imagenet" if "imagenet" in test_case else test_case.removeprefix("test_")
        names = [f"{test_case}_{i}" for i in range(max(indices) + 1)]
        if test_case == "test_unobserved_imagenet":
            names[0] = "n01440764_0000"
        entries = [
            make_entry(domain, name, "fish" if domain == "imagenet" else "art") for name in names
        ]
        write(root / f"json/{test_case}.json", entries)
        for index in indices:
            (root / "models" / domain / names[index]).mkdir(parents=True)
            for paths in entries[index]["synth"].values():
                for path in paths[::4]:
                    image = root / path.removeprefix("dataset/")
                    image.parent.mkdir(parents=True, exist_ok=True)
                    image.touch()
                    prompts[path] = f"prompt of {path}"
    [example] = json.loads(EXAMPLE.read_text())
    prompts["dataset/" + example["synth_image_path"]] = example["prompt"]
    write(root / "path_to_prompts.json", prompts)
    return root


def write(path, value):
    """Writes a JSON file of the data root."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change_entry(dataroot, test_case, index, change):
    """Changes one entry of a test case in place."""
    path = dataroot / f"json/{test_case}.json"
    entries = json.loads(path.read_text())
    change(entries[index])
    write(path, entries)


def run(dataroot, output):
    """Runs the command and reads what it wrote."""
    tasks.main(["--dataroot", str(dataroot), "--output", str(output)])
    return json.loads(output.read_text())


def refusal(dataroot, output):
    """Runs the command and returns why it refused; nothing may be written."""
    with pytest.raises(UserError) as error:
        tasks.main(["--dataroot", str(dataroot), "--output", str(output)])
    assert not output.exists()
    return str(error.value)


def test_the_papers_400_queries_are_20_of_each_of_20_models(dataroot, tmp_path):
    made = run(dataroot, tmp_path / "tasks.json")
    assert len(made) == 400
    models = Counter((task["test_case"], task["test_case_ind"]) for task in made)
    chosen = {(name, index) for name, indices in tasks.CHOSEN_ENTRIES.items() for index in indices}
    assert set(models) == chosen and set(models.values()) == {20}
    assert len({task["model_path"] for task in made}) == 20
    sets = Counter(tuple(task["synth_image_path"].split("/")[1:4]) for task in made)
    assert len(sets) == 40 and set(sets.values()) == {10}
    assert {int(Path(task["synth_image_path"]).stem) for task in made} == set(range(0, 40, 4))


def test_the_demo_task_is_among_the_400_queries(dataroot, tmp_path):
    [example] = json.loads(EXAMPLE.read_text())
    assert example in run(dataroot, tmp_path / "tasks.json")


def test_every_task_names_files_that_are_there_and_its_own_prompt(dataroot, tmp_path):
    for task in run(dataroot, tmp_path / "tasks.json"):
        image, model = task["synth_image_path"], task["model_path"]
        assert (dataroot / image).is_file() and (dataroot / model).is_dir()
        assert (
            model.split("/")[1] == image.split("/")[1]
            and model.split("/")[2] == image.split("/")[3]
        )
        assert task["prompt"] in (
            f"prompt of dataset/{image}",
            "A school of <new1> fish swimming in the ocean",
        )


def test_art_models_have_a_style_prompt_and_imagenet_models_their_category(dataroot, tmp_path):
    made = run(dataroot, tmp_path / "tasks.json")
    found = {task["test_case"]: task["train_prompt"] for task in made}
    style = "A picture in the style of <new1> art"
    assert found == {
        "test_artchive": style,
        "test_bamfg": style,
        "test_unobserved_imagenet": "<new1> fish",
        "test_observed_imagenet": "<new1> fish",
    }


def test_only_the_first_dataset_of_a_path_is_stripped():
    assert tasks.strip_dataset("dataset/synth/dataset/a.png") == "synth/dataset/a.png"
    assert tasks.strip_dataset("synth/dataset/a.png") == "synth/dataset/a.png"


IMAGE = "synth/imagenet/gpt/a/samples/00002.png"


@pytest.mark.parametrize(
    "key, value",
    [
        (IMAGE, "it"),
        (f"dataset/{IMAGE}", "it"),
        (IMAGE, ["it"]),
        ("synth/imagenet/gpt/a/samples", "it"),
        ("dataset/synth/imagenet/gpt/a/samples/", ["0", "1", "it"]),
        ("dataset/synth/imagenet/gpt/a", ["0", "1", "it"]),
    ],
)
def test_a_prompt_is_found_by_path_or_folder_as_a_string_or_in_a_list(tmp_path, key, value):
    write(tmp_path / "path_to_prompts.json", {"synth/imagenet/gpt/b/samples": "other", key: value})
    assert tasks.find_prompt(tasks.read_prompts(tmp_path), IMAGE) == "it"


@pytest.mark.parametrize(
    "prompts",
    [
        {},
        {IMAGE: 3},
        {IMAGE: ""},
        {IMAGE: ["a", "b"]},
        {"synth/imagenet/gpt/a/samples": ["0", "1"]},
    ],
)
def test_a_path_without_a_prompt_is_named(prompts):
    with pytest.raises(UserError, match=f"expected a prompt for {IMAGE} or its folder, found none"):
        tasks.find_prompt(prompts, IMAGE)


def test_a_missing_model_is_named_with_the_image_that_needs_it(dataroot, tmp_path):
    (dataroot / "models/imagenet/n01440764_0000").rmdir()
    message = refusal(dataroot, tmp_path / "tasks.json")
    assert "synth/imagenet/gpt/n01440764_0000/samples/00000.png: expected its model in" in message
    assert f"{dataroot}/models/imagenet/n01440764_0000" in message


def test_a_missing_synthesized_image_is_named(dataroot, tmp_path):
    image = dataroot / "synth/imagenet/gpt/n01440764_0000/samples/00004.png"
    image.unlink()
    assert f"entry 0: {image}: no such file" in refusal(dataroot, tmp_path / "tasks.json")


def test_too_few_entries_are_counted(dataroot, tmp_path):
    path = dataroot / "json/test_unobserved_imagenet.json"
    write(path, json.loads(path.read_text())[:210])
    message = refusal(dataroot, tmp_path / "tasks.json")
    assert message == f"{path}: expected a list with an entry 210, found a list of 210"


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            lambda entry: entry.pop("category"),
            "entry 11: `category` is needed for the train prompt",
        ),
        (
            lambda entry: entry["synth"].pop("gpt"),
            "entry 11: expected `synth` with 2 sets of images",
        ),
        (
            lambda entry: entry.update(synth=[]),
            "entry 11: expected `synth` with 2 sets of images, found []",
        ),
        (
            lambda entry: entry["synth"].update(gpt=3),
            "entry 11: expected `synth.gpt` to be a list of paths, found 3",
        ),
        (
            lambda entry: entry["synth"]["gpt"].pop(),
            "entry 11: expected 40 paths in `synth.gpt`, found 39",
        ),
        (
            lambda entry: entry["synth"]["gpt"].insert(
                0, entry["synth"]["gpt"].pop() and "../../etc/passwd"
            ),
            "entry 11: expected a path inside",
        ),
    ],
)
def test_a_malformed_entry_is_refused_with_what_was_expected_and_found(
    dataroot, tmp_path, change, expected
):
    change_entry(dataroot, "test_observed_imagenet", 11, change)
    assert expected in refusal(dataroot, tmp_path / "tasks.json")


@pytest.mark.parametrize("name", ["path_to_prompts.json", "json/test_bamfg.json"])
def test_a_missing_or_wrong_json_file_is_named(dataroot, tmp_path, name):
    write(dataroot / name, 3)
    assert f"{dataroot / name}: expected a" in refusal(dataroot, tmp_path / "tasks.json")
    (dataroot / name).unlink()
    assert f"{dataroot / name}: no such file" in refusal(dataroot, tmp_path / "tasks.json")
