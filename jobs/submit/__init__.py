"""`scalp submit`: a command as a Ray job on a cluster."""
