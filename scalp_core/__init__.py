"""The domain of scalp: grades, data, model, metrics, predictor. No Ray and no web framework here."""
