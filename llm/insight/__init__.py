"""Baselines for a text and hints on a run."""
