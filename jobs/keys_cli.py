"""`scalp keys`: keys of the endpoint; what they mean is in `serving.keys`."""

from __future__ import annotations

from typing import Annotated

import typer

keys = typer.Typer(help="Keys that clients of `scalp serve` send.", no_args_is_help=True)


@keys.callback()
def _group() -> None:
    """Keeps `new` a word of its own while it is the only one."""


@keys.command("new")
def keys_new(
    id_: Annotated[str, typer.Argument(metavar="ID", help="whose it is, as logs will name it")],
) -> None:
    """Makes a key, shows it once, and shows the line for the file that `scalp serve --keys` reads."""
    from serving.keys import new_key

    key, line = new_key(id_)
    print(f"key, to give away, shown this once:  {key}")  # noqa: T201
    print(f"line, to append to the file:         {line}")  # noqa: T201
