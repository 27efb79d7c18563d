"""Pipelines: loaded and checked, weights selected, changed and restored, customized models,
generation."""
