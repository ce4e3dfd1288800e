"""`grow`: plot the nodes of a cluster that autoscales for a grading job.

Nodes are simulated on this machine, so more of them are not faster. The plot shows that nodes start when
there is work, that they grade images, and that they stop.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench import inputs
from jobs.bench.measure import write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, show
from scalp_core import storage
from scalp_core.results.progress import read_progress
from tests.support.simulated_cluster import simulated_cluster, working_nodes

PICTURE_FILE = "grow.png"
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class GrowOptions:
    """Options of `grow`.

    Args:
        size: Input size of random weights, pixels.
        photographs: Number of images to grade.
        nodes: Maximum number of nodes.
        cpus: CPUs per node.
        idle_seconds: Idle time after which a node stops.
        patience_seconds: Timeout for the nodes to stop after the job.
    """

    size: int = 224
    photographs: int = 6000
    nodes: int = 3
    cpus: int = 3
    idle_seconds: float = 20
    patience_seconds: float = 180


def bench_grow(out: str, options: GrowOptions) -> dict[str, Any]:
    """Grade on a cluster that starts without nodes.

    Args:
        out: Output directory, for `summary.json` and the plot.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        RuntimeError: Grading fails, or the nodes do not stop.
    """
    files = inputs.read_images(None)
    samples: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle, images, graded = (str(Path(folder, name)) for name in ("bundle", "photographs", "graded"))
        with console.status("preparing bundle and images"):
            inputs.write_bundle(bundle, None, options.size, files)
            for number in range(options.photographs):
                storage.write(f"{images}/{number:06d}.jpg", files[number % len(files)])
        with simulated_cluster({"CPU": options.cpus}, options.nodes, options.idle_seconds) as address:
            started = time.monotonic()

            def sample() -> int:
                progress = read_progress(graded)
                nodes = working_nodes(address)
                samples.append((time.monotonic() - started, nodes, progress.done if progress else 0))
                return nodes

            sample()
            ended = _grade(bundle, images, graded, address, sample, options, Path(folder, "log"))
            while (left := sample()) > 0 and time.monotonic() - started < ended + options.patience_seconds:
                time.sleep(_SAMPLE_S)
            if left:
                raise RuntimeError(f"{left} nodes did not stop")
        summary = read_json(storage.join(graded, SUMMARY_FILE)) or {}
    rows = [{"seconds": round(at, 1), "nodes": count, "photographs": done} for at, count, done in samples]
    first = next(at for at, count, _ in samples if count)
    ratios = {
        "most_nodes": float(max(count for _, count, _ in samples)),
        "nodes_at_end": float(samples[-1][1]),
        "seconds_to_first_node": round(first, 1),
        "seconds_to_none_after_end": round(samples[-1][0] - ended, 1),
        "rows_unaccounted": float(summary["rows_unaccounted"]),
    }
    result = write_result(out, "grow", vars(options), rows, ratios)
    storage.write(storage.join(storage.absolute(out), PICTURE_FILE), _plot(samples, ended, options))
    places = {"summary": SUMMARY_FILE, "picture": PICTURE_FILE}
    show("grow", ratios | {name: storage.join(storage.absolute(out), file) for name, file in places.items()})
    return result


def _grade(
    bundle: str, images: str, graded: str, address: str, sample: Any, options: GrowOptions, log: Path
) -> float:
    """Grade in a separate process; return the seconds from the start of the cluster to its end."""
    command = [sys.executable, "-m", "jobs.cli", "grade", bundle, images, graded, "--device", "cpu"]
    started = time.monotonic()
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--heatmaps", "0"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_ADDRESS": address},
        ) as process,
        progress_bar("grading", options.photographs) as (progress, task),
    ):
        while process.poll() is None:
            nodes = sample()
            done = read_progress(graded)
            progress.update(task, completed=done.done if done else 0, note=f"{nodes} nodes")
            time.sleep(_SAMPLE_S)
    if process.returncode:
        raise RuntimeError(f"scalp grade failed: {log.read_text(errors='replace')[-2000:]}")
    return time.monotonic() - started


def _plot(samples: list[tuple[float, int, int]], ended: float, options: GrowOptions) -> bytes:
    """Plot nodes, and images per second, over time; PNG."""
    import matplotlib.pyplot as plt
    import numpy as np

    at, nodes, done = (np.array(column, float) for column in zip(*samples, strict=True))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    top.step(at, nodes, where="post", color="#c8541f")
    top.set(ylabel="nodes", ylim=(0, options.nodes + 0.5))
    bin_seconds = 10  # wider than the interval of progress files
    edges = np.arange(0, at[-1] + bin_seconds, bin_seconds)
    graded = np.interp(edges, at, done)
    bottom.step(edges[:-1], np.diff(graded) / bin_seconds, where="post", color="#0f766e")
    bottom.set(ylabel="images/s", xlabel="seconds", ylim=(0, None))
    for axis in (top, bottom):
        axis.axvline(ended, color="gray", linestyle="--", linewidth=1)
        axis.grid(alpha=0.3)
    top.annotate("the job ends", (ended, options.nodes + 0.3), color="gray", xytext=(4, 0),
                 textcoords="offset points", va="top")  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
