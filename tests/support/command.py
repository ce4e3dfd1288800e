"""Run the `scalp` command in this process."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from jobs.cli.main import main
from jobs.common.console import console


def run_scalp(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `scalp WORDS` as its console script does, on the Ray of this process if it is connected to one."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["scalp", *map(str, words)]),
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
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
