"""`nodes`: rate of `scalp grade` on 1, 2 and 4 simulated nodes, with a model that takes a fixed time.

Nodes are simulated on this machine. The model sleeps, so its time is the same on any number of nodes, and the
rest of a shard's work shares the cores of this machine: the efficiency is a lower bound.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from jobs.common.inference import ModelOptions
from jobs.grade.driver import GradeOptions, Shared, grade
from jobs.grade.planning import PoolOptions
from scalp_core import storage
from tests.benchmarks.grade.scale_grade import SIDE, NullModel, link_images, tiny_jpegs
from tests.support.simulated_cluster import simulated_cluster

_IDLE_S = 60


@dataclass(frozen=True)
class NodesOptions:
    """Options of `nodes`.

    Args:
        nodes: Numbers of nodes of the runs; each node has one model.
        photographs: Number of images, the same in all runs.
        shard_size: Images per shard.
        shard_seconds: Time of the model per shard.
        cpus: CPUs per node: one for the model, the others for loading tasks.
    """

    nodes: tuple[int, ...] = (1, 2, 4)
    photographs: int = 12_800
    shard_size: int = 64
    shard_seconds: float = 0.4
    cpus: int = 3


class SleepingModel(NullModel):
    """Model that takes a fixed time per call."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def logits(self, images: np.ndarray) -> np.ndarray:
        time.sleep(self._seconds)
        return super().logits(images)


def make_sleeping_model(
    seconds: float, _bundle: Shared, _options: ModelOptions, _threads: int
) -> SleepingModel:
    """Replace `make_predictor` of `jobs.grade.driver`, with `seconds` bound."""
    return SleepingModel(seconds)


def bench_nodes(out: str, options: NodesOptions) -> dict[str, Any]:
    """Grade the same images on each number of nodes, each in a separate simulated cluster.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.
    """
    with tempfile.TemporaryDirectory() as root:
        with console.status("preparing images and bundle"):
            files = tiny_jpegs()
            inputs.write_bundle(str(Path(root, "bundle")), None, SIDE, files)
            link_images(Path(root, "source"), files, options.photographs)
        rows = [_run(root, number, options) for number in options.nodes]
    result = write_result(out, "nodes", vars(options), rows, ratios(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Efficiency: rate of each run per node, to the rate per node of the first run."""
    first = rows[0]["rows_per_second"] / rows[0]["nodes"]
    return {
        f"efficiency_{row['nodes']}_nodes": round(row["rows_per_second"] / row["nodes"] / first, 3)
        for row in rows[1:]
    }


def _run(root: str, number: int, options: NodesOptions) -> dict[str, Any]:
    console.print(f"grading on {number} nodes")
    out = f"{root}/out-{number}"
    with simulated_cluster({"CPU": options.cpus}, number, _IDLE_S) as address:
        os.environ["RAY_ADDRESS"] = address
        own = OwnProcess()
        try:
            summary = own.call(_grade, f"{root}/bundle", f"{root}/source", out, number, options)
        finally:
            own.close()
            del os.environ["RAY_ADDRESS"]
    if (summary["rows"], summary["rows_unaccounted"]) != (options.photographs, 0):
        raise RuntimeError(f"{summary['rows']:,} of {options.photographs:,} images are accounted for")
    # From the first committed shards of each model to the last one.
    points = [point for point in summary["throughput"] if point[1] >= number * options.shard_size]
    (first_s, first, _), (last_s, last, _) = points[0], points[-1]
    return {
        "nodes": number,
        "rows_per_second": round((last - first) / (last_s - first_s), 1),
        "of_the_models": round(number * options.shard_size / options.shard_seconds, 1),
        "seconds_of_stages": summary["seconds_of_stages"],
    }


def _grade(bundle: str, source: str, out: str, number: int, options: NodesOptions) -> dict[str, Any]:
    pool = PoolOptions(models=(number, number), cpus_per_model=1, shard_size=options.shard_size)
    model = ModelOptions(device="cpu", batch_size=options.shard_size)
    make_model = partial(make_sleeping_model, options.shard_seconds)
    return grade(bundle, source, out, GradeOptions(model, pool, heatmaps=0), make_model)


def _show(result: dict[str, Any], out: str) -> None:
    table = Table(title="grade, one model of a fixed time per node", title_justify="left", title_style="bold")
    for heading in ("nodes", "images/s", "of the models alone", "grade, seconds"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["nodes"]), f"{row['rows_per_second']:,.0f}", f"{row['of_the_models']:,.0f}",
            f"{row['seconds_of_stages']['grade']:.1f}",
        )  # fmt: skip
    console.print(table)
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
