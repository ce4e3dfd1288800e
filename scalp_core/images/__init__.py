"""Decode, preprocess, augment and measure images."""
