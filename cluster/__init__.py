"""Where Ray runs: the local start, and the files that describe a cluster."""
