"""The container image that every node runs, built by `cluster/build-image.sh`."""

# Stands in the manifests for the name that the script prints, which holds the commit.
IMAGE = "scalp:REVISION"
UID = 1000  # of the user in it, who is not root
