"""`scale`: measure throughput and memory of `scalp prepare` against the number of objects."""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from joblib import cpu_count
from rich.table import Table

from jobs.bench.measure import OwnProcess, write_result
from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, console, progress_bar, show
from jobs.data.prepare import prepare
from scalp_core import storage
from scalp_core.curation import audit
from tests.benchmarks.grade.simulated_source import (
    HashModel,
    fit_hashes,
    image_names,
    lay_out_roots,
    prepare_simulated,
    write_examined,
)


@dataclass(frozen=True)
class ScaleOptions:
    """Options of `scale`.

    Args:
        objects: Numbers of images of the runs; JPEG files of 640x480 on the local disk.
        simulated: Objects of one more run, whose tasks read no files; 0: no run.
        audited: Simulated objects of one audit, without the steps before it; 0: no audit.
    """

    objects: tuple[int, ...] = (1_000, 10_000, 100_000)
    simulated: int = 1_000_000
    audited: int = 0


def bench_scale(out: str, options: ScaleOptions) -> dict[str, Any]:
    """Prepare sources of growing size, each in a separate process with its own Ray.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.
    """
    sizes = sorted(options.objects)
    model = fit_hashes() if options.simulated or options.audited else None
    with tempfile.TemporaryDirectory() as root:
        source = Path(root, "source")
        size_bytes = _write_images(source, sizes[-1])
        rows = [_run(f"{number:,} images", number, _link_first(source, number), root) for number in sizes]
        shutil.rmtree(source)
        if options.simulated:
            folders = Path(root, "simulated")
            lay_out_roots(folders)
            rows.append(_run(f"{options.simulated:,} simulated", options.simulated, folders, root, model))
        audits = [_run_audit(options.audited, root, model)] if options.audited and model else []
    settings = {"mean_file_bytes": size_bytes, "picture": "640x480", **vars(options)}
    result = write_result(out, "scale", settings, rows, ratios(rows), audits=audits)
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of rate and memory of the largest source, and of the simulated one, to the smallest source."""
    first, *_, last = [row for row in rows if not row["simulated"]] * 2
    compared = {
        "rate_last_vs_first": last["objects_per_second"] / first["objects_per_second"],
        "driver_memory_last_vs_first": last["driver_peak_mib"] / first["driver_peak_mib"],
    }
    for row in rows:
        if row["simulated"]:
            compared["driver_memory_simulated_vs_first"] = row["driver_peak_mib"] / first["driver_peak_mib"]
    return compared


def _run(what: str, number: int, source: Path, root: str, model: HashModel | None = None) -> dict[str, Any]:
    console.print(f"preparing {what}")
    own = OwnProcess()
    try:
        summary = own.call(_prepare, str(source), str(Path(root, f"out{number}")), number, model)
        driver_mib = own.call(provenance.peak_mib)
    finally:
        own.close()
    stages = summary["seconds_of_stages"]
    return {
        "part": "prepare",
        "what": what,
        "simulated": model is not None,
        "objects": summary["objects_listed"],
        "photographs": summary["photographs"],
        "seconds": summary["seconds"],
        "seconds_of_stages": stages,
        "objects_per_second": round(summary["objects_listed"] / summary["seconds"], 3),
        "examined_per_second": round(summary["objects_listed"] / max(stages["examine"], 0.1), 1),
        "driver_peak_mib": driver_mib,
        "audit_peak_mib": summary["peak_mib"]["audit"],
    }


def _run_audit(number: int, root: str, model: HashModel) -> dict[str, Any]:
    """Audit simulated examined shards in a separate process."""
    console.print(f"auditing {number:,} simulated objects")
    examined = str(Path(root, "examined"))
    write_examined(examined, number, model)
    own = OwnProcess()
    try:
        started = time.perf_counter()
        options = audit.Options()
        result = own.call(audit.audit, examined, "/simulated", str(Path(root, "audited")), options)
        seconds = time.perf_counter() - started
        peak_mib = own.call(provenance.peak_mib)
    finally:
        own.close()
    return {
        "part": "audit",
        "what": f"{number:,} simulated",
        "objects": number,
        "photographs": result["spec"]["photographs"],
        "near_duplicates": result["findings"]["near_duplicate"],
        "crowded": result["findings"]["crowded_hash"],
        "seconds": round(seconds, 1),
        "audit_peak_mib": peak_mib,
    }


def _prepare(source: str, out: str, number: int, model: HashModel | None) -> dict[str, Any]:
    return prepare(source, out) if model is None else prepare_simulated(source, out, number, model)


# --- images ----------------------------------------------------------------------------------------------


def _write_images(source: Path, number: int) -> int:
    """Write distinct JPEG files; return their mean size in bytes."""
    workers = cpu_count()
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        progress_bar("generating", workers) as (progress, task),
    ):
        sizes = []
        for size in pool.map(_write_share, [str(source)] * workers, [number] * workers, range(workers)):
            sizes.append(size)
            progress.update(task, advance=1)
    return round(sum(sizes) / number)


def _write_share(source: str, number: int, share: int) -> int:
    total = 0
    for index, name in image_names(number, cpu_count(), share):
        path = Path(source, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _make_jpeg(index)
        path.write_bytes(data)
        total += len(data)
    return total


def _make_jpeg(seed: int) -> bytes:
    """JPEG of 640x480 with smooth colors, different for each seed."""
    coarse = np.random.default_rng(seed).integers(60, 220, (12, 16, 3), dtype=np.uint8)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom))
    result = ImageData(640, 480, PixelType.U8x3)
    Resizer().resize(ImageData(16, 12, PixelType.U8x3, coarse.tobytes()), result, options)
    return simplejpeg.encode_jpeg(np.frombuffer(result.get_buffer(), np.uint8).reshape(480, 640, 3), 88)


def _link_first(source: Path, number: int) -> Path:
    """Make a folder of hard links to the first `number` images."""
    folder = source.with_name(f"source{number}")
    for _, name in image_names(number):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(source / name)
    return folder


def _show(result: dict[str, Any], out: str) -> None:
    table = Table(
        "", "seconds", "objects/s", "driver, MiB", "audit, MiB", title="prepare", title_justify="left"
    )
    for row in result["rows"]:
        table.add_row(
            row["what"], f"{row['seconds']:.1f}", f"{row['objects_per_second']:,.0f}",
            f"{row['driver_peak_mib']:.0f}", f"{row['audit_peak_mib']:.0f}",
        )  # fmt: skip
    for row in result["audits"]:
        table.add_row(
            f"audit of {row['what']}", f"{row['seconds']:.1f}",
            f"{row['objects'] / row['seconds']:,.0f}", "", f"{row['audit_peak_mib']:.0f}",
        )  # fmt: skip
    console.print(table)
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
