"""Boxes: which cells of a latent they hold, and that only these count."""

import numpy as np
import pytest
from PIL import Image

from unlearn import UserError
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.datasets.boxes import check_box, find_cells

SETTINGS = RemovalSettings(timesteps=(600,), probes=1, sketch_size=64)


@pytest.fixture
def picture(tmp_path):
    """A picture of 120 x 80 pixels, of which the square in the middle begins at 20."""
    path = tmp_path / "picture.png"
    Image.new("RGB", (120, 80)).save(path)
    return path


def test_cells_are_those_whose_middle_lies_in_the_box(picture):
    found = find_cells((20, 0, 60, 40), picture, 64, (8, 8))
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = True
    np.testing.assert_array_equal(found, expected)
    assert find_cells((0, 0, 120, 80), picture, 64, (8, 8)).all()
    assert find_cells((24, 4, 27, 7), picture, 64, (8, 8)).sum() == 1  # the middle of the first


@pytest.mark.parametrize(
    "box, said",
    [
        ((0, 0, 121, 80), "--box 0 0 121 80: reaches out of"),
        ((27, 7, 33, 13), "holds no cell of the latent"),
        ((0, 0, 20, 80), "what the square in its middle leaves out"),
    ],
)
def test_a_box_that_does_not_fit_is_refused(box, said, picture):
    with pytest.raises(UserError, match=said) as error:
        find_cells(box, picture, 64, (8, 8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("box", [(4, 0, 4, 9), (9, 0, 4, 9), (0, 5, 9, 2), (-1, 0, 4, 9)])
def test_a_box_without_an_inside_is_refused(box):
    with pytest.raises(UserError, match="expected x0 y0 x1 y1 with 0 <= x0 < x1"):
        check_box(box)


def test_features_of_a_box_and_of_the_rest_add_up_to_those_of_the_whole(model, training_set):
    maker = FeatureMaker(model, training_set.latents.shape[2:], SETTINGS)
    left = np.zeros(training_set.latents.shape[-2:], bool)
    left[:, : left.shape[1] // 2] = True
    whole, inside, outside, everything = (
        maker.make(training_set, [3], cells) for cells in (None, left, ~left, np.ones_like(left))
    )
    np.testing.assert_array_equal(everything, whole)
    np.testing.assert_allclose(inside + outside, whole, rtol=1e-3, atol=1e-5 * np.abs(whole).max())
    assert np.abs(inside - whole).max() > 0.01 * np.abs(whole).max()
