"""`scalp submit`: run a command as a Ray job on a cluster."""
