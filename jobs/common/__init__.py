"""What several jobs share: console, executors, image loading, inference, metrics, preflight."""
