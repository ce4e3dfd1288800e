"""`scalp tune`: hyperparameter search with Ray Tune."""
