"""The method: losses and sweeps, curvature, Newton steps, unlearning, scoring, ranking, the
gradient index."""
