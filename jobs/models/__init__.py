"""`scalp models`, `scalp quantize` and `scalp export`."""
