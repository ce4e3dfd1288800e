"""The table of benches: `scalp bench NAME --help` explains each."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from jobs.common.options import DeviceOption

bench = typer.Typer(help="Measures side by side, in one run, to a table and JSON.", no_args_is_help=True)

BenchOutOption = Annotated[str, typer.Option(help="folder for summary.json, new or of the same bench")]


def _own(out: str, kind: str) -> str:
    """The folder, if it is new or of the same bench; told now, not after minutes of measuring."""
    from jobs.bench.measure import marker
    from scalp_core.storage import outputs

    outputs.check_claim(out, marker(kind))
    return out


@bench.command("engine")
def bench_engine(
    out: BenchOutOption = "runs/bench/engine",
    device: DeviceOption = "auto",
    bundle: Annotated[str | None, typer.Option(help="a trained one; without it untrained weights")] = None,
    photographs: Annotated[
        str | None, typer.Option(help="folder or s3:// prefix of JPEG files; without it synthetic ones")
    ] = None,
    size: Annotated[int, typer.Option(min=32, max=1024, help="input of untrained weights, pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each candidate gets")] = 5,
    seconds: Annotated[float, typer.Option(min=0.05, help="that a turn lasts at least")] = 1.0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="also by Inductor, which takes a minute")
    ] = True,
) -> None:
    """Decoding, the bare model and bytes-to-grade, beside the plain way; takes some seven minutes."""
    from jobs.bench.engine import EngineOptions
    from jobs.bench.engine import bench_engine as verb

    verb(_own(out, "engine"), EngineOptions(device, bundle, photographs, size, rounds, seconds, compiled))


@bench.command("train")
def bench_train(
    out: BenchOutOption = "runs/bench/train",
    device: DeviceOption = "auto",
    size: Annotated[int, typer.Option(min=32, max=1024, help="input, pixels")] = 224,
    photographs: Annotated[int, typer.Option(min=50, help="synthetic ones to draw")] = 800,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each way gets")] = 2,
    epochs: Annotated[int, typer.Option(min=2, help="of each turn; the first is warm-up")] = 2,
    batch_size: Annotated[int, typer.Option(min=2, help="of all workers together")] = 16,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="of the parallel ways, which 1 leaves out; one for each GPU, else 2",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Training beside a plain PyTorch loop and torchrun; takes some twenty minutes."""
    from jobs.bench.train import TrainOptions
    from jobs.bench.train import bench_train as verb

    options = TrainOptions(device, size, photographs, batch_size, epochs, rounds, workers)
    verb(_own(out, "train"), options)


@bench.command("bulk")
def bench_bulk(
    out: BenchOutOption = "runs/bench/bulk",
    device: DeviceOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="a trained one; without it random weights, which are as fast")
    ] = None,
    photographs: Annotated[int, typer.Option(min=300, help="synthetic ones to draw")] = 2000,
    size: Annotated[int, typer.Option(min=32, max=1024, help="input of random weights, pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each way gets")] = 2,
    daft: Annotated[bool, typer.Option("--daft/--no-daft", help="also Daft")] = True,
) -> None:
    """Bulk grading beside the bare engine, a plain loop and Daft, from disk and S3; takes some 20 minutes."""
    from jobs.bench.grade.bulk import BulkOptions
    from jobs.bench.grade.bulk import bench_bulk as verb

    verb(_own(out, "bulk"), BulkOptions(device, bundle, photographs, size, rounds, daft))


@bench.command("serve")
def bench_serve(
    out: BenchOutOption = "runs/bench/serve",
    device: DeviceOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="a trained one; without it random weights, which are as fast")
    ] = None,
    size: Annotated[int, typer.Option(min=32, max=1024, help="input of random weights, pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="turns that each server gets at each load")] = 3,
    seconds: Annotated[float, typer.Option(min=0.5, help="that a turn counts")] = 5,
    share: Annotated[
        float, typer.Option(min=0.05, max=1, help="of its capacity, offered in the open loops")
    ] = 0.7,
) -> None:
    """The endpoint beside LitServe and plain FastAPI, on loopback; takes some fourteen minutes."""
    from jobs.bench.serve.comparison import ServeOptions
    from jobs.bench.serve.comparison import bench_serve as verb

    verb(_own(out, "serve"), ServeOptions(device, bundle, size, rounds=rounds, seconds=seconds, share=share))


@bench.command("scale")
def bench_scale(
    out: Annotated[
        str | None,
        typer.Option(help="folder for summary.json; runs/bench/scale without it, for grade …/scale-grade"),
    ] = None,
    stage: Annotated[Literal["prepare", "grade"], typer.Option(help="which verb grows")] = "prepare",
    objects: Annotated[
        str | None,
        typer.Option(
            help="photographs of each run; 1000,10000,100000 without it, for grade ten times as many"
        ),
    ] = None,
    simulated: Annotated[
        int, typer.Option(min=0, help="objects of a run of prepare that reads no files")
    ] = 1_000_000,
    audited: Annotated[
        int, typer.Option(min=0, help="simulated objects of an audit alone; 3 KiB of disk each")
    ] = 0,
) -> None:
    """Rate and memory as the source grows; takes seven minutes and 5 GiB of disk, for grade half an hour."""
    from dataclasses import replace

    from jobs.bench.grade.scale import ScaleOptions
    from jobs.bench.grade.scale import bench_scale as on_prepare
    from jobs.bench.grade.scale_grade import GradeScaleOptions
    from jobs.bench.grade.scale_grade import bench_grade_scale as on_grade
    from scalp_core.errors import UserError

    try:
        sizes = [int(number) for number in objects.split(",")] if objects else None
    except ValueError:
        raise UserError(f"--objects {objects}: write numbers with commas, for example 1000,10000") from None
    chosen = (tuple(sizes),) if sizes else ()
    if stage == "grade":
        on_grade(_own(out or "runs/bench/scale-grade", "scale-grade"), GradeScaleOptions(*chosen))
    else:
        options = replace(ScaleOptions(*chosen), simulated=simulated, audited=audited)
        on_prepare(_own(out or "runs/bench/scale", "scale"), options)


@bench.command("overload")
def bench_overload(
    out: BenchOutOption = "runs/bench/overload",
    device: DeviceOption = "auto",
    bundle: Annotated[str | None, typer.Option(help="a trained one; without it random weights")] = None,
    times: Annotated[float, typer.Option(min=1, help="its capacity, offered")] = 2.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=5, help="of the overload, 60 without it; of each attack, 20 without it", show_default=False
        ),
    ] = None,
    hostile: Annotated[
        bool, typer.Option("--hostile", help="what an ordinary client waits beside a hostile one")
    ] = False,
) -> None:
    """The endpoint under more than it can grade, two minutes; or beside a hostile client, five minutes."""
    if hostile:
        from jobs.bench.serve.hostile import KIND, bench_hostile

        bench_hostile(_own(out, KIND), device, bundle, seconds or 20.0)
        return
    from jobs.bench.serve.overload import OverloadOptions
    from jobs.bench.serve.overload import bench_overload as verb

    verb(_own(out, "overload"), OverloadOptions(device, bundle, times=times, seconds=seconds or 60.0))


@bench.command("autoscale")
def bench_autoscale(
    out: BenchOutOption = "runs/bench/autoscale",
    device: DeviceOption = "auto",
    graders: Annotated[int, typer.Option(min=2, help="most replicas")] = 3,
) -> None:
    """Graders that follow a load up and down, as a picture; takes four minutes."""
    from jobs.bench.serve.autoscale import AutoscaleOptions
    from jobs.bench.serve.autoscale import bench_autoscale as verb

    verb(_own(out, "autoscale"), AutoscaleOptions(device, graders=graders))


@bench.command("grow")
def bench_grow(
    out: BenchOutOption = "runs/bench/grow",
    nodes: Annotated[int, typer.Option(min=1, help="most of the simulated cluster")] = 3,
) -> None:
    """A simulated cluster that grows for a grading job and shrinks after it, as a picture; four minutes."""
    from jobs.bench.grade.grow import GrowOptions
    from jobs.bench.grade.grow import bench_grow as verb

    verb(_own(out, "grow"), GrowOptions(nodes=nodes))
