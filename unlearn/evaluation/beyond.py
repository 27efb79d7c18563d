"""What scores say beyond something simpler: rank correlations of what is left when that is taken
out. NumPy only.

Where one image settles most of a query, whoever finds it has a high linear datamodeling score. So
two more are told: beyond a method's own top image, and beyond plain similarity. From losses and
predictions alike the part is taken out that a straight line through the simpler thing explains.
"""

import numpy as np

from .datamodels import ROUNDING, merge_equal, predict, spearman


def take_out(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What of values [queries, models] a straight line through known [queries, models] leaves, by
    least squares over the models, float64. A known that is constant explains nothing."""
    values, known = (
        array - array.mean(axis=1, keepdims=True, dtype=np.float64) for array in (values, known)
    )
    squares = (known**2).sum(axis=1, keepdims=True)
    slopes = (values * known).sum(axis=1, keepdims=True) / np.where(squares > 0, squares, np.inf)
    left = values - slopes * known
    # What is rounding alone says nothing: ranks would take its order for knowledge.
    return merge_equal(left, ROUNDING * np.abs(values).sum(axis=1, keepdims=True))


def scores_beyond(predictions: np.ndarray, losses: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Rank correlation, over models, of what predictions and minus the losses have left beyond what
    is known, [queries]; 0 where nothing is left of a prediction. All [queries, models]."""
    return spearman(take_out(predictions, known), -take_out(losses, known))


def top_image_kept(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Whether each model has seen the image that a method ranks first for each query, [queries,
    models] float64, from scores [queries, N] and kept [models, N] bool. The first of equal ones."""
    return kept[:, np.asarray(scores).argmax(axis=1)].T.astype(np.float64)


def beyond_top_image(scores: np.ndarray, kept: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Linear datamodeling score of each query, [queries], beyond the method's own top image."""
    return scores_beyond(predict(scores, kept), losses, top_image_kept(scores, kept))


def beyond_scores(
    scores: np.ndarray, others: np.ndarray, kept: np.ndarray, losses: np.ndarray
) -> np.ndarray:
    """Linear datamodeling score of each query, [queries], beyond what other scores [queries, N]
    predict."""
    return scores_beyond(predict(scores, kept), losses, predict(others, kept))
