"""`scalp audit`: checks the audit log of the endpoint; what the log proves is in docs/protection.md."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import JsonOption

audit = typer.Typer(
    help="Verify the audit log of `scalp serve`.",
    epilog="Example: scalp audit verify /var/log/scalp",
    no_args_is_help=True,
)


@audit.callback()
def _group() -> None:
    """Keeps `verify` a subcommand while it is the only one."""


@audit.command("verify", epilog="Example: scalp audit verify /var/log/scalp")
def audit_verify(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="folder of `scalp serve --audit`, or a local copy of it")
    ],
    head: Annotated[
        list[str],
        typer.Option(
            metavar="SHA256", help="a head that an earlier verify printed; its line must be in the log"
        ),
    ] = [],  # noqa: B006
    json_: JsonOption = False,
) -> None:
    """Verify the hash chain of an audit log; exits with code 0 if it is whole, 1 if it is damaged.

    Keep the printed head elsewhere: with --head, a later verify detects a log that was cut or rewritten.
    """
    from jobs.common.console import console, print_json, show
    from jobs.common.errors import printable
    from scalp_core import storage
    from scalp_core.errors import UserError
    from serving.observability.audit_chain import verify

    if storage.is_s3(folder):
        raise UserError(f"{folder} is in S3; copy it to this machine, and give the copy")
    verdict = verify(Path(folder), head)
    show(
        "audit log",
        {
            "files": verdict.files,
            "lines": verdict.lines,
            "torn lines": verdict.torn,
            "lost lines": verdict.lost,
            "whole": "no" if verdict.damage else "yes",
            **({"first damage": printable(verdict.damage[0])} if verdict.damage else {}),
        },
    )
    console.print(f"head {verdict.head}")
    if json_:
        print_json(asdict(verdict))
    if verdict.damage:
        raise typer.Exit(1)
