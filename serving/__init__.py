"""The Ray Serve application that answers one photograph online."""
