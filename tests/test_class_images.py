"""Class images of prior preservation: training images too, in their own folder and by their own
prompt."""

import csv
import json
import shutil

import pytest
from test_attribute import PROMPT, QUERY, SOURCE, make_folder, tiny  # noqa: F401

import unlearn
from unlearn import UserError
from unlearn.commands import attribute as command
from unlearn.datasets.class_images import add_class_images, check_apart, read_class_images
from unlearn.datasets.folders import read_folder
from unlearn.datasets.originals import read_plan
from unlearn.datasets.roots import make_data_root


def make_pictures(folder, count, start=0):
    """Pictures without captions, as DreamBooth's folders have them."""
    folder.mkdir(parents=True)
    paths = sorted((SOURCE / "laion_subset/images").iterdir())[start : start + count]
    for path in paths:
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def found(tmp_path):
    instances = make_pictures(tmp_path / "instances", 3)
    classes = make_pictures(tmp_path / "classes", 4, 2)
    return add_class_images(
        read_folder(instances, "a photo of sks dog"),
        read_class_images(classes, "a photo of a dog"),
        True,
    )


def test_class_images_stand_beside_the_others_by_their_own_name_prompt_and_group(found):
    assert [entry.name for entry in found.entries] == sorted(entry.name for entry in found.entries)
    said = {entry.is_class: (entry.captions, entry.group) for entry in found.entries}
    assert said == {
        False: (["a photo of sks dog"], "instance images"),
        True: (["a photo of a dog"], "class images"),
    }
    assert sum(entry.name.startswith("class_images/") for entry in found.entries) == 4


def test_a_data_root_has_both_folders_pictures_and_is_kept_when_it_is_made_again(found, tmp_path):
    root = tmp_path / "root"
    made = make_data_root(found, root, {"pipeline": "any"})
    assert made.is_new and made.count == 7
    for entry in found.entries:
        assert (root / "images" / entry.name).read_bytes() == entry.path.read_bytes()
    lines = map(json.loads, (root / "metadata.jsonl").read_text().splitlines())
    captions = {line["file_name"]: line["text"] for line in lines}
    assert captions == {entry.name: entry.captions for entry in found.entries}
    again = make_data_root(found, root, {"pipeline": "any"})
    assert not again.is_new and not again.changes
    content = json.loads((root / "originals.json").read_text())
    for picture in content["pictures"]:  # as an earlier version wrote them
        picture.pop("path")
    (root / "originals.json").write_text(json.dumps(content))
    assert len(read_plan(root)[0].pictures) == 7


def test_folders_that_hold_each_other_or_lack_a_prompt_are_refused(tmp_path):
    instances = make_folder(tmp_path / "instances", 2)
    classes = make_pictures(instances / "classes", 2)
    for pair in (instances, classes), (classes, instances), (classes, classes):
        with pytest.raises(UserError, match="pictures would count twice"):
            check_apart(*pair)
    with pytest.raises(UserError, match='--class_prompt "a photo of a dog"'):
        read_class_images(classes, None)
    taken = make_pictures(tmp_path / "other/class_images", 2).parent
    apart = make_pictures(tmp_path / "apart", 2)
    with pytest.raises(UserError, match="where the class images will stand; rename its folder: mv"):
        add_class_images(read_folder(taken, "a"), read_class_images(apart, "a"), True)


def test_a_class_prompt_without_class_images_is_refused_before_a_model_is_loaded(tmp_path):
    folder = make_folder(tmp_path / "mine", 2)
    with pytest.raises(UserError, match="--class_prompt: means nothing without --class_images"):
        unlearn.attribute(QUERY, "nowhere", folder, PROMPT, class_prompt="a dog")
    with pytest.raises(UserError, match="no: expected a folder of pictures"):
        command.main([str(QUERY), "--images", str(folder), "--model", "m", "--class_images", "no"])


def test_class_images_are_ranked_and_named_as_such(tmp_path, tiny, capsys):  # noqa: F811
    instances = make_pictures(tmp_path / "instances", 4)
    classes = make_pictures(tmp_path / "classes", 4, 4)
    [answer] = unlearn.attribute(
        QUERY,
        tiny,
        instances,
        PROMPT,
        tmp_path / "out",
        caption="a photo of sks dog",
        class_images=classes,
        class_prompt="a photo of a dog",
        device="cpu",
    )
    table = {row["image"]: row["caption"] for row in answer.table()}
    assert sum(name.startswith("class_images/") for name in table) == 4
    assert {caption for name, caption in table.items() if "class_images/" in name} == {
        "a photo of a dog"
    }
    page = (answer.folder / "report.html").read_text()
    assert "class images" in page and "instance images" in page
    rows = list(csv.DictReader((answer.folder / "influence.csv").open(encoding="utf-8-sig")))
    assert {row["image"] for row in rows} == set(table)
    assert any('"sks"' in warning for warning in answer.warnings)  # class captions do not hide it
