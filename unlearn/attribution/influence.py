"""From losses to a ranking. NumPy only."""

import numpy as np

LEAST_CHANGE, MOST_CHANGE = (
    0.005,
    0.15,
)  # of the weights, relative: below, scores drown in rounding; above, the model is another one
ROUNDING = 1e-5  # of a loss, relative: ten times what float32 and the order of its sums make of it


def loss_changes(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Influence of each view: L(z, unlearned) - L(z, theta0), float64 [2n]. Source: [AbU] Eq. 6."""
    return np.asarray(after, np.float64) - np.asarray(before, np.float64)


def best_view(scores: np.ndarray) -> np.ndarray:
    """Scores of n images, [n], from those of their views [2n] (as is, then mirrored): the larger
    one. Source: [AbU] section 4, flips."""
    return scores.reshape(2, -1).max(axis=0)


def rank_images(influence: np.ndarray) -> np.ndarray:
    """Indices by falling influence; equal ones in their order."""
    return np.argsort(-influence, kind="stable")


def is_indifferent(scores: np.ndarray) -> bool:
    """Whether all images have the same score: such scores say nothing."""
    return bool(np.ptp(scores) == 0)


def is_undecided(scores: np.ndarray, k: int) -> bool:
    """Whether the k-th and the next image have the same score, so that their order in the data root
    decides which are the first k."""
    return k < len(scores) and bool(np.equal(*-np.partition(-scores, (k - 1, k))[k - 1 : k + 1]))


def find_warnings(moved: float, before: float, after: float) -> list[str]:
    """Why a ranking may mean nothing, a short sentence each. moved: relative change of the weights;
    before, after: the query's own loss. NaN, where one is not known, warns of nothing."""
    warnings = []
    if moved < LEAST_CHANGE:
        warnings.append(
            f"the weights moved by {100 * moved:.3g} %, less than {100 * LEAST_CHANGE:g} %: "
            f"scores may be noise"
        )
    if moved > MOST_CHANGE:
        warnings.append(
            f"the weights moved by {100 * moved:.3g} %, more than {100 * MOST_CHANGE:g} %: the "
            f"model is another one, and scores mean little"
        )
    if after - before <= ROUNDING * abs(before):
        warnings.append(
            f"the query's own loss did not rise ({before:.5g} to {after:.5g}): it was not unlearned"
        )
    return warnings
