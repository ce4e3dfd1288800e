"""`scalp train`: data-parallel training with Ray Train."""
