"""Which training images do the same: what one teaches a model, another teaches too."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from .removal_scores import RIDGE, at_timestep, ridge_inverse

MOST_IMAGES = 2000  # whose likeness takes (2 x 2,000)^2 numbers, 128 MB, and seconds
# Likeness from which images do the same. Chosen on the tuning folders of data/emoji_lora, by what
# leaving out both does beyond leaving out each (results/README.md).
SAME = 0.9


def compare_images(
    blocks: Callable[[], Iterator[np.ndarray]],
    ridge: float = RIDGE,
    repeats: np.ndarray | None = None,
) -> np.ndarray:
    """Likeness [N, N] float64 of every two training images, from -1 to 1, the mean over timesteps.

    H = Phi (Phi^T Phi + lambda I)^-1 Phi^T says how much what is learned from one image fixes the
    prediction of another; an image's own part is its leverage. Likeness is the correlation that H
    is: tr H_ij / sqrt(tr H_ii tr H_jj). Where it is 1, whatever one image teaches the other teaches
    too: the model that lost one of them would miss little. blocks, ridge, repeats: of
    `removal_scores.score_draws`.
    """
    num_timesteps = next(blocks()).shape[1]
    likeness = [
        compare_timestep(partial(at_timestep, blocks, timestep, repeats), ridge)
        for timestep in range(num_timesteps)
    ]
    return np.mean(likeness, axis=0)


def compare_timestep(blocks: Callable[[], Iterator[np.ndarray]], ridge: float) -> np.ndarray:
    """Likeness [N, N] at one timestep: blocks() yields [images, rows, size] float64."""
    features = np.concatenate(list(blocks()))
    count, num_rows, size = features.shape
    inverse, _ = ridge_inverse(blocks, size, ridge)
    rows = features.reshape(-1, size)
    products = (inverse(rows) @ rows.T).reshape(count, num_rows, count, num_rows)
    shared = products.trace(axis1=1, axis2=3)
    leverage = np.sqrt(np.maximum(shared.diagonal(), np.finfo(np.float64).tiny))
    return shared / leverage[:, None] / leverage


def group_alike(likeness: np.ndarray, bound: float = SAME) -> list[list[int]]:
    """Groups of images that do the same, largest first: rows of those that are linked by likeness
    of at least `bound`. Images alone are in none."""
    groups, left = [], set(range(len(likeness)))
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            near = np.flatnonzero((likeness[sorted(new)] >= bound).any(axis=0))
            new = set(near.tolist()) - group
        left -= group
        if len(group) > 1:
            groups.append(sorted(group))
    return sorted(groups, key=lambda group: (-len(group), group))
