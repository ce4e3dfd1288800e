"""Arguments and options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

BundleArg = Annotated[
    str,
    typer.Argument(help="directory that `scalp train` wrote, local or s3://; or models://NAME[@VERSION]"),
]
DataArg = Annotated[str, typer.Argument(help="directory that `scalp prepare` wrote, local or s3://")]
OutArg = Annotated[str, typer.Argument(help="directory for what is made, local or s3://")]
MaxDropOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="largest acceptable loss of kappa and of coverage: its upper bound, with 95 % confidence",
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option(help="auto takes a GPU when there is one")
]
PrecisionOption = Annotated[
    Literal["auto", "bf16", "fp32", "int8"],
    typer.Option(help="auto takes bf16 where the hardware has it; int8 needs `scalp quantize` before"),
]
RuntimeOption = Annotated[
    Literal["auto", "openvino", "torch", "torch-compile"],
    typer.Option(help="auto takes openvino on CPUs, torch on GPUs, compiled when the run is long"),
]
SetOption = Annotated[list[str], typer.Option("--set", help="KEY=VALUE; may be repeated")]
BatchOption = Annotated[int, typer.Option(min=1, help="photographs in one forward pass")]
