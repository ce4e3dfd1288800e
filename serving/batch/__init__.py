"""Batch requests: the window of images in progress, unpacking."""
