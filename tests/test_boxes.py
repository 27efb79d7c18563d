"""Boxes: which cells of a latent they hold, and that only these count."""

import numpy as np
import pytest
import torch
from conftest import PARITY
from PIL import Image

import unlearn
from unlearn import UserError
from unlearn.attribution.curvature import DiagonalFisher
from unlearn.attribution.derivatives import text_gradients
from unlearn.attribution.losses import sample_losses
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.datasets.boxes import check_box, find_cells
from unlearn.models.pipelines import select_parameters
from unlearn.report.figures import GAP, TILE, draw_influence
from unlearn.storage.reading import read_json

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


def test_the_loss_of_a_box_is_the_mean_over_its_pixels_and_so_is_its_gradient(model, training_set):
    latent, text = training_set.image_tensors(0, 3, model.device)
    normals = torch.randn(2, *latent.shape, generator=torch.Generator().manual_seed(0))
    samples = latent.expand_as(normals), normals, torch.tensor([100, 700]), text
    left = torch.zeros(latent.shape[-2:], dtype=torch.bool)
    left[:3, :2] = True
    share = float(left.double().mean())
    inside, outside, whole = (sample_losses(model, *samples, cells=c) for c in (left, ~left, None))
    torch.testing.assert_close(share * inside + (1 - share) * outside, whole)
    inside, outside, whole = (
        dict(text_gradients(model, *samples, cells=c)) for c in (left, ~left, None)
    )
    for name, expected in whole.items():
        both = share * inside[name] + (1 - share) * outside[name]
        torch.testing.assert_close(
            both, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
        )
        assert (inside[name] - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("selection", ["cross-attn-kv", "cross-attn"])
def test_only_a_box_of_the_query_is_unlearned(selection, model, training_set, tmp_path):
    picture = PARITY / "fixture/abc/synth/tiny/gpt/blob/samples/00000.png"
    query, size = unlearn.encode_query(model, picture, "a blob"), Image.open(picture).size
    parameters = select_parameters(model.denoiser, selection)
    fisher = DiagonalFisher({name: torch.ones_like(value) for name, value in parameters.items()})
    whole, all_of_it, part = (
        unlearn.unlearn(
            model, query, fisher, draws=4, box=box, path=tmp_path / f"{name}.safetensors"
        )
        for name, box in (("whole", None), ("all", (0, 0, *size)), ("part", (0, 0, 200, 300)))
    )
    for name, change in whole.tensors.items():
        torch.testing.assert_close(all_of_it.tensors[name], change, rtol=1e-3, atol=1e-6)
    distance = sum((part.tensors[n] - c).norm() ** 2 for n, c in whole.tensors.items()) ** 0.5
    assert distance > 0.05 * sum(c.norm() ** 2 for c in whole.tensors.values()) ** 0.5
    records = [read_json(tmp_path / f"{name}.json")["identity"] for name in ("whole", "part")]
    assert "box" not in records[0] and records[1]["box"] == [0, 0, 200, 300]
    with pytest.raises(UserError, match="--box 0 0 5000 9: reaches out of"):
        unlearn.unlearn(model, query, fisher, draws=4, box=(0, 0, 5000, 9))


def test_the_picture_of_a_result_outlines_the_box_that_counts():
    white = Image.new("RGB", (32, 32), "white")
    plain = np.asarray(draw_influence(white, "", [(white, "", False)]).convert("L"), int)
    boxed = draw_influence(white, "", [(white, "", False)], box=(8, 4, 24, 12))
    is_dark = np.asarray(boxed.convert("L"), int)[GAP : GAP + TILE, GAP : GAP + TILE] < 100
    rows, columns = np.flatnonzero(is_dark.any(axis=1)), np.flatnonzero(is_dark.any(axis=0))
    scale = TILE / 32
    assert [columns[0], columns[-1], rows[0], rows[-1]] == [
        8 * scale,
        24 * scale,
        4 * scale,
        12 * scale,
    ]
    assert not is_dark[rows[0] + 3 : rows[-1] - 3, columns[0] + 3 : columns[-1] - 3].any()
    assert not (plain[GAP : GAP + TILE, GAP : GAP + TILE] < 100).any()
