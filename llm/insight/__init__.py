"""Surveys of a text, baselines, plans, expectations, hints and reports."""
