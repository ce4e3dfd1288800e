"""`overload`: measure the endpoint under a multiple of its capacity, and its recovery."""

from __future__ import annotations

import io
import statistics
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table

from jobs.bench import inputs, load
from jobs.bench.load import Load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, resolve_device
from serving.admission.limits import Limits
from tests.benchmarks.serve.servers import Server

PICTURE_FILE = "overload.png"
_MANY = 16  # clients of the closed loop that measures the capacity
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class OverloadOptions:
    """Options of `overload`.

    Args:
        device: Device of the model.
        bundle: Trained bundle; None: random weights.
        size: Input size of random weights, pixels.
        times: Offered load, as a multiple of the capacity.
        seconds: Duration of the overload.
        calm_seconds: Duration of each measurement before and after.
    """

    device: Device = "auto"
    bundle: str | None = None
    size: int = 224
    times: float = 2.0
    seconds: float = 60.0
    calm_seconds: float = 10.0


def bench_overload(out: str, options: OverloadOptions) -> dict[str, Any]:
    """Measure the endpoint with one client, at its capacity, above it, and with one client again.

    Args:
        out: Output directory, for `summary.json` and the plot.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The bundle or the device is unavailable.
        RuntimeError: The endpoint does not start.
    """
    device = resolve_device(options.device)
    files = inputs.read_images(None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("preparing the bundle, starting the endpoint"):
            bundle = inputs.write_bundle(folder, options.bundle, options.size, files)
            command = ["-m", "jobs.cli", "serve", folder, "--port", "PORT", "--device", device]
            client = OwnProcess(load.setup, files)
            stack.callback(client.close)
            server = stack.enter_context(Server("scalp serve", command, files[0], {}))
        closed = partial(client.call, load.closed, server.url)
        with console.status("alone, and at its capacity"):
            before = closed(1, 2.0, options.calm_seconds)
            full = closed(_MANY, 2.0, options.calm_seconds)
        capacity = len(full.latencies) / full.seconds
        console.print(f"{options.times:g} times {capacity:.0f}/s for {options.seconds:.0f} s")
        with _memory(server) as memory:
            storm = client.call(load.open_loop, server.url, options.times * capacity, 0.0, options.seconds)
        with console.status("alone again"):
            after = closed(1, 2.0, options.calm_seconds)
    rows = [
        _row("alone", before),
        _row(f"{_MANY} clients", full),
        _row("overload", storm),
        _row("after", after),
    ]
    bound = Limits().queue_seconds
    settings = vars(options) | {
        "device": device,
        "weights": bundle.spec.model_version if options.bundle else "untrained",
        "size": bundle.spec.preprocess.size,
        "capacity": round(capacity, 1),
        "offered": round(options.times * capacity, 1),
        "queue_bound_seconds": bound,
    }
    result = write_result(
        out,
        "overload",
        settings,
        rows,
        ratios(rows, bound, memory),
        memory_mib=[round(mib) for mib in memory],
    )
    storage.write(storage.join(storage.absolute(out), PICTURE_FILE), _plot(storm, memory, settings))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]], queue_bound: float, memory: list[float]) -> dict[str, float | None]:
    """Ratios to the goals: below 1 for the latency, near 1 for memory and recovery, 0 for lost requests."""
    alone, _, storm, after = rows
    allowed = 3 * alone["p99_ms"] + 1000 * queue_bound
    third = max(1, len(memory) // 3)
    return {
        "accepted_p99_vs_allowed": storm["p99_ms"] / allowed,
        "lost_share": storm["lost"] / storm["requests"],
        "refused_share": storm["refused"] / storm["requests"],
        "accepted_vs_capacity": storm["accepted_per_second"] / rows[1]["accepted_per_second"],
        "memory_last_vs_first": statistics.median(memory[-third:]) / statistics.median(memory[:third]),
        "p99_after_vs_before": after["p99_ms"] / alone["p99_ms"],
    }


@contextmanager
def _memory(server: Server) -> Iterator[list[float]]:
    """Sample the memory of the server's processes, MiB per second of the block."""
    samples: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_SAMPLE_S):
            samples.append(server.memory_mib())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _row(what: str, result: Load) -> dict[str, Any]:
    refused = len(result.refusals)
    latencies = 1000 * np.array(result.latencies)
    p50, p95, p99 = np.quantile(latencies, (0.5, 0.95, 0.99))
    return {
        "what": what,
        "requests": len(latencies) + result.errors,
        "accepted_per_second": round(len(latencies) / result.seconds, 1),
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "refused": refused,
        "lost": result.errors - refused,
    }


def _plot(storm: Load, memory: list[float], settings: dict[str, Any]) -> bytes:
    """Plot accepted and refused requests per second, latency of accepted ones, and memory; PNG."""
    import matplotlib.pyplot as plt

    seconds = np.arange(int(storm.seconds) + 1)
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 7), sharex=True, layout="constrained")
    for moments, name, color in (
        (storm.moments, "accepted", "#0f766e"),
        (storm.refusals, "refused", "#c8541f"),
    ):
        counts, _ = np.histogram(moments, [*seconds, seconds[-1] + 1])
        top.step(seconds, counts, where="post", label=name, color=color)
    top.axhline(settings["offered"], color="gray", linestyle=":", label="offered")
    top.set(ylabel="images/s", ylim=(0, 1.3 * settings["offered"]))
    top.legend(loc="upper right", ncols=3)
    middle.plot(storm.moments, np.array(storm.latencies), ".", markersize=2, color="#1f5fa8")
    middle.axhline(settings["queue_bound_seconds"], color="gray", linestyle=":", label="queue limit")
    middle.set(ylabel="latency, seconds", ylim=(0, None))
    middle.legend(loc="lower right")
    bottom.plot(np.arange(1, len(memory) + 1) * _SAMPLE_S, memory, color="#1f5fa8")
    bottom.set(ylabel="MiB, all processes", xlabel="seconds", ylim=(0, 1.3 * max(memory, default=1)))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _show(result: dict[str, Any], out: str) -> None:
    table = Table()
    for name in result["rows"][0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "what" else "right")
    for row in result["rows"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    folder = storage.absolute(out)
    places = {
        name: storage.join(folder, file)
        for name, file in (("summary", SUMMARY_FILE), ("picture", PICTURE_FILE))
    }
    show("ratios", result["ratios"] | places)
