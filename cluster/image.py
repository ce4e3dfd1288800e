"""The container image that every node runs, built by `cluster/build-image.sh`."""

# Placeholder in the manifests for the name that the script prints, which contains the commit.
IMAGE = "scalp:REVISION"
UID = 1000  # user of the container, not root
