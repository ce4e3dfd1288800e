"""`python -m tests.benchmarks`: compare scalp with other frameworks, or with itself under load."""
