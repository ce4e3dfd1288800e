"""The domain of scalp: grades, data, models, metrics, inference; without Ray and web frameworks."""
