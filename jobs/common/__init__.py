"""Shared by several commands: console, executors, image loading, inference, metrics, preflight checks."""
