"""From losses to a ranking. NumPy only."""

import numpy as np


def loss_changes(before, after):
    """Influence of each view: L(z, unlearned) - L(z, theta0), float64 [2n]. Source: [AbU] Eq. 6."""
    return np.asarray(after, np.float64) - np.asarray(before, np.float64)


def best_view(scores):
    """Scores of n images, [n], from those of their views [2n] (as is, then mirrored): the larger one.
    Source: [AbU] section 4, flips."""
    return scores.reshape(2, -1).max(axis=0)


def rank_images(influence):
    """Indices by falling influence; equal ones in their order."""
    return np.argsort(-influence, kind="stable")
