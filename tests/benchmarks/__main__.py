"""`python -m tests.benchmarks NAME`: one command per benchmark, with its options."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from cluster.resources import ClusterError
from jobs.cli.bench import BenchOutOption, check_out
from jobs.cli.options import DeviceOption, SetOption
from jobs.common.errors import print_error
from scalp_core.errors import UserError
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE

app = typer.Typer(
    help="Compare scalp with other frameworks in one run; prints a table and writes summary.json.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("engine", epilog="Example: python -m tests.benchmarks engine --device cuda")
def bench_engine(
    out: BenchOutOption = "runs/bench/engine-compared",
    device: DeviceOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="trained bundle, for meaningful grades; default: untrained weights")
    ] = None,
    photographs: Annotated[
        str | None, typer.Option(help="JPEG files, a folder or s3:// prefix; default: synthetic images")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds per candidate")] = 5,
) -> None:
    """Compare scalp's runtimes with plain PyTorch, without Ray and storage; takes some minutes."""
    from tests.benchmarks.engine import bench_engine as verb

    verb(check_out(out, "engine-compared"), device, bundle, photographs, rounds=rounds)


@app.command("train", epilog="Example: python -m tests.benchmarks train --rounds 1")
def bench_train(
    out: BenchOutOption = "runs/bench/train",
    device: DeviceOption = "auto",
    size: Annotated[int, typer.Option(min=32, max=1024, help="input size, pixels")] = 224,
    photographs: Annotated[int, typer.Option(min=50, help="number of synthetic images")] = 800,
    rounds: Annotated[int, typer.Option(min=1, help="rounds per candidate")] = 2,
    epochs: Annotated[int, typer.Option(min=2, help="epochs per round; the first is warm-up")] = 2,
    batch_size: Annotated[int, typer.Option(min=2, help="global batch size, summed over the workers")] = 32,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="workers of the parallel candidates; 1 skips them; default: one per GPU, or 2 without",
            show_default=False,
        ),
    ] = None,
    architecture: Annotated[str, typer.Option(help="timm name")] = DEFAULT_ARCHITECTURE,
) -> None:
    """Compare training with a plain PyTorch loop and torchrun; takes about 20 minutes."""
    from tests.benchmarks.train import TrainOptions
    from tests.benchmarks.train import bench_train as verb

    options = TrainOptions(device, size, photographs, batch_size, epochs, rounds, workers, architecture)
    verb(check_out(out, "train"), options)


@app.command("active", epilog="Example: python -m tests.benchmarks active --seeds 20")
def bench_active(
    out: BenchOutOption = "runs/bench/active",
    photographs: Annotated[
        int, typer.Option(min=50, help="number of synthetic images, 70 % for the pool, 10 % for the test")
    ] = 3600,
    first: Annotated[int, typer.Option(min=10, help="images with labels before the first round")] = 200,
    answers: Annotated[int, typer.Option(min=1, help="answers per round")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of answers")] = 3,
    seeds: Annotated[int, typer.Option(min=2, help="repetitions, with other first images")] = 5,
) -> None:
    """Compare orders of review: what the answers buy a linear probe; takes some minutes."""
    from tests.benchmarks.active import ActiveOptions
    from tests.benchmarks.active import bench_active as verb

    verb(check_out(out, "active"), ActiveOptions(photographs, first, answers, rounds, seeds))


@app.command("active-trained", epilog="Example: python -m tests.benchmarks active-trained --trainings 10")
def bench_active_trained(
    out: BenchOutOption = "runs/bench/active-trained",
    photographs: Annotated[
        int, typer.Option(min=50, help="number of synthetic images, 70 % for the pool, 30 % for the test")
    ] = 2000,
    first: Annotated[int, typer.Option(min=20, help="images with labels before the first round")] = 100,
    first_epochs: Annotated[int, typer.Option(min=1, help="epochs of the training with them")] = 15,
    answers: Annotated[int, typer.Option(min=1, help="answers per round")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="rounds of answers")] = 3,
    seeds: Annotated[int, typer.Option(min=2, help="repetitions, with other first images")] = 5,
    trainings: Annotated[
        int | None,
        typer.Option(
            min=1, help="trainings of this call; the same command resumes; default: all", show_default=False
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="strategy to compare with random, such as informative; may be repeated; default: all"
        ),
    ] = None,
    set_: SetOption = ["size=112", "epochs=5"],  # noqa: B006
) -> None:
    """Compare orders of review: what the answers buy a network that is trained; takes about an hour."""
    from tests.benchmarks.active_trained import KIND, STRATEGIES, ActiveTrainedOptions
    from tests.benchmarks.active_trained import bench_active_trained as verb

    if unknown := [name for name in strategy or () if name not in STRATEGIES]:
        raise UserError(f"--strategy {unknown[0]}: use one of {'; '.join(STRATEGIES)}")
    chosen = tuple(name for name in STRATEGIES if not strategy or name in ("random", *strategy))
    verb(
        check_out(out, KIND),
        ActiveTrainedOptions(photographs, first, first_epochs, answers, rounds, seeds, tuple(set_), chosen),
        trainings,
    )


@app.command("transfer", epilog="Example: python -m tests.benchmarks transfer --counts 200,500")
def bench_transfer(
    out: BenchOutOption = "runs/bench/transfer",
    counts: Annotated[str, typer.Option(help="numbers of training images")] = "200,500,2000",
    photographs: Annotated[
        int, typer.Option(min=50, help="number of synthetic images, 70 % for training, 10 % for the test")
    ] = 3600,
    steps: Annotated[int, typer.Option(min=2, help="steps of each training")] = 375,
    seeds: Annotated[int, typer.Option(min=1, help="repetitions")] = 1,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Compare fine-tuning of ImageNet weights with training from scratch; takes about 20 minutes."""
    from tests.benchmarks.transfer import TransferOptions
    from tests.benchmarks.transfer import bench_transfer as verb

    options = TransferOptions(tuple(map(int, counts.split(","))), photographs, steps, seeds, tuple(set_))
    verb(check_out(out, "transfer"), options)


@app.command("folds", epilog="Example: python -m tests.benchmarks folds --photographs 600 --set epochs=3")
def bench_folds(
    out: BenchOutOption = "runs/bench/folds",
    photographs: Annotated[
        int, typer.Option(min=100, help="number of synthetic images, 10 % for the test")
    ] = 1500,
    planted: Annotated[float, typer.Option(min=0.01, max=0.5, help="share of wrong labels to plant")] = 0.05,
    folds: Annotated[int, typer.Option(min=2, help="folds")] = 5,
    workers: Annotated[int, typer.Option(min=1, help="data-parallel workers of each training")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="random seed of images and wrong labels")] = 0,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Find planted wrong labels, and compare a student with its folds; takes about 25 minutes."""
    from tests.benchmarks.folds import FoldsOptions
    from tests.benchmarks.folds import bench_folds as verb

    verb(check_out(out, "folds"), FoldsOptions(photographs, planted, folds, workers, seed, tuple(set_)))


@app.command("symptoms", epilog="Example: python -m tests.benchmarks symptoms --set epochs=3")
def bench_symptoms(
    out: BenchOutOption = "runs/bench/symptoms",
    photographs: Annotated[
        int, typer.Option(min=100, help="number of synthetic images, 10 % for the test")
    ] = 1500,
    workers: Annotated[int, typer.Option(min=1, help="data-parallel workers of each training")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="random seed of the images")] = 0,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Train one model of six symptoms, and one of a single symptom; takes about 10 minutes."""
    from tests.benchmarks.symptoms import SymptomsOptions
    from tests.benchmarks.symptoms import bench_symptoms as verb

    verb(check_out(out, "symptoms"), SymptomsOptions(photographs, workers, seed, tuple(set_)))


@app.command(
    "out-of-distribution",
    epilog="Example: python -m tests.benchmarks out-of-distribution runs/demo/run runs/demo/data",
)
def bench_out_of_distribution(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="run directory or bundle with gates")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="prepared data that it was trained on")],
    out: BenchOutOption = "runs/bench/out-of-distribution",
    count: Annotated[int, typer.Option(min=60, help="largest number of images of each kind")] = 150,
) -> None:
    """Compare what the gates detect with scores of features and answers; takes about 3 minutes."""
    from tests.benchmarks.out_of_distribution import bench_out_of_distribution as verb

    verb(check_out(out, "out-of-distribution"), bundle, data, count)


@app.command("bulk", epilog="Example: python -m tests.benchmarks bulk --photographs 1000 --no-daft")
def bench_bulk(
    out: BenchOutOption = "runs/bench/bulk",
    device: DeviceOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="trained bundle; default: random weights, which are as fast")
    ] = None,
    photographs: Annotated[int, typer.Option(min=300, help="number of synthetic images")] = 2000,
    size: Annotated[int, typer.Option(min=32, max=1024, help="input size of random weights, pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="rounds per candidate")] = 2,
    daft: Annotated[bool, typer.Option("--daft/--no-daft", help="also measure Daft")] = True,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="candidate to measure, such as 'scalp grade, local'; may be repeated; default: all"
        ),
    ] = None,
) -> None:
    """Compare bulk grading with the engine alone, plain PyTorch and Daft; takes about 40 minutes."""
    from tests.benchmarks.grade.bulk import BulkOptions
    from tests.benchmarks.grade.bulk import bench_bulk as verb

    verb(
        check_out(out, "bulk"),
        BulkOptions(device, bundle, photographs, size, rounds, daft, tuple(only or ())),
    )


@app.command("serve", epilog="Example: python -m tests.benchmarks serve --rounds 1")
def bench_serve(
    out: BenchOutOption = "runs/bench/serve",
    device: DeviceOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="trained bundle; default: random weights, which are as fast")
    ] = None,
    size: Annotated[int, typer.Option(min=32, max=1024, help="input size of random weights, pixels")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="rounds per server and load")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0.5, help="measured time per server, load and round, seconds")
    ] = 5,
    share: Annotated[
        float,
        typer.Option(min=0.05, max=1, help="load of the open loops, as a fraction of a server's capacity"),
    ] = 0.7,
) -> None:
    """Compare throughput and latency of serving with LitServe and plain FastAPI; takes about 14 minutes."""
    from tests.benchmarks.serve.comparison import ServeOptions
    from tests.benchmarks.serve.comparison import bench_serve as verb

    verb(
        check_out(out, "serve"),
        ServeOptions(device, bundle, size, rounds=rounds, seconds=seconds, share=share),
    )


@app.command(
    "scale", epilog="Example: python -m tests.benchmarks scale --objects 1000,10000 --simulated 100000"
)
def bench_scale(
    out: Annotated[
        str | None,
        typer.Option(
            help="output folder; default: runs/bench/scale, or runs/bench/scale-grade with --stage grade"
        ),
    ] = None,
    stage: Annotated[Literal["prepare", "grade"], typer.Option(help="command to measure")] = "prepare",
    objects: Annotated[
        str | None,
        typer.Option(
            help="images per run, comma-separated; default: 1000,10000,100000, with --stage grade ten "
            "times as many"
        ),
    ] = None,
    simulated: Annotated[
        int,
        typer.Option(min=0, help="simulated objects of one more run of prepare, without files; 0: no run"),
    ] = 1_000_000,
    audited: Annotated[
        int,
        typer.Option(min=0, help="simulated objects of one audit, 3 KiB of disk each; 0: no audit"),
    ] = 0,
) -> None:
    """Measure throughput and memory against the size of the source; takes 7 minutes and 5 GiB of disk.

    With --stage grade it takes half an hour.
    """
    from dataclasses import replace

    from tests.benchmarks.grade.scale import ScaleOptions
    from tests.benchmarks.grade.scale import bench_scale as bench_prepare
    from tests.benchmarks.grade.scale_grade import GradeScaleOptions
    from tests.benchmarks.grade.scale_grade import bench_grade_scale as bench_grade

    try:
        sizes = [int(number) for number in objects.split(",")] if objects else None
    except ValueError:
        raise UserError(f"--objects {objects}: write numbers with commas, for example 1000,10000") from None
    chosen = (tuple(sizes),) if sizes else ()
    if stage == "grade":
        bench_grade(check_out(out or "runs/bench/scale-grade", "scale-grade"), GradeScaleOptions(*chosen))
    else:
        options = replace(ScaleOptions(*chosen), simulated=simulated, audited=audited)
        bench_prepare(check_out(out or "runs/bench/scale", "scale"), options)


@app.command(
    "overload",
    epilog="Example: python -m tests.benchmarks overload --times 3",
)
def bench_overload(
    out: BenchOutOption = "runs/bench/overload",
    device: DeviceOption = "auto",
    bundle: Annotated[str | None, typer.Option(help="trained bundle; default: random weights")] = None,
    times: Annotated[float, typer.Option(min=1, help="offered load, as a multiple of the capacity")] = 2.0,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=5,
            help="duration of the overload (default 60) or of each attack (default 20), seconds",
            show_default=False,
        ),
    ] = None,
    hostile: Annotated[
        bool, typer.Option("--hostile", help="measure the latency of an ordinary client during attacks")
    ] = False,
) -> None:
    """Measure the endpoint under overload (2 minutes), or while a hostile client attacks it (5 minutes)."""
    if hostile:
        from tests.benchmarks.serve.hostile import KIND, bench_hostile

        bench_hostile(check_out(out, KIND), device, bundle, seconds or 20.0)
        return
    from tests.benchmarks.serve.overload import OverloadOptions
    from tests.benchmarks.serve.overload import bench_overload as verb

    verb(check_out(out, "overload"), OverloadOptions(device, bundle, times=times, seconds=seconds or 60.0))


@app.command("autoscale", epilog="Example: python -m tests.benchmarks autoscale --graders 4")
def bench_autoscale(
    out: BenchOutOption = "runs/bench/autoscale",
    device: DeviceOption = "auto",
    graders: Annotated[int, typer.Option(min=2, help="maximum number of model replicas")] = 3,
) -> None:
    """Plot the number of model replicas against a load that rises and falls; takes 4 minutes."""
    from tests.benchmarks.serve.autoscale import AutoscaleOptions
    from tests.benchmarks.serve.autoscale import bench_autoscale as verb

    verb(check_out(out, "autoscale"), AutoscaleOptions(device, graders=graders))


@app.command("grow", epilog="Example: python -m tests.benchmarks grow --nodes 2")
def bench_grow(
    out: BenchOutOption = "runs/bench/grow",
    nodes: Annotated[int, typer.Option(min=1, help="maximum number of nodes of the simulated cluster")] = 3,
) -> None:
    """Plot the nodes of a simulated cluster that grows for a grading job; takes 4 minutes."""
    from tests.benchmarks.grade.grow import GrowOptions
    from tests.benchmarks.grade.grow import bench_grow as verb

    verb(check_out(out, "grow"), GrowOptions(nodes=nodes))


@app.command("nodes", epilog="Example: python -m tests.benchmarks nodes --photographs 6400")
def bench_nodes(
    out: BenchOutOption = "runs/bench/nodes",
    photographs: Annotated[int, typer.Option(min=1000, help="number of tiny images")] = 12_800,
) -> None:
    """Measure grading on 1, 2 and 4 simulated nodes with a model of a fixed time; takes 4 minutes."""
    from tests.benchmarks.grade.nodes import NodesOptions
    from tests.benchmarks.grade.nodes import bench_nodes as verb

    verb(check_out(out, "nodes"), NodesOptions(photographs=photographs))


if __name__ == "__main__":
    try:
        app()
    except (UserError, ClusterError) as error:
        print_error(str(error))
        sys.exit(2)
