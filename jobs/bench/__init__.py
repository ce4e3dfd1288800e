"""`scalp bench KIND`: measurements side by side in one run, as a table and as JSON."""
