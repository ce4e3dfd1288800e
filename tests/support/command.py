"""Run the `scalp` command in this process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple
from unittest import mock

from jobs.cli.main import main
from jobs.common.console import console


class Finished(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run_scalp(*words: str) -> Finished:
    """Run `scalp WORDS` as its console script does; for commands that start no Ray."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["scalp", *words]),
        mock.patch.dict("os.environ", COLUMNS="400"),
        mock.patch.object(console, "_width", 400),  # rich reads COLUMNS once, when it is made
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())
