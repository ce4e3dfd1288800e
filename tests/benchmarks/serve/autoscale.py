"""`autoscale`: plot the number of grader replicas against a load that rises and falls."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from jobs.bench import inputs, load
from jobs.bench.load import Load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, resolve_device
from serving.settings import Scaling
from tests.benchmarks.serve.faults import GRADER
from tests.benchmarks.serve.servers import Server

PICTURE_FILE = "autoscale.png"
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class AutoscaleOptions:
    """Options of `autoscale`.

    Args:
        device: Device of the model.
        size: Input size of random weights, pixels.
        graders: Maximum number of grader replicas.
        target: Target of ongoing requests per replica for the autoscaler.
        phases: Clients of a closed loop, and seconds, per phase.
    """

    device: Device = "auto"
    size: int = 224
    graders: int = 3
    target: float = 4
    phases: tuple[tuple[int, float], ...] = ((1, 30.0), (8, 45.0), (16, 60.0), (1, 75.0))


def bench_autoscale(out: str, options: AutoscaleOptions) -> dict[str, Any]:
    """Apply a load that rises and falls, and count the grader replicas.

    Args:
        out: Output directory, for `summary.json` and the plot.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The device is unavailable.
        RuntimeError: The endpoint does not start.
    """
    device = resolve_device(options.device)
    files = inputs.read_images(None)
    grader = Scaling(
        max_replicas=options.graders,
        target_ongoing_requests=options.target,
        max_ongoing_requests=32,
        max_queued_requests=64,
        upscale_delay_s=5,
        downscale_delay_s=20,
        gpus=1 / options.graders if device == "cuda" else 0,
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("preparing the bundle, starting the endpoint"):
            inputs.write_bundle(folder, None, options.size, files)
            settings_file = Path(folder, "settings.yaml")
            settings_file.write_text(yaml.safe_dump({"grader": grader.model_dump()}))
            command = ["-m", "jobs.cli", "serve", folder, "--port", "PORT", "--device", device]
            client = OwnProcess(load.setup, files)
            stack.callback(client.close)
            server = stack.enter_context(
                Server("scalp serve", [*command, "--settings", str(settings_file)], files[0], {})
            )
        started, over, replicas = time.perf_counter(), threading.Event(), list[tuple[float, int]]()

        def sample() -> None:
            while not over.wait(_SAMPLE_S):
                replicas.append((time.perf_counter() - started, len(server.processes(GRADER))))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        loads: list[Load] = []
        for clients, seconds in options.phases:
            console.print(f"{clients} clients for {seconds:.0f} s")
            loads.append(client.call(load.closed, server.url, clients, 0.0, seconds))
        over.set()
        thread.join()
    rows = _rows(options, loads, replicas)
    settings = vars(options) | {"device": device, "grader": grader.model_dump()}
    ratios = {
        "most_graders": float(max(row["graders_at_end"] for row in rows)),
        "failed": float(sum(phase.errors for phase in loads)),
    }
    result = write_result(out, "autoscale", settings, rows, ratios, replicas=replicas)
    plot = _plot(options, loads, replicas)
    storage.write(storage.join(storage.absolute(out), PICTURE_FILE), plot)
    _show(result, out)
    return result


def _rows(
    options: AutoscaleOptions, loads: list[Load], replicas: list[tuple[float, int]]
) -> list[dict[str, Any]]:
    rows, end = [], 0.0
    for (clients, seconds), phase in zip(options.phases, loads, strict=True):
        end += seconds
        latencies = 1000 * np.array(phase.latencies)
        rows.append(
            {
                "clients": clients,
                "seconds": seconds,
                "requests_per_second": round(len(latencies) / seconds, 1),
                "p50_ms": round(float(np.quantile(latencies, 0.5)), 1),
                "p99_ms": round(float(np.quantile(latencies, 0.99)), 1),
                "errors": phase.errors,
                "graders_at_end": next((count for at, count in reversed(replicas) if at <= end), 0),
            }
        )
    return rows


def _plot(options: AutoscaleOptions, loads: list[Load], replicas: list[tuple[float, int]]) -> bytes:
    """Plot clients and throughput, replicas, and latency over time; PNG."""
    import matplotlib.pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(9, 7), sharex=True, layout="constrained")
    starts = np.cumsum([0.0, *(seconds for _, seconds in options.phases)])
    clients = [count for count, _ in options.phases]
    top.step(starts, [*clients, clients[-1]], where="post", color="gray", label="clients")
    for start, phase in zip(starts, loads, strict=False):
        edges = np.arange(0, phase.seconds + 1)
        counts, _ = np.histogram(phase.moments, edges)
        top.plot(start + edges[:-1], counts, color="#0f766e", label="images/s" if start == 0 else None)
        at = start + np.array(phase.moments)
        bottom.plot(at, phase.latencies, ".", markersize=2, color="#1f5fa8")
    top.set(ylabel="load", ylim=(0, None))
    top.legend(loc="upper right")
    middle.step(*zip(*replicas, strict=True), where="post", color="#c8541f")
    middle.set(ylabel="graders", ylim=(0, options.graders + 0.5))
    bottom.set(ylabel="latency, seconds", xlabel="seconds", ylim=(0, None))
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _show(result: dict[str, Any], out: str) -> None:
    table = Table()
    for name in result["rows"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    files = {"summary": SUMMARY_FILE, "picture": PICTURE_FILE}
    places = {name: storage.join(storage.absolute(out), file) for name, file in files.items()}
    show("ratios", result["ratios"] | places)
