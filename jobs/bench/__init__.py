"""`scalp bench`: measure the engine and a running endpoint; a table and JSON."""
