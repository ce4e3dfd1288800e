"""Bundles: a trained classifier as a directory, its model card, the model registry."""
