"""`scalp keys`: makes, lists and revokes keys of the endpoint; `serving.auth.keys` reads their file."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from jobs.cli.options import JsonOption
from scalp_core.errors import UserError

keys = typer.Typer(
    help="Make, list and revoke the keys of clients of `scalp serve`.",
    epilog="Example: scalp keys list keys.txt",
    no_args_is_help=True,
)

FileArg = Annotated[str, typer.Argument(metavar="FILE", help="key file of `scalp serve --keys`")]


@keys.command(
    "new", epilog="Example: scalp keys new clinic-7 --scope grade --scope bulk:s3://clinic-7 --days 365"
)
def keys_new(
    id_: Annotated[str, typer.Argument(metavar="ID", help="name of the client in logs and in the audit log")],
    scope: Annotated[
        list[str],
        typer.Option(
            metavar="SCOPE",
            help="grade, keep (add images to the store), bulk:PREFIX (bulk runs below an s3:// prefix or "
            "folder), review (answer referred images), adjudicate (decide between readers) or admin; may be "
            "repeated",
        ),
    ] = ["grade"],  # noqa: B006
    expires: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="last day (UTC) on which the key is accepted")
    ] = None,
    days: Annotated[int | None, typer.Option(min=1, help="days until it expires, in place of a date")] = None,
) -> None:
    """Make a key and print it once, with the line for the file that `scalp serve --keys` reads."""
    from serving.auth.keys import new_key, parse_date
    from serving.auth.scopes import Rights

    if expires and days:
        raise UserError("--expires and --days both set the end of the key; give one")
    today = datetime.now(UTC).date()
    try:
        end = parse_date(expires) if expires else None
    except ValueError as error:
        raise UserError(f"--expires {expires}: {error}") from None
    if end and end < today:
        raise UserError(f"--expires {expires} is over; give today ({today}) or a later day")
    try:
        rights = Rights.parse(scope)
    except ValueError as error:
        raise UserError(f"--scope {' '.join(scope)}: {error}") from None
    try:
        end = today + timedelta(days=days) if days else end
    except OverflowError:
        raise UserError(f"--days {days} is beyond the calendar; leave it out for no end") from None
    key, line = new_key(id_, rights, end)
    print(f"key, to give away, shown this once:  {key}")  # noqa: T201
    print(f"line, to append to the file:         {line}")  # noqa: T201


@keys.command("list", epilog="Example: scalp keys list keys.txt")
def keys_list(file: FileArg, json_: JsonOption = False) -> None:
    """List ids, scopes, expiry and the start of the hash of the keys in a file; never a key."""
    from rich.table import Table
    from rich.text import Text

    from jobs.common.console import console, print_json
    from jobs.common.errors import printable
    from serving.auth.keys import parse_keys, read_file

    keys_ = parse_keys(read_file(file), file)
    if json_:
        print_json(
            [
                {
                    "id": key.id,
                    "scopes": key.rights.scopes,
                    "expires": key.expires,
                    "expired": key.is_expired,
                    "hash": key.digest.hex()[:8],
                }
                for key in keys_
            ]
        )
        return
    table = Table("id", "scopes", "expires", "hash")
    for key in keys_:
        end = f"{key.expires or 'never'}{', which is over' if key.is_expired else ''}"
        cells = (key.id, "\n".join(map(printable, key.rights.scopes)), end, key.digest.hex()[:8])
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console.print(table)


@keys.command("revoke", epilog="Example: scalp keys revoke keys.txt clinic-7 --hash 3f9a")
def keys_revoke(
    file: FileArg,
    id_: Annotated[str, typer.Argument(metavar="ID", help="name of the client whose keys are removed")],
    hash_: Annotated[
        str | None,
        typer.Option(
            "--hash", metavar="HEX", help="start of the hash of the one key to remove; default: all its keys"
        ),
    ] = None,
) -> None:
    """Atomically remove the keys of an ID from a file; `scalp serve` refuses them within five seconds."""
    from serving.auth.key_file import revoke

    for key in revoke(file, id_, hash_):
        print(f"removed {key.id}, hash {key.digest.hex()[:8]}")  # noqa: T201
