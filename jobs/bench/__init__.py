"""Benchmarks: `scalp bench` compares scalp with alternatives in one run, as a table and as JSON."""
