"""Repeats of a data root: read in the order of the rows, refused where they do not fit."""

import json

import pytest

from unlearn import UserError
from unlearn.datasets.repeats import read_repeats


@pytest.fixture
def world(root):
    """A data root of sixty images whose dataset.json names a file of repeats."""
    (root / "dataset.json").write_text(json.dumps({"repeats": "repeats.txt"}))
    return root


def write(world, counts):
    (world / "repeats.txt").write_text("".join(f"{count}\n" for count in counts))


def test_a_data_root_that_names_no_repeats_has_none(root):
    assert read_repeats(root, 60) == ()


def test_repeats_stand_in_the_order_of_the_images(world):
    counts = [4, 1, 2] * 20
    write(world, counts)
    assert read_repeats(world, 60) == tuple(counts)
    assert read_repeats(world, 5) == tuple(counts[:5])


def test_repeats_of_one_each_are_none(world):
    write(world, [1] * 60)
    assert read_repeats(world, 60) == ()


@pytest.mark.parametrize(
    "counts, said",
    [
        ([1] * 59, "has 59 lines, expected 60, one for each image of"),
        ([1] * 59 + [0], "line 60: expected a whole number from 1 to 10,000, found '0'"),
        ([1] * 59 + ["four"], "line 60: expected a whole number from 1 to 10,000, found 'four'"),
        (
            ["1"] * 59 + ["9" * 5000],
            "line 60: expected a whole number from 1 to 10,000, found '999",
        ),
    ],
)
def test_repeats_that_do_not_fit_are_refused_by_name(world, counts, said):
    write(world, counts)
    with pytest.raises(UserError) as error:
        read_repeats(world, 60)
    assert said in str(error.value) and "repeats.txt" in str(error.value)


def test_repeats_that_are_not_there_are_refused(world):
    with pytest.raises(UserError, match="repeats.txt: no such file; write it, or take repeats out"):
        read_repeats(world, 60)
