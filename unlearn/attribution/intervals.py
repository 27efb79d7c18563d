"""How sure scores are: standard errors and intervals from independent draws. NumPy only."""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.9  # of the intervals
# 0.95 quantiles of Student's t by degrees of freedom, from 1. Source: any table of it.
QUANTILES = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812)
NORMAL = 1.645


@dataclass(frozen=True)
class Intervals:
    """Of the scores of n images, float64 [n] each: the standard error, an interval that holds the
    score of many draws in LEVEL of all cases, and the ranks that go with it, from 1."""

    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: np.ndarray  # int64: the highest rank that the interval allows
    last: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The fields by the names that files have them under."""
        return {
            "error": self.error,
            "low": self.low,
            "high": self.high,
            "rank_first": self.first,
            "rank_last": self.last,
        }


def t_quantile(freedom: int) -> float:
    """The 0.95 quantile of Student's t."""
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z, n = NORMAL, freedom  # Fisher's expansion, right to 0.001 here
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def find_intervals(draws: np.ndarray) -> Intervals | None:
    """The Intervals of scores that are sums over draws, [draws, n] float64, none below 0; None
    where there is one draw, which tells nothing.

    Draws are independent and have one expectation, so that the error of their sum follows from
    their spread: the jackknife over draws. Scores are far from normal, their logarithms less so:
    the interval is symmetric there (delta method), and never below 0.
    """
    num_draws = len(draws)
    if num_draws < 2:
        return None
    scores = draws.sum(axis=0)
    error = np.sqrt(num_draws * draws.var(axis=0, ddof=1))
    relative = np.divide(error, scores, out=np.zeros_like(scores), where=scores > 0)
    factor = np.exp(t_quantile(num_draws - 1) * relative)
    low, high = scores / factor, scores * factor
    return Intervals(error, low, high, *find_ranks(low, high))


def find_ranks(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranks, from 1, that intervals allow, (highest, lowest) int64 [n]: how many other
    intervals lie wholly above one, and how many do not lie wholly below it."""
    above = len(low) - np.searchsorted(np.sort(low), high, side="right")
    below = np.searchsorted(np.sort(high), low, side="left")
    return 1 + above, len(low) - below
