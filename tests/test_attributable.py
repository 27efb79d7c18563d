"""What is said to stand out by removal passes what never-seen images reach, and is explained by the
model."""

import numpy as np

from unlearn.report.attributable import BOUND, WORSE, describe_attributable, read_attributable
from unlearn.report.standing_out import FEWEST, describe_standing_out

SCORES = np.concatenate([[0.5, 4.0, 9.0, 3.0], np.full(FEWEST, 0.01)])
UNIT = 2.0 / BOUND  # the bound is 2
LOSSES = np.full(len(SCORES), 0.1)


def judge(scores=SCORES, losses=LOSSES, own=0.1):
    known = describe_attributable(scores, UNIT, losses, own)
    return read_attributable(scores, known["bound"], known["num_attributable"])


def test_the_first_images_that_pass_the_bound_stand_out():
    found = judge()
    assert (found.count, found.bound) == (3, 2.0)
    headline, explanation = describe_standing_out(found, len(SCORES))
    assert headline == f"3 of {len(SCORES)} images stand out clearly."
    assert explanation.startswith("Images that a model never saw rarely pass the dashed line")


def test_an_image_that_the_model_explains_worse_than_the_picture_does_not_and_none_below_it():
    losses = LOSSES.copy()
    losses[1] = 1.01 * WORSE * 0.1  # the second by its score
    assert judge(losses=losses).count == 1
    losses[2] = losses[1]
    found = judge(losses=losses)
    assert found.count == 0
    headline, explanation = describe_standing_out(found, len(SCORES))
    assert headline.startswith("None of") and "as one that it never saw" in explanation


def test_of_few_images_nothing_is_said():
    few = SCORES[: FEWEST - 1]
    found = judge(few, LOSSES[: len(few)])
    assert (found.count, found.bound) == (0, None)
    assert "cannot be told" in describe_standing_out(found, len(few))[0]


def test_a_result_that_says_nothing_of_it_is_judged_by_its_shape():
    assert read_attributable(SCORES, None, None) is None
