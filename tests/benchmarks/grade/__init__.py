"""Benchmarks of bulk grading, preparation and growing clusters."""
