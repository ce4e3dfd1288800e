"""`scalp tune`: hyperparameter search with Optuna."""
