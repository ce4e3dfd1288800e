"""`scalp bench`: measure the engine, a running endpoint, and the promises of decisions.

Comparisons with other frameworks are in a checkout: `python -m tests.benchmarks`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.options import DeviceOption, PrecisionOption, RuntimeOption

bench = typer.Typer(
    help="Measure the engine on this machine, or a running endpoint; prints a table and writes summary.json.",
    epilog="Example: scalp bench engine\n\nComparisons with other frameworks, in a checkout: "
    "python -m tests.benchmarks --help",
    no_args_is_help=True,
)

BenchOutOption = Annotated[str, typer.Option(help="output folder, new or of the same benchmark")]
PhotographsOption = Annotated[
    str | None, typer.Option(help="JPEG files, a folder or s3:// prefix; default: synthetic images")
]


def check_out(out: str, kind: str) -> str:
    """Return `out` if it is new or of the same benchmark; checked before minutes of measuring."""
    from jobs.bench.measure import marker
    from scalp_core.storage import outputs

    outputs.check_claim(out, marker(kind))
    return out


@bench.command("engine", epilog="Example: scalp bench engine --device cuda --bundle runs/first")
def bench_engine(
    out: BenchOutOption = "runs/bench/engine",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    runtime: RuntimeOption = "auto",
    bundle: Annotated[
        str | None, typer.Option(help="trained bundle; default: untrained weights, which are as fast")
    ] = None,
    photographs: PhotographsOption = None,
    size: Annotated[
        int, typer.Option(min=32, max=1024, help="input size of untrained weights, pixels")
    ] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="rounds per measurement")] = 5,
    seconds: Annotated[
        float, typer.Option(min=0.05, help="shortest time per measurement and round, seconds")
    ] = 1.0,
) -> None:
    """Measure decoding, forward pass and bytes-to-grade, without Ray and storage; takes some minutes."""
    from jobs.bench.engine import bench_engine as verb

    verb(check_out(out, "engine"), device, precision, runtime, bundle, photographs, size, rounds, seconds)


@bench.command("serve", epilog="Example: scalp bench serve --url http://127.0.0.1:8000 --clients 16")
def bench_serve(
    url: Annotated[str, typer.Option(help="base URL of the endpoint, http:// or https://")],
    out: BenchOutOption = "runs/bench/serve-url",
    key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file with the API key; default: no key")
    ] = None,
    photographs: PhotographsOption = None,
    clients: Annotated[
        int, typer.Option(min=1, help="clients, each of which sends the next image after an answer")
    ] = 8,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="images per second at random moments, instead of --clients", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="measured time, seconds, after one of warm-up")] = 30,
    protocol: Annotated[
        Literal["scalp", "oip"],
        typer.Option(help="scalp: /v1/grade; oip: any server of the Open Inference Protocol v2 over HTTP"),
    ] = "scalp",
    model: Annotated[str, typer.Option(help="model of --protocol oip, with one BYTES input")] = "scalp",
) -> None:
    """Measure throughput and latency of a running endpoint."""
    from jobs.bench.serve import KIND
    from jobs.bench.serve import bench_serve as verb

    key = key_file.read_text().strip() if key_file else None
    verb(check_out(out, KIND), url, photographs, clients, rate, seconds, key, protocol, model)


@bench.command("decisions", epilog="Example: scalp bench decisions --draws 20")
def bench_decisions(
    out: BenchOutOption = "runs/bench/decisions",
    draws: Annotated[int, typer.Option(min=1, help="draws of microscopes per simulated grader")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="random seed")] = 0,
) -> None:
    """Measure how often grade sets and referral keep their promises, on simulated graders."""
    from jobs.bench.decisions import KIND
    from jobs.bench.decisions import bench_decisions as verb

    verb(check_out(out, KIND), draws, seed)
