"""`scalp bench grow`: a cluster that grows for a grading job and shrinks after it; a picture of it.

The nodes are simulated on this machine, so more of them are not faster: what is shown is that they come when
there is work, that photographs are graded on them, and that they go.
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

from cluster.testing.simulated import simulated_cluster, working_nodes
from jobs.bench import inputs
from jobs.bench.measure import write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, show
from scalp_core import storage
from scalp_core.results.progress import read_progress

PICTURE_FILE = "grow.png"
_SAMPLE_S = 1.0


@dataclass(frozen=True)
class GrowOptions:
    """What to simulate.

    Args:
        size: side of the input of random weights, pixels.
        photographs: to grade.
        nodes: most at once.
        cpus: of each.
        idle_seconds: after which a node without work goes.
        patience_seconds: for the nodes to go again.
    """

    size: int = 224
    photographs: int = 6000
    nodes: int = 3
    cpus: int = 3
    idle_seconds: float = 20
    patience_seconds: float = 180


def bench_grow(out: str, options: GrowOptions) -> dict[str, Any]:
    """Grades on a cluster that has no node to begin with.

    Args:
        out: directory for `summary.json` and the picture.
        options: what to simulate.

    Returns:
        the summary.

    Raises:
        RuntimeError: the grading fails, or the nodes do not go again.
    """
    files = inputs.read_photographs(None)
    samples: list[tuple[float, int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        bundle, photographs, graded = (
            str(Path(folder, name)) for name in ("bundle", "photographs", "graded")
        )
        with console.status("laying out bundle and photographs"):
            inputs.lay_out_bundle(bundle, None, options.size, files)
            for number in range(options.photographs):
                storage.write(f"{photographs}/{number:06d}.jpg", files[number % len(files)])
        with simulated_cluster({"CPU": options.cpus}, options.nodes, options.idle_seconds) as address:
            started = time.monotonic()

            def sample() -> int:
                progress = read_progress(graded)
                found = (time.monotonic() - started, working_nodes(address), progress.done if progress else 0)
                samples.append(found)
                return found[1]

            sample()
            ended = _grade(bundle, photographs, graded, address, sample, options, Path(folder, "log"))
            while (left := sample()) > 0 and time.monotonic() - started < ended + options.patience_seconds:
                time.sleep(_SAMPLE_S)
            if left:
                raise RuntimeError(f"{left} nodes are still there")
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
    storage.write(storage.join(storage.absolute(out), PICTURE_FILE), _picture(samples, ended, options))
    places = {"summary": SUMMARY_FILE, "picture": PICTURE_FILE}
    show("grow", ratios | {name: storage.join(storage.absolute(out), file) for name, file in places.items()})
    return result


def _grade(
    bundle: str, photographs: str, graded: str, address: str, sample: Any, options: GrowOptions, log: Path
) -> float:
    """Grades in a process of its own; seconds from the start of the cluster to its end."""
    command = [sys.executable, "-m", "jobs.cli", "grade", bundle, photographs, graded, "--device", "cpu"]
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


def _picture(samples: list[tuple[float, int, int]], ended: float, options: GrowOptions) -> bytes:
    """Nodes, and photographs a second, over time."""
    import matplotlib.pyplot as plt
    import numpy as np

    at, nodes, done = (np.array(column, float) for column in zip(*samples, strict=True))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    top.step(at, nodes, where="post", color="#c8541f")
    top.set(ylabel="nodes", ylim=(0, options.nodes + 0.5))
    wide = 10  # seconds: progress is written every few
    marks = np.arange(0, at[-1] + wide, wide)
    graded = np.interp(marks, at, done)
    bottom.step(marks[:-1], np.diff(graded) / wide, where="post", color="#0f766e")
    bottom.set(ylabel="photographs/s", xlabel="seconds", ylim=(0, None))
    for axis in (top, bottom):
        axis.axvline(ended, color="gray", linestyle="--", linewidth=1)
        axis.grid(alpha=0.3)
    top.annotate("the job ends", (ended, options.nodes + 0.3), color="gray", xytext=(4, 0),
                 textcoords="offset points", va="top")  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
