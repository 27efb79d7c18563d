"""Workloads, procedures and meters of speed and fidelity."""
