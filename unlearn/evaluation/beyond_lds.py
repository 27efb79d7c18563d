"""Linear datamodeling scores beyond something simpler, of every method, and how high any score
could be."""

from collections.abc import Mapping

import numpy as np

from .beyond import scores_beyond, top_image_kept
from .ceiling import highest_score
from .datamodels import mean_interval, predict, raise_scores
from .lds import Measured

SIMILARITY = "similarity"  # the method that others are measured beyond
BOUNDS = ("", "_low", "_high")
COLUMNS = (
    "method",
    "power",
    *(f"beyond_top_image{bound}" for bound in BOUNDS),
    *(f"beyond_similarity{bound}" for bound in BOUNDS),
    "queries",
    "models",
)


def interval_beyond(
    predictions: np.ndarray, losses: np.ndarray, known: np.ndarray
) -> tuple[float, float, float]:
    """Mean over queries of `beyond.scores_beyond` and its 95 % interval over queries and models.
    All [queries, models]."""
    models = np.arange(losses.shape[1])
    left_out = [
        scores_beyond(*(array[:, models != model] for array in (predictions, losses, known)))
        for model in models
    ]
    return mean_interval(scores_beyond(predictions, losses, known), np.array(left_out))


def beyond_rows(measured: Measured | None, powers: Mapping[str, float]) -> list[tuple]:
    """Each method's LDS beyond its own top image, and beyond what similarity predicts: rows of
    COLUMNS. powers: of each method's scores, 1 where it says none; the last three numbers are empty
    where similarity was not scored."""
    if measured is None:
        return []
    values, kept, losses = measured.values, measured.kept, measured.losses
    powered = {
        method: raise_scores(scores, powers.get(method, 1)) for method, scores in values.items()
    }
    predictions = {method: predict(scores, kept) for method, scores in powered.items()}
    return [
        (
            method,
            powers.get(method, 1),
            *interval_beyond(prediction, losses, top_image_kept(values[method], kept)),
            *(
                interval_beyond(prediction, losses, predictions[SIMILARITY])
                if SIMILARITY in predictions
                else [""] * len(BOUNDS)
            ),
            *losses.shape,
        )
        for method, prediction in predictions.items()
    ]


def ceiling_line(measured: Measured | None) -> str | None:
    """About how high the LDS of any additive score can be, in words, or None."""
    if measured is None:
        return None
    value, low, high = highest_score(measured.losses, measured.kept)
    if value != value:
        return None
    return (
        f"The ceiling: no sum of one number an image has an LDS above about {value:.2f} (95 % "
        f"interval {low:.2f} to {high:.2f}); the rest is interaction of images, seed and order."
    )
