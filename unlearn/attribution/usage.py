"""Which training images some pictures use, by removal."""

from collections.abc import Iterable, Sequence

import numpy as np


def find_unused(scores: np.ndarray, groups: Iterable[Sequence[int]] = ()) -> np.ndarray:
    """Which images [n] bool none of several pictures uses: those whose score is below the average
    of all images and pictures in each of them. scores: by removal, in the unit of each picture
    (`removal_scores.score_draws`), [pictures, n].

    The average is what every image would have if all were used alike. What was measured of such
    images stands in results/README.md. groups: rows of images that do the same, of which none is
    said to be unused: each has a low score because the others would still be there.
    """
    unused = scores.max(axis=0) < scores.mean()
    unused[[row for group in groups for row in group]] = False
    return unused
