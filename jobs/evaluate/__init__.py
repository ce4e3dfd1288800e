"""`scalp evaluate`, `scalp explain` and `scalp compare`."""
