"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from scalp_core.errors import UserError

BundleArg = Annotated[
    str,
    typer.Argument(
        help="run directory of `scalp train`, local or s3://; or models://NAME, models://NAME@VERSION"
    ),
]
DataArg = Annotated[str, typer.Argument(help="output directory of `scalp prepare`, local or s3://")]
OutArg = Annotated[str, typer.Argument(help="output directory, local or s3://")]
MaxDropOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="largest accepted loss of kappa and of coverage, 0 to 1: upper bound at 95 % confidence",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="private Ed25519 key of OpenSSH that signs the entry of the history; required if SCALP_SIGNERS "
        "is set",
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option(help="auto selects cuda if a GPU is available, else cpu"),
]
PrecisionOption = Annotated[
    Literal["auto", "bf16", "fp32", "int8"],
    typer.Option(
        metavar="FORMAT",  # the names take half a line
        help="number format: auto, bf16, fp32 or int8; auto selects bf16 if the hardware supports it, else "
        "fp32; int8 needs `scalp quantize` first",
    ),
]
RunsHereOption = Annotated[
    bool | None,
    typer.Option(
        "--local/--cluster",
        help="run in this process without Ray, or in Ray; default: in Ray if RAY_ADDRESS names a cluster or "
        "this machine has a GPU, else in this process",
    ),
]
RuntimeOption = Annotated[
    Literal["auto", "openvino", "torch", "torch-compile"],
    typer.Option(
        metavar="ENGINE",  # the names take half a line
        help="inference engine: auto, openvino, torch or torch-compile; auto selects openvino on CPUs, "
        "and on GPUs torch, or torch-compile for long runs",
    ),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override one setting; may be repeated")
]


def _print_to_stderr(context: typer.Context, as_json: bool) -> bool:
    """With --json, print tables, notes and progress on standard error."""
    if as_json:
        from jobs.common.console import console

        console.stderr = True
        context.call_on_close(lambda: setattr(console, "stderr", False))
    return as_json


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_print_to_stderr,
        help="print one JSON document on standard output; tables, notes and progress on standard error",
    ),
]
BatchOption = Annotated[int, typer.Option(min=1, help="maximum number of images per forward pass")]


def with_old_names(names: Mapping[str, str]) -> type[TyperCommand]:
    """Make a command class that accepts options under their former names, which its help does not show.

    Args:
        names: Present name by former name, both with their dashes.
    """

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            return super().parse_args(ctx, _rename(args, names))

    return Command


def _rename(args: list[str], names: Mapping[str, str]) -> list[str]:
    end = args.index("--") if "--" in args else len(args)
    words = [word.partition("=") for word in args[:end]]
    return [names.get(name, name) + equals + value for name, equals, value in words] + args[end:]


def parse_range(option: str, text: str | None) -> tuple[int, int] | None:
    """Parse `4` to (4, 4) and `2:8` to (2, 8), minimum and maximum; None stays None.

    Raises:
        UserError: The text has neither form.
    """
    if text is None:
        return None
    words = text.split(":")
    if not all(word.isdigit() and int(word) for word in words) or len(words) > 2:
        raise UserError(f"{option} {text} is not a number; write a number, or MIN:MAX such as 2:8")
    fewest, most = int(words[0]), int(words[-1])
    if fewest > most:
        raise UserError(f"{option} {text}: MIN is more than MAX; write {option} {most}:{fewest}")
    return fewest, most
