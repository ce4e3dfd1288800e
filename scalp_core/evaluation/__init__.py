"""Evaluation of predictions: metrics, bootstrap intervals, non-inferiority, subgroups, plots."""
