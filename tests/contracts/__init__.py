"""Assumptions about other programs; what several of their tests compare."""

IMAGE = "scalp:REVISION"  # placeholder in the manifests for the name that cluster/build-image.sh prints
UID = 1000  # user of the container, not root
