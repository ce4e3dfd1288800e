"""Synthetic scalp images for tests, demos and benchmarks."""
