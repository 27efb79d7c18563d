"""Noise belongs to the image: it depends on seed, data set, image and slot, and on nothing else."""

import itertools

import numpy as np
import pytest
import torch

from unlearn import UserError, noise

SHAPE = (4, 16, 16)
SLOTS = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 2, 500, 0), (1, 1, 900, 7)]


def draw(slots=((0, 0, 0, 0),), seed=0, dataset="abc", image="laion/000000", shape=SHAPE):
    return noise.image_noise(seed, dataset, image, list(slots), shape)


def test_known_answer_is_the_one_that_caches_were_made_with():
    assert noise.known_answer() == noise.KNOWN_ANSWER == "644d08b7a91a864c"


def test_noise_is_float32_with_one_row_a_slot():
    normals = draw(SLOTS)
    assert normals.dtype == np.float32 and normals.shape == (len(SLOTS), *SHAPE)


@pytest.mark.parametrize("order", list(itertools.permutations(range(len(SLOTS))))[1::5])
def test_a_slot_has_the_same_noise_in_any_order_of_slots(order):
    np.testing.assert_array_equal(draw([SLOTS[index] for index in order]), draw(SLOTS)[list(order)])


def test_a_slot_has_the_same_noise_alone_as_among_others():
    together = draw(SLOTS)
    for slot, row in zip(SLOTS, together):
        np.testing.assert_array_equal(draw([slot])[0], row)


def test_an_odd_number_of_values_leaves_nothing_behind_for_the_next_slot():
    """A generator keeps half a word of a float32 draw: `seek` must forget it."""
    for count in 1, 3, 7:
        together = draw([(0, 0, timestep, 0) for timestep in range(4)], shape=(count,))
        alone = [draw([(0, 0, timestep, 0)], shape=(count,))[0] for timestep in range(4)]
        np.testing.assert_array_equal(together, alone)


def test_a_finer_grid_contains_the_noise_of_a_coarser_one():
    grids = {samples: noise.timestep_grid(samples, 1000) for samples in (10, 20, 200)}
    fine = dict(zip(grids[200], draw([(0, 0, timestep, 0) for timestep in grids[200]])))
    for samples in 10, 20:
        for timestep, row in zip(
            grids[samples], draw([(0, 0, timestep, 0) for timestep in grids[samples]])
        ):
            np.testing.assert_array_equal(row, fine[timestep])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"dataset": "emoji"},
        {"image": "laion/000001"},
        {"slots": [(1, 0, 0, 0)]},
        {"slots": [(0, 1, 0, 0)]},
        {"slots": [(0, 0, 1, 0)]},
        {"slots": [(0, 0, 0, 1)]},
    ],
    ids=["seed", "dataset", "image", "view", "caption", "timestep", "draw"],
)
def test_another_seed_dataset_image_view_caption_timestep_or_draw_has_other_noise(other):
    first, second = draw().ravel(), draw(**other).ravel()
    assert not np.isin(first, second).mean() > 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_the_parts_of_a_key_cannot_be_shifted_into_one_another():
    assert not np.array_equal(draw(dataset="a", image="bc"), draw(dataset="ab", image="c"))
    assert not np.array_equal(draw(seed=1, dataset="1"), draw(seed=11, dataset=""))


def test_noise_is_standard_normal():
    normals = np.concatenate(
        [draw(SLOTS, image=f"laion/{row:06d}").ravel() for row in range(50)]
    ).astype(np.float64)
    error = len(normals) ** -0.5  # 200,000 numbers: 0.0022
    assert abs(normals.mean()) < 5 * error
    assert abs(normals.var() - 1) < 5 * error * 2**0.5
    assert abs((normals**3).mean()) < 5 * error * 15**0.5
    assert abs((normals**4).mean() - 3) < 5 * error * 96**0.5


def test_streams_of_an_image_never_overlap_because_their_counters_differ_above_the_block():
    """The generator counts its blocks in word 0: streams are apart where words 1 to 3 are, whatever
    is drawn."""
    slots = list(itertools.product((0, 1), (0, 1, 4), (0, 1, 500, 999), (0, 1, 2**40)))
    generator, counters = noise.image_generator(0, "abc", "laion/000000"), set()
    for slot in slots:
        noise.seek(generator, *slot)
        start = tuple(int(word) for word in generator.state["state"]["counter"])
        assert start[0] == 0
        np.random.Generator(generator).standard_normal(100_000, dtype=np.float32)
        end = tuple(int(word) for word in generator.state["state"]["counter"])
        assert end[0] > 0 and end[1:] == start[1:]
        counters.add(start[1:])
    assert len(counters) == len(slots)


def test_batch_noise_is_that_of_a_torch_generator_seeded_by_the_batch():
    expected = torch.randn((3, *SHAPE), generator=torch.Generator("cpu").manual_seed(5))
    assert torch.equal(noise.batch_noise(5, (3, *SHAPE), "cpu"), expected)


def test_timestep_grid_is_strided_from_zero():
    assert noise.timestep_grid(10, 1000) == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert noise.timestep_grid(1, 1000) == [0]
    assert noise.timestep_grid(1000, 1000) == list(range(1000))


@pytest.mark.parametrize("time_samples", [0, -5, 3, 7, 300, 1001])
def test_timestep_grid_refuses_what_does_not_divide_and_names_the_flag(time_samples):
    with pytest.raises(
        UserError,
        match=rf"--time_samples {time_samples}: must divide the model's 1000 training timesteps",
    ):
        noise.timestep_grid(time_samples, 1000)
