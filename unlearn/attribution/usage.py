"""Which training images some pictures use, by removal."""

from collections.abc import Sequence

import numpy as np


def find_unused(
    scores: np.ndarray,
    groups: Sequence[Sequence[int]] = (),
    group_scores: np.ndarray | None = None,
) -> np.ndarray:
    """Which images [n] bool none of several pictures uses: those whose score is below the average
    of all images and pictures in each of them. scores: by removal, in the unit of each picture
    (`removal_scores.score_draws`), [pictures, n].

    The average is what every image would have if all were used alike. What was measured of such
    images stands in results/README.md. groups: rows of images that do the same, which have low scores
    because the others would still be there: they count by `group_scores`, [pictures, groups], of
    all of them together, and are never unused where these are not given, or NaN.
    """
    unused = scores.max(axis=0) < scores.mean()
    for number, rows in enumerate(groups):
        highest = np.inf if group_scores is None else group_scores[:, number].max()
        unused[list(rows)] = highest < scores.mean()
    return unused
