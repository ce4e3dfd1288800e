"""The `scalp` command: the table of commands and their options."""
