"""The Ray Serve application that answers one image online."""
