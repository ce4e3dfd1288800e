"""Run the `scalp` command against a cluster of `tests.support.nodes`."""

from __future__ import annotations

import os
import subprocess

from tests.support.nodes import BIN

TOKEN = "b" * 40
SOON = 20.0  # seconds until a mistake is reported


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "COLUMNS": "200"} | changes


def start(*words: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "scalp"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**changes),
    )


def scalp(*words: str, seconds: float = 200, **changes: str) -> tuple[int, str]:
    process = start(*words, **changes)
    try:
        printed, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, printed


def refused(*words: str, **changes: str) -> str:
    """Error and hint of a mistake in one line, reported soon."""
    code, printed = scalp(*words, seconds=SOON, **changes)
    assert code == 2, printed
    problem, *fix = printed.strip().split("\nhint:  ")
    assert problem.startswith("error: ") and "\n" not in printed.strip().removeprefix(problem + "\n")
    return "; ".join([problem, *fix])
