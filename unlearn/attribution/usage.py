"""Which training images some pictures use, by removal."""

import numpy as np


def find_unused(scores: np.ndarray) -> np.ndarray:
    """Which images [n] bool none of several pictures uses: those whose score is below the average
    of all images and pictures in each of them. scores: by removal, in the unit of each picture
    (`removal_scores.score_draws`), [pictures, n].

    The average is what every image would have if all were used alike. What was measured of such
    images stands in results/README.md.
    """
    return scores.max(axis=0) < scores.mean()
