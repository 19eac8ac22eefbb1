"""Evaluation: predictions, metrics with intervals, decisions, plots."""
