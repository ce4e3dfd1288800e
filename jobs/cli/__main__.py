"""`python -m jobs.cli`: the `scalp` command."""

from jobs.cli.main import run

run()
