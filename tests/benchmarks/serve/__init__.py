"""Benchmarks of the endpoint: rivals, overload, hostile clients, autoscaling."""
