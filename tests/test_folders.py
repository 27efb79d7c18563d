"""Folders of training images as people have them: every convention gives the same pairs, and what
is left out is named."""

import csv
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from unlearn import UserError
from unlearn.datasets.captions import pair_images
from unlearn.datasets.folders import read_folder

NAMES = ["apple.png", "bear.JPG", "cat.webp"]
CAPTIONS = ["a red apple", "a bear, sitting", 'a "cat"']
SUFFIX = {".JPG": "JPEG", ".jpg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}


def draw(path, seed=0):
    """Writes a picture of many colours in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    kind = SUFFIX.get(path.suffix, path.suffix[1:].upper())
    with open(path, "wb") as file:
        Image.fromarray(pixels).save(file, kind)


def write_lines(folder, pairs):
    (folder / "captions.txt").write_text("\n".join(text for _, text in sorted(pairs)) + "\n")


def write_jsonl(folder, pairs, key="text"):
    lines = [json.dumps({"file_name": name, key: text}) for name, text in pairs]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_csv(folder, pairs, key="caption"):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", key), *pairs])


def write_sidecars(folder, pairs, suffix=".txt"):
    for name, text in pairs:
        (folder / name).with_suffix(suffix).write_text(text + "\n")


def write_coco(folder, pairs):
    images = [{"id": n, "file_name": name} for n, (name, _) in enumerate(pairs)]
    notes = [{"id": n, "image_id": n, "caption": text} for n, (_, text) in enumerate(pairs)]
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_train.json").write_text(
        json.dumps({"images": images, "annotations": notes})
    )


CONVENTIONS = {
    "lines": write_lines,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "sidecars": write_sidecars,
    "coco": write_coco,
    "jsonl, prompt": lambda folder, pairs: write_jsonl(folder, pairs, "prompt"),
    "csv, text": lambda folder, pairs: write_csv(folder, pairs, "text"),
    ".caption": lambda folder, pairs: write_sidecars(folder, pairs, ".caption"),
}


@pytest.fixture
def folder(tmp_path):
    """Three pictures without captions."""
    for number, name in enumerate(NAMES):
        draw(tmp_path / "mine" / name, number)
    return tmp_path / "mine"


def pairs_of(found):
    return [(entry.name, *entry.captions) for entry in found.entries]


def refusal(*args, **settings):
    with pytest.raises(UserError) as error:
        read_folder(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("write", CONVENTIONS.values(), ids=CONVENTIONS)
def test_every_convention_gives_the_same_pairs(folder, write):
    write(folder, list(zip(NAMES, CAPTIONS))[::-1])
    found = read_folder(folder)
    assert pairs_of(found) == list(zip(NAMES, CAPTIONS))
    assert not found.skipped and not found.notes
    assert [entry.path for entry in found.entries] == [folder / name for name in NAMES]
    assert f'apple.png -> "{CAPTIONS[0]}"' in found.describe()


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_coco])
def test_annotations_above_the_pictures_name_them_by_the_end_of_their_path(folder, write):
    (folder / "train").mkdir()
    for name in NAMES:
        (folder / name).rename(folder / "train" / name)
    write(folder, list(zip(NAMES, CAPTIONS)))
    assert pairs_of(read_folder(folder)) == [(f"train/{n}", c) for n, c in zip(NAMES, CAPTIONS)]


def test_captions_txt_above_one_folder_of_pictures_is_read_and_above_two_is_refused(folder):
    for name in NAMES:
        draw(folder / "images" / name)
        (folder / name).unlink()
    write_lines(folder, list(zip(NAMES, CAPTIONS)))
    assert [entry.captions[0] for entry in read_folder(folder).entries] == CAPTIONS
    (folder / "other").mkdir()
    (folder / "images/cat.webp").rename(folder / "other/cat.webp")
    assert "captions.txt: which line is whose? The pictures stand in 2 folders" in refusal(folder)


def test_metadata_of_each_split_names_its_own_pictures(folder):
    for split in "train", "test":
        draw(folder / split / "1.png")
        write_jsonl(folder / split, [("1.png", f"of {split}")])
    found = read_folder(folder)
    assert pairs_of(found) == [("test/1.png", "of test"), ("train/1.png", "of train")]
    assert found.skipped["without a caption; --caption gives them one"] == NAMES


def test_several_lines_of_a_name_are_several_captions(folder):
    write_csv(folder, [(name, text) for name in NAMES for text in (f"1 {name}", f"2 {name}")])
    assert pairs_of(read_folder(folder))[0] == ("apple.png", "1 apple.png", "2 apple.png")


def test_a_caption_of_ones_own_file_is_its_first_line_and_more_lines_are_counted(folder):
    write_sidecars(folder, [("apple.png", "\nan apple\non a table"), ("bear.JPG", "a bear")])
    (folder / "cat.txt").write_text("")
    found = read_folder(folder)
    assert [entry.captions for entry in found.entries] == [["an apple"], ["a bear"], [""]]
    assert found.notes == ["1 .txt files have several lines, of which the first is the caption"]


def test_kohyas_folders_say_repeats_and_class_words_where_no_file_says_more(tmp_path):
    for name in "10_sks dog/1.png", "10_sks dog/2.png", "2_a cat_in_hat/1.png":
        draw(tmp_path / name)
    (tmp_path / "10_sks dog/2.txt").write_text("sks dog on a beach")
    found = read_folder(tmp_path)
    assert pairs_of(found) == [
        ("10_sks dog/1.png", "sks dog"),
        ("10_sks dog/2.png", "sks dog on a beach"),
        ("2_a cat_in_hat/1.png", "a cat_in_hat"),
    ]
    assert [entry.repeats for entry in found.entries] == [10, 10, 2]
    assert found.convention == (
        "the names of their folders (2) and .txt files beside the pictures (1)"
    )
    inner = read_folder(tmp_path / "10_sks dog", caption="a dog")
    assert pairs_of(inner) == [("1.png", "a dog"), ("2.png", "sks dog on a beach")]
    assert [entry.repeats for entry in inner.entries] == [10, 10]


def test_a_year_is_no_number_of_repeats(tmp_path):
    draw(tmp_path / "2024_trip/1.png")
    assert "none with a caption" in refusal(tmp_path)


def test_one_caption_for_all_is_dreambooths_and_other_captions_come_first(folder):
    assert pairs_of(read_folder(folder, caption="sks")) == [(name, "sks") for name in NAMES]
    write_sidecars(folder, [("bear.JPG", "a bear")])
    found = read_folder(folder, caption="sks")
    assert [entry.captions for entry in found.entries] == [["sks"], ["a bear"], ["sks"]]
    assert "one caption for the others (2)" in found.convention


def test_folders_names_are_captions_where_they_are_asked_for(tmp_path):
    for name in "dog/1.png", "3_cat/1.png":
        draw(tmp_path / name)
    assert pairs_of(read_folder(tmp_path, captions="folder")) == [
        ("3_cat/1.png", "cat"),
        ("dog/1.png", "dog"),
    ]
    assert pairs_of(read_folder(tmp_path)) == [("3_cat/1.png", "cat")]


def test_conventions_that_agree_are_one_and_those_that_disagree_are_refused_until_one_is_chosen(
    folder,
):
    pairs = list(zip(NAMES, CAPTIONS))
    write_lines(folder, pairs)
    write_sidecars(folder, pairs)
    assert read_folder(folder).convention == "captions.txt"
    (folder / "bear.txt").write_text("a cub")
    assert refusal(folder) == (
        f"{folder}: captions.txt and .txt files beside the pictures disagree, first on bear.JPG: "
        '"a bear, sitting" and "a cub"; say which the model was trained with: '
        "--captions captions.txt or --captions .txt"
    )
    assert read_folder(folder, captions=".txt").entries[1].captions == ["a cub"]
    assert read_folder(folder, captions="captions.txt").entries[1].captions == [CAPTIONS[1]]
    assert "--captions .caption: " in refusal(folder, captions=".caption")


def test_spaces_at_the_ends_are_no_disagreement_and_broken_captions_name_the_others(folder):
    pairs = list(zip(NAMES, CAPTIONS))
    write_sidecars(folder, pairs)
    write_jsonl(folder, [(name, f"{text} ") for name, text in pairs])
    assert read_folder(folder).convention == "metadata.jsonl"
    (folder / "captions.txt").write_text("buy milk\n")
    assert refusal(folder).endswith(
        "or take other captions: --captions metadata.jsonl or --captions .txt"
    )
    assert read_folder(folder, captions=".txt").convention == ".txt files beside the pictures"


def test_pictures_without_captions_and_captions_without_pictures_are_named(folder):
    write_jsonl(folder, [("apple.png", "an apple"), ("gone.png", "gone"), ("cat.webp", "a cat")])
    found = read_folder(folder)
    assert [entry.name for entry in found.entries] == ["apple.png", "cat.webp"]
    assert found.skipped == {
        "metadata.jsonl names it, and it is not in the folder": ["gone.png"],
        "without a caption; --caption gives them one": ["bear.JPG"],
    }
    assert "1 left out: without a caption; --caption gives them one (bear.JPG)" in found.describe()


def test_what_systems_make_and_kinds_that_are_not_read_are_counted_and_named(folder):
    pairs = [(name, "x") for name in NAMES]
    for name in ".ipynb_checkpoints/apple.png", "__MACOSX/cat.png", "._bear.png", ".hidden.png":
        draw(folder / name)
    for name in "new.jfif", "old.gif", "scan.tif":
        draw(folder / name)
        pairs.append((name, "x"))
    (folder / "photo.avif").write_bytes(b"\0\0\0\x20ftypavif")
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "mislabelled.dat").write_bytes((folder / "apple.png").read_bytes())
    (folder / "elsewhere").symlink_to(folder.parent)
    write_sidecars(folder, [*pairs, ("photo.png", "x")])
    (folder / "notes.txt").write_text("buy milk")
    found = read_folder(folder)
    assert [entry.name for entry in found.entries] == sorted(name for name, _ in pairs)
    counts = {why.split(",")[0].split(";")[0]: len(names) for why, names in found.skipped.items()}
    assert counts == {
        "hidden": 4,
        "of a kind that is not read": 1,
        "a broken link": 1,
        "a link to a folder": 1,
        "a picture by its first bytes": 1,
        "a .txt file without a picture": 1,
    }
    assert any("photo.avif" in line for line in found.describe())


def test_a_kind_that_is_not_read_does_not_shift_the_lines_of_captions_txt(folder):
    (folder / "anger.avif").write_bytes(b"x")
    write_lines(folder, [("anger.avif", "anger"), *zip(NAMES, CAPTIONS)])
    assert pairs_of(read_folder(folder)) == list(zip(NAMES, CAPTIONS))


def test_ambiguous_orders_are_refused_with_a_way_on_that_works(tmp_path):
    for number in (2, 10):
        draw(tmp_path / f"{number}.png")
    (tmp_path / "captions.txt").write_text("two\nten\n")
    said = refusal(tmp_path)
    assert "which line is whose?" in said and "in place of captions.txt" in said
    assert "dataset.json" not in said
    (tmp_path / "captions.txt").unlink()
    write_jsonl(tmp_path, [("2.png", "two"), ("10.png", "ten")])
    assert pairs_of(read_folder(tmp_path)) == [("10.png", "ten"), ("2.png", "two")]


def test_names_are_matched_across_systems(tmp_path):
    composed = unicodedata.normalize("NFC", "café.png")
    draw(tmp_path / "in" / unicodedata.normalize("NFD", composed))
    draw(tmp_path / "in/deep/b.png")
    draw(tmp_path / "in/c.png")
    write_jsonl(
        tmp_path,
        [
            (f"in\\{composed}", "coffee"),
            (".\\in\\deep\\b.png", "b"),
            ("C:\\Users\\me\\set\\in\\c.png", "c"),
        ],
    )
    found = read_folder(tmp_path)
    assert [entry.captions for entry in found.entries] == [["c"], ["coffee"], ["b"]]
    assert not found.skipped


def test_a_name_never_means_a_picture_of_another_folder_nor_one_of_two(tmp_path):
    for name in "dog/1.png", "a/2.png", "b/2.png", "cat/3.png":
        draw(tmp_path / name)
    write_jsonl(
        tmp_path,
        [("cat/1.png", "x"), ("2.png", "x"), ("3.png", "three"), ("../../etc/passwd", "x")],
    )
    found = read_folder(tmp_path)
    assert pairs_of(found) == [("cat/3.png", "three")]
    assert found.skipped["metadata.jsonl names it, and it is not in the folder"] == [
        "cat/1.png",
        "../../etc/passwd",
    ]
    assert found.skipped["metadata.jsonl names it, and it fits several pictures of the folder"] == [
        "2.png"
    ]


def test_names_above_200_bytes_and_of_other_bytes_are_no_dead_end(tmp_path):
    long = "x" * 240 + ".png"
    draw(tmp_path / long)
    write_sidecars(tmp_path, [(long, "long")])
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(b"x")
    found = read_folder(tmp_path)
    assert pairs_of(found) == [(long, "long")]
    assert list(found.skipped) == ["its name is not UTF-8; rename it"]
    assert all(line.isprintable() for line in found.describe())


def test_groups_are_folders_or_a_column_whatever_the_captions_come_from(tmp_path):
    for name in "a/1.png", "a/2.png", "b/1.png":
        draw(tmp_path / name)
        write_sidecars(tmp_path, [(name, "x")])
    (tmp_path / "metadata.csv").write_text(
        "file_name,artist,year\na/1.png,Anna,1\na/2.png,,2\nb/1.png,Ben,3\n"
    )
    assert [e.group for e in read_folder(tmp_path, groups="folder").entries] == ["a", "a", "b"]
    found = read_folder(tmp_path, groups="artist")
    assert [entry.group for entry in found.entries] == ["Anna", None, "Ben"]
    assert found.notes == ["1 of 3 pictures have no artist"]
    said = refusal(tmp_path, groups="artists")
    assert "--groups artists: " in said and "did you mean artist?" in said


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("metadata.csv", "file_name,text\na.png,one, two\n", "line 2: expected 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"open\n', "not valid CSV"),
        ("metadata.csv", "image,text\na.png,x\n", "expected a first line with the columns"),
        ("metadata.csv", "file_name,text,text\n", "each once"),
        ("metadata.jsonl", '{"file_name": "a.png"', "line 1: not valid JSON"),
        ("metadata.jsonl", "[" * 100_000, "line 1: not valid JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "expected an object with a string"),
        ("captions.txt", "one\ntwo\n", "found 1 images, 2 lines"),
        ("captions.txt", "a.png a dog\n", "1 of 1 lines begin with an image's name"),
        ("a.txt", "\udcff", "not UTF-8"),
        ("other.json", "{}", "none with a caption; looked for"),
    ],
)
def test_broken_captions_are_refused_in_one_line(tmp_path, name, text, said):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    assert said in refusal(tmp_path)


def test_folders_without_pictures_files_and_missing_folders_are_refused(tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"x")
    assert "1 of a kind that is not read; make it PNG or JPEG" in refusal(tmp_path)
    assert "found no such folder" in refusal(tmp_path / "gone")
    assert "found a file; unpack it" in refusal(tmp_path / "photo.heic")
    assert "--caption: expected Unicode text" in refusal(tmp_path, caption="a \udce9")


def test_a_table_of_metadata_serves_a_data_root_too(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    write_csv(tmp_path, [("b.png", "1"), ("b.png", "2"), ("a.png", "3"), ("a.png", "4")], "prompt")
    assert pair_images(tmp_path, tmp_path / "metadata.csv") == (
        [tmp_path / "b.png", tmp_path / "a.png"],
        [["1", "2"], ["3", "4"]],
    )
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,1\n")
    with pytest.raises(UserError, match="no captions; expected them as text, caption or prompt"):
        pair_images(tmp_path, tmp_path / "metadata.csv")


@pytest.mark.parametrize("kind", ["lines", "jsonl"])
def test_a_training_image_may_be_a_link_whatever_names_it_and_a_name_may_not_lead_out(
    kind, tmp_path
):
    images, captions = tmp_path / "images", tmp_path / {"lines": "c.txt", "jsonl": "c.jsonl"}[kind]
    draw(images / "a.png")
    draw(tmp_path / "outside/b.png")
    (images / "b.png").symlink_to(tmp_path / "outside/b.png")
    pairs = {"a.png": "a", "b.png": "b"}
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in pairs.items()]
    captions.write_text("\n".join(pairs.values() if kind == "lines" else rows))
    paths, found = pair_images(images, captions)
    assert [path.name for path in paths] == list(pairs) and found == [["a"], ["b"]]
    if kind == "jsonl":
        captions.write_text(json.dumps({"file_name": "../outside/b.png", "text": "b"}))
        with pytest.raises(UserError, match="names of files below the folder"):
            pair_images(images, captions)


def test_a_root_whose_captions_and_images_are_not_the_same_is_told_the_way_on(tmp_path):
    draw(tmp_path / "images/a.png")
    for names in (["a.png", "gone.png"], ["sub\\a.png"]):
        lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
        (tmp_path / "c.jsonl").write_text("\n".join(lines))
        with pytest.raises(UserError, match="with /; take such out, or .* attribute --images"):
            pair_images(tmp_path / "images", tmp_path / "c.jsonl")
    draw(tmp_path / "images/b.png")
    (tmp_path / "c.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    with pytest.raises(UserError, match="first b.png; take such out"):
        pair_images(tmp_path / "images", tmp_path / "c.jsonl")
