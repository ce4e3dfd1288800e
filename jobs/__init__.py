"""The verbs of the `scalp` command, one file each. Ray Data and Ray Train live here."""
