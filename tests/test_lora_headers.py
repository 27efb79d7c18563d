"""What kohya's trainer writes into a LoRA's header fills in what it knows, and is compared with the
images at hand."""

import json

import pytest

from unlearn.models.lora_headers import Header, compare_header, parse_header

FOLDERS = {
    "4_sks dog": {"n_repeats": 4, "img_count": 3},
    "1_sks cat": {"n_repeats": 1, "img_count": 5},
}
FIELDS = {
    "ss_resolution": "(512, 512)",
    "ss_num_train_images": "17",
    "ss_dataset_dirs": json.dumps(FOLDERS),
    "ss_tag_frequency": json.dumps({"4_sks dog": {"sks": 3, "dog": 3}, "1_sks cat": {"sks": 5}}),
    "ss_datasets": json.dumps([{"subsets": [{"flip_aug": False}, {"flip_aug": True}]}]),
    "ss_enable_bucket": "False",
    "ss_clip_skip": "None",
}
ONE = {"ss_dataset_dirs": json.dumps({"1_x": {"n_repeats": 1, "img_count": 3}})}


def test_a_header_as_kohya_writes_it_is_read():
    assert parse_header(FIELDS) == Header(
        (512, 512),
        {"4_sks dog": (3, 4), "1_sks cat": (5, 1)},
        {"sks": 8, "dog": 3},
        True,
        False,
        None,
    )
    header = parse_header(FIELDS)
    assert (header.num_images, header.side, header.trigger) == (8, 512, None)
    older = parse_header({"ss_flip_aug": "False", "ss_resolution": "512,768", "ss_clip_skip": "2"})
    assert (older.flips, older.resolution, older.side, older.clip_skip) == (
        False,
        (512, 768),
        None,
        2,
    )
    assert parse_header({"ss_resolution": "640"}).side == 640


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ss_resolution": "large", "ss_clip_skip": "two", "ss_enable_bucket": "perhaps"},
        {"ss_dataset_dirs": "[1]", "ss_tag_frequency": '{"a": 3}', "ss_datasets": "{}"},
        {"ss_dataset_dirs": '{"a": {"n_repeats": true, "img_count": 1}}', "ss_datasets": "[3]"},
        {"ss_dataset_dirs": '{"a": {"n_repeats": 1, "img_count": -1}}', "ss_datasets": "]"},
        {"ss_dataset_dirs": "{" * 100_000, "ss_tag_frequency": '{"a": {"b": "much", " ": 1}}'},
        {"ss_datasets": '[{"subsets": [{"flip_aug": "maybe"}, 3]}, {"subsets": 3}]'},
    ],
)
def test_what_is_not_as_kohya_writes_it_is_passed_over(fields):
    assert parse_header(fields) == Header()
    assert compare_header(parse_header(fields), [["a"]], 512, [1]) == []


def test_a_header_that_tells_of_the_very_images_says_nothing():
    captions = [["sks, dog"]] * 3 + [["sks"]] * 5
    assert compare_header(parse_header(FIELDS), captions, 512, [4] * 3 + [1] * 5) == []


@pytest.mark.parametrize(
    "change, here, words",
    [
        ({}, {"captions": [["sks"]] * 7}, "trained on 8 images by its header, here are 7"),
        ({}, {"resolution": 256}, "trained at 512 x 512 pixels by its header, here are 256 x 256"),
        ({"ss_enable_bucket": "True"}, {}, "pictures of several shapes"),
        ({"ss_clip_skip": "2"}, {}, "clip skip 2"),
        ({"ss_datasets": "[]", "ss_flip_aug": "False"}, {}, "saw no mirrored images"),
        ({}, {"repeats": [1] * 8}, "5 images 1 times, 3 images 4 times by the LoRA's header"),
        ({}, {"captions": [["a dog"]] * 8}, 'captions .* none of those here: "sks"'),
    ],
)
def test_what_the_header_says_otherwise_than_the_images_is_one_sentence(change, here, words):
    given = {"captions": [["sks"]] * 8, "resolution": 512, "repeats": [4] * 3 + [1] * 5}
    [note] = compare_header(parse_header({**FIELDS, **change}), **{**given, **here})
    assert __import__("re").search(words, note)


def test_repeats_that_are_alike_do_not_matter():
    alike = {"10_x": {"n_repeats": 10, "img_count": 3}}
    header = parse_header({"ss_dataset_dirs": json.dumps(alike)})
    assert compare_header(header, [["x"]] * 3, None, [1] * 3) == []


def test_a_caption_that_all_images_had_is_the_trigger():
    for tags, trigger in ({"x": 3}, "x"), ({"x": 3, "y": 1}, None), ({"x": 2}, None), ({}, None):
        fields = {**ONE, "ss_tag_frequency": json.dumps({"1_x": tags})}
        assert parse_header(fields).trigger == trigger
