"""Retrieval metrics, the linear datamodeling score, leave-K-out, their tables and plots."""
