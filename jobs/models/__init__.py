"""`scalp models` and `scalp quantize`."""
