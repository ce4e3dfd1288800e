"""`scalp` without a command: its version, its panels and the completion of shells."""

from __future__ import annotations

import re
from importlib import metadata

from typer.testing import CliRunner

from jobs.cli.main import app


def output(*arguments: str, **environment: str) -> str:
    done = CliRunner().invoke(app, arguments, env=environment, prog_name="scalp")
    assert done.exit_code == 0, done.output
    return done.output


def test_version_is_that_of_the_package():
    assert output("--version") == f"scalp {metadata.version('scalp')}\n"


def test_help_lists_the_commands_in_the_order_of_work():
    panels = re.findall(r"─ ([A-Z][\w ]+) ─", output("--help"))
    assert panels == ["Options", "Try", "Data", "Models", "Bulk grading", "Endpoint", "Clusters and speed"]


def test_a_shell_completes_commands():
    offered = output(_SCALP_COMPLETE="complete_bash", COMP_WORDS="scalp pre", COMP_CWORD="1")
    assert offered.split() == ["prepare"]
