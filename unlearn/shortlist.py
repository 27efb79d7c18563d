"""Which images an index's estimates leave to be scored exactly, and how many of the best they miss. NumPy only."""

import numpy as np


def choose_images(estimates, num_shortlisted, num_audited, seed):
    """Rows to be scored again: the `num_shortlisted` highest of estimates [N], and `num_audited` of the others, at random.
    Returns both as sorted int64 arrays."""
    order = np.argsort(-estimates, kind="stable")
    shortlist, others = order[:num_shortlisted], order[num_shortlisted:]
    audit = np.random.default_rng(seed).choice(others, min(num_audited, len(others)), replace=False)
    return np.sort(shortlist), np.sort(audit)


def estimate_recall(estimates, exact, shortlist, audit, k):
    """What share of the exact top k of all images the shortlist holds, estimated from the audit: (recall, missed).

    estimates [N]; exact [N], of which only the rows of shortlist and audit are read. A line through the audited images predicts
    exact scores from estimates, and every image that was not scored again is taken to err from it as the audited ones do: the
    share of their errors that would lift it above the shortlist's k-th is its chance. `missed` is the sum of these chances.
    NaN where fewer than three images were audited.
    """
    others = np.setdiff1d(np.arange(len(estimates)), shortlist)
    if not len(others):
        return 1.0, 0.0
    if len(audit) < 3:
        return np.nan, np.nan
    threshold = np.sort(exact[shortlist])[-min(k, len(shortlist))]
    slope, start = np.polyfit(estimates[audit], exact[audit], 1) if np.ptp(estimates[audit]) else (0.0, exact[audit].mean())
    predicted = start + slope * estimates
    errors, unknown = np.sort(exact[audit] - predicted[audit]), np.setdiff1d(others, audit)  # an audited image's own error is known
    above = 1 - np.searchsorted(errors, threshold - predicted[unknown], side="right") / len(errors)
    missed = float(above.sum() + (exact[audit] > threshold).sum())
    return k / (k + missed), missed
