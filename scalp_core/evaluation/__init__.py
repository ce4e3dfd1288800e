"""Metrics of predictions, their confidence intervals, subgroups, figures."""
