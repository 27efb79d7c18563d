"""How well any additive score could do: the share of what retrained models' losses do that sums of
images' effects can explain. NumPy only.

Let a query's loss under a model of a random half be a sum of one effect an image kept, and a rest:
interactions of images, and what seed and order of training do. The rests of two models have nothing
to do with each other, but their sums have as much in common as their halves overlap. So the product
of two centred losses rises with the overlap, from 0 where it is a chance one to the variance of the
sums where the halves are the same: the slope over the whole variance is the additive share. No
linear datamodeling score can exceed its root, but for chance.
"""

import numpy as np

from .datamodels import mean_interval

FEWEST_MODELS = 8  # fewer give no slope to speak of


def overlaps(kept: np.ndarray) -> np.ndarray:
    """Correlations [models, models] float64 of which images models have seen, kept [models, N]
    bool: 1 for the same ones, 0 on average for random ones."""
    centred = kept - kept.mean(axis=1, keepdims=True, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=1)
    return centred @ centred.T / np.outer(norms, norms)


def additive_shares(
    losses: np.ndarray, overlap: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Additive share of the variance of each query's losses, [queries] float64: the slope, by least
    squares over pairs of models, of the product of two standardised losses on their overlap.

    losses: [queries, models]; overlap: of `overlaps`; weights: [models] of 0 and 1, the models that
    count. A share is unbiased, and so by chance may lie below 0 or above 1; NaN for a query whose
    losses are all the same.
    """
    counted = np.ones(len(overlap), bool) if weights is None else weights > 0
    losses, overlap = losses[:, counted], overlap[np.ix_(counted, counted)]
    centred = losses - losses.mean(axis=1, keepdims=True)
    variance = centred.var(axis=1, ddof=1)
    # Losses lose their mean over the models, and so must what their covariance is made of.
    overlap = overlap - overlap.mean(axis=0) - overlap.mean(axis=1, keepdims=True) + overlap.mean()
    first, second = np.triu_indices(len(overlap), 1)
    steps = overlap[first, second] - overlap[first, second].mean()
    slopes = (centred[:, first] * centred[:, second]) @ steps / (steps @ steps)
    return slopes / np.where(variance > 0, variance, np.nan)


def highest_score(losses: np.ndarray, kept: np.ndarray) -> tuple[float, float, float]:
    """About the highest mean linear datamodeling score that an additive score can have, and its 95
    % interval: the root of the mean additive share, (value, low, high), each from 0 to 1; NaN where
    there are fewer than FEWEST_MODELS models.

    losses: [queries, models]; kept: [models, N] bool, of models of random subsets of one size. The
    interval holds both the queries and the models to be samples: see `datamodels.mean_interval`.
    """
    losses = losses[losses.var(axis=1) > 0]
    if len(kept) < FEWEST_MODELS or not len(losses):
        return np.nan, np.nan, np.nan
    overlap, weights = overlaps(kept), 1 - np.eye(len(kept))
    left_out = np.stack([additive_shares(losses, overlap, row) for row in weights])
    bounds = mean_interval(additive_shares(losses, overlap), left_out, np.inf)
    value, low, high = (float(np.sqrt(np.clip(bound, 0, 1))) for bound in bounds)
    return value, low, high
