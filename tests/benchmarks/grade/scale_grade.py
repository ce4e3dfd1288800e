"""`scale --stage grade`: measure the overhead of `scalp grade` against the number of images."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.measure import OwnProcess, write_result
from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, console, show
from jobs.common.inference import ModelOptions
from jobs.grade.driver import GradeOptions, Shared, grade
from scalp_core import storage
from scalp_core.grades import NUM_GRADES

SIDE = 32  # of images and of the model's input, pixels: decoding takes almost no time
_FILES = 256
_FILES_PER_FOLDER = 10_000
_AHEAD = 6  # shards that wait per model


@dataclass(frozen=True)
class GradeScaleOptions:
    """Options of `scale --stage grade`.

    Args:
        photographs: Numbers of images of the runs; links to a few tiny JPEG files on the local disk.
    """

    photographs: tuple[int, ...] = (10_000, 100_000, 1_000_000)


class NullModel:
    """Model that takes no time; its answers differ between images."""

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits of uint8 (N, side, side, 3), float32 (N, 4): values of four pixels."""
        return images[:, 0, :NUM_GRADES, 0].astype(np.float32) / 64


def make_null_model(_bundle: Shared, _options: ModelOptions, _threads: int) -> NullModel:
    """Replace `make_predictor` of `jobs.grade.driver`; `scalp grade` has no option for it."""
    return NullModel()


def bench_grade_scale(out: str, options: GradeScaleOptions) -> dict[str, Any]:
    """Grade sources of growing size, each in a separate process with its own Ray.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.
    """
    sizes = sorted(options.photographs)
    with tempfile.TemporaryDirectory() as root:
        with console.status("preparing images and bundle"):
            files = tiny_jpegs()
            inputs.write_bundle(str(Path(root, "bundle")), None, SIDE, files)
        rows = []
        for number in sizes:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                link_images(Path(folder, "source"), files, number)
                rows.append(_run(str(Path(root, "bundle")), folder, number))
    settings = {"side": SIDE, "model": "null", **vars(options)}
    result = write_result(out, "scale-grade", settings, rows, ratios(rows), overhead=overhead(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of rate and memory of the largest run to the smallest, and of the highest rate to the lowest."""

    def last_to_first(name: str) -> float:
        return rows[-1][name] / rows[0][name]

    def highest_to_lowest(name: str) -> float:
        values = [row[name] for row in rows]
        return max(values) / min(values)

    return {
        "rate_last_vs_first": last_to_first("rows_per_second"),
        "rate_most_vs_least": highest_to_lowest("rows_per_second"),
        "driver_memory_last_vs_first": last_to_first("driver_peak_mib"),
    }


def overhead(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds per additional image from one run to the next, with listing and gathering."""
    return {
        f"{fewer['rows']:,} to {more['rows']:,}": round(
            (more["whole_seconds"] - fewer["whole_seconds"]) / (more["rows"] - fewer["rows"]) * 1e6, 1
        )
        for fewer, more in pairwise(rows)
    }


def tiny_jpegs() -> list[bytes]:
    """Make a few different JPEG files."""
    return [_tiny_jpeg(seed) for seed in range(_FILES)]


def _tiny_jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, 60)


def link_images(source: Path, files: list[bytes], number: int) -> None:
    """Make a source of `number` hard links to a few files; ext4 allows 65,000 links per file."""
    kept = source / "kept"
    kept.mkdir(parents=True)
    for seed, data in enumerate(files):
        (kept / f"{seed}.bin").write_bytes(data)
    for start in range(0, number, _FILES_PER_FOLDER):
        folder = source / f"{start // _FILES_PER_FOLDER:04d}"
        folder.mkdir()
        for index in range(start, min(number, start + _FILES_PER_FOLDER)):
            os.link(kept / f"{index % len(files)}.bin", folder / f"{index:07d}.jpg")


def _run(bundle: str, folder: str, number: int) -> dict[str, Any]:
    console.print(f"grading {number:,} images")
    own = OwnProcess()
    try:
        started = time.perf_counter()
        summary = own.call(_grade, bundle, f"{folder}/source", f"{folder}/out")
        whole = time.perf_counter() - started
        driver_mib = own.call(provenance.peak_mib)
    finally:
        own.close()
    if (summary["rows"], summary["rows_unaccounted"]) != (number, 0):
        raise RuntimeError(f"{summary['rows']:,} of {number:,} images are accounted for")
    first_s, first, last_s, last = _steady(summary)
    return {
        "rows": number,
        "rows_per_second": round((last - first) / (last_s - first_s), 1),
        "whole_seconds": round(whole, 1),
        "seconds_of_stages": summary["seconds_of_stages"],
        "driver_peak_mib": driver_mib,
    }


def _steady(summary: dict[str, Any]) -> tuple[float, int, float, int]:
    """First and last point (seconds, images), without images that were loaded while the models started."""
    settings = summary["settings"]
    loaded = settings["shard_size"] * (_AHEAD * settings["models"][1] + settings["loaders"])
    points = [point for point in summary["throughput"] if point[1] > 0]
    first_s, first, _ = next((point for point in points if point[1] >= loaded), points[0])
    last_s, last, _ = points[-1]
    return first_s, first, last_s, last


def _grade(bundle: str, source: str, out: str) -> dict[str, Any]:
    options = GradeOptions(ModelOptions(device="cpu"), heatmaps=0)
    return grade(bundle, source, out, options, make_null_model)


def _show(result: dict[str, Any], out: str) -> None:
    table = Table(title="grade, with a model that takes no time", title_justify="left", title_style="bold")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "images": lambda row: f"{row['rows']:,}",
        "images/s": lambda row: f"{row['rows_per_second']:,.0f}",
        "whole, seconds": lambda row: f"{row['whole_seconds']:.1f}",
        "list": lambda row: f"{row['seconds_of_stages']['list']:.1f}",
        "grade": lambda row: f"{row['seconds_of_stages']['grade']:.1f}",
        "gather": lambda row: f"{row['seconds_of_stages']['gather']:.1f}",
        "driver, MiB": lambda row: f"{row['driver_peak_mib']:.0f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in result["rows"]:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)
    show("microseconds per additional image", result["overhead"])
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
