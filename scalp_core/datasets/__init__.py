"""Sources of images and labels, and the manifest of prepared data."""
