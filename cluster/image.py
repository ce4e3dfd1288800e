"""The container image that every node runs, built by `cluster/Containerfile`."""

from importlib import metadata

IMAGE = f"scalp:{metadata.version('scalp')}"
UID = 1000  # of the user in it, who is not root
