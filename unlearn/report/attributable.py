"""Whether an image that removal puts first stands out: calibrated on null queries, pictures whose
model never saw any candidate."""

import numpy as np

from ..attribution.influence import rank_images
from .standing_out import FEWEST, StandingOut

# A score, in its unit (`removal_scores.score_draws`), that images which a model never saw rarely
# have, and how much worse than the picture itself the model may explain an image that taught it.
# Chosen on 40 queries of data/emoji_small against images of data/emoji that its model never saw, many
# of them near twins of what it did see. Of the 40 other queries 5, 2.5 and 2.5 % are then said to
# have an attributable image among 40, 80 and 120 such images (results/README.md).
BOUND, WORSE = 0.5, 1.2


def describe_attributable(
    scores: np.ndarray, unit: float, losses: np.ndarray, own: float
) -> dict[str, float | int]:
    """What an influence file holds of it: the score from which an image stands out, `bound`, and how
    many do, `num_attributable`: the first images as long as each passes the bound and the model
    explains it. scores, losses: of the images [N]; own: the query's loss."""
    order, bound = rank_images(scores), BOUND * unit
    passes = (scores > bound) & (losses <= WORSE * own)
    fails = np.flatnonzero(~passes[order])
    return {"bound": bound, "num_attributable": int(fails[0]) if len(fails) else len(scores)}


def read_attributable(
    scores: np.ndarray, bound: float | None, count: int | None
) -> StandingOut | None:
    """What stands out, by what an influence file holds; None where it holds nothing of it."""
    if bound is None or count is None:
        return None
    median = float(np.median(scores)) if len(scores) else 0.0
    if len(scores) < FEWEST or not bound > median:
        return StandingOut(0, None)
    clarity = (float(scores.max()) - median) / (bound - median)
    return StandingOut(min(count, len(scores)), bound, clarity, is_calibrated=True)
