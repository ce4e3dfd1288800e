"""The command `calibrate`: its arguments and options."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.cli.options import (
    BatchOption,
    BundleArg,
    DataArg,
    DeviceOption,
    OutArg,
    PrecisionOption,
    RunsHereOption,
    RuntimeOption,
)


def calibrate(
    bundle: BundleArg,
    data: DataArg,
    out: OutArg,
    target: Annotated[
        list[str],
        typer.Option(
            help="wrong<=5%: at most as many wrong grades among the answered images; found>=95%: at least as "
            "many images of moderate or worse graded so or referred; may be repeated; with 95 % confidence"
        ),
    ] = ["wrong<=10%"],  # noqa: B006
    coverage: Annotated[
        float, typer.Option(min=0.5, max=0.999, help="least share of grade sets with the true grade")
    ] = 0.9,
    split: Annotated[
        Literal["all", "train", "val", "test"], typer.Option(help="labeled images to calibrate on")
    ] = "all",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    batch_size: BatchOption = 16,
    runtime: RuntimeOption = "auto",
    local: RunsHereOption = None,
) -> None:
    """Fit calibration, grade sets, referral, gates and drift to your own labeled images, 200 to 500.

    It writes a new bundle to OUT/bundle, with the same weights.
    """
    from jobs.cli.executors import SMALLER_BATCH, make_executor, runs_here
    from jobs.common.inference import ModelOptions
    from jobs.models.calibrate import calibrate as verb

    options = ModelOptions(device, precision, batch_size, runtime)
    executor = make_executor(runs_here(local, device), SMALLER_BATCH)
    verb(bundle, data, out, ",".join(target), coverage, split, options, executor)
