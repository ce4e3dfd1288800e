"""`bulk`: compare `scalp grade` with its engine alone, plain PyTorch and Daft, on disk and S3."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from joblib import cpu_count
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.measure import write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, show
from jobs.demo_s3 import S3Server, s3_server
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Device, Hardware, resolve_device
from scalp_core.results.schema import RESULTS_FOLDER
from tests.benchmarks.agreement import check_agreement, decided_images
from tests.benchmarks.grade.rivals import Arguments
from tests.support.odd_files import GRADED, corpus
from tests.support.result_rows import read_results

_BAD_SHARE = 0.1
_FOLDERS = 8


@dataclass(frozen=True)
class BulkOptions:
    """Options of `bulk`.

    Args:
        device: Device of the model.
        bundle: Trained bundle; None: untrained weights, which are as fast.
        photographs: Number of synthetic images.
        size: Input size of untrained weights, pixels.
        rounds: Rounds per candidate.
        daft: Whether to measure Daft.
        only: Names of the candidates to measure, with their sources; empty: all.
    """

    device: Device = "auto"
    bundle: str | None = None
    photographs: int = 2000
    size: int = 224
    rounds: int = 2
    daft: bool = True
    only: tuple[str, ...] = ()


@dataclass
class Run:
    """One run of a candidate.

    Args:
        whole_seconds: Seconds from the start of its process to the end.
        steady: Images per second, from the first graded image to the last.
        grades: Grades by file name.
    """

    whole_seconds: float
    steady: float
    grades: dict[str, int]


@dataclass
class _Case:
    """Candidate on one source.

    Args:
        what: Name of the candidate.
        source: Name of the source, such as `local`, `s3` or `s3 zip`.
        turn: Runs it in an empty folder.
        runs: Its runs so far.
        same_grades: Fraction of grades equal to those of `scalp grade`, per run that writes grades.
    """

    what: str
    source: str
    turn: Callable[[Path], Run]
    runs: list[Run] = field(default_factory=list)
    same_grades: list[float] = field(default_factory=list)

    @property
    def steady(self) -> float:
        """Median images per second."""
        return statistics.median(run.steady for run in self.runs)

    @property
    def whole_seconds(self) -> float:
        """Median seconds of whole runs."""
        return statistics.median(run.whole_seconds for run in self.runs)


def bench_bulk(out: str, options: BulkOptions) -> dict[str, Any]:
    """Grade the same images with each candidate, in alternating rounds, each in separate processes.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The bundle or the device is unavailable.
        RuntimeError: A candidate fails, or its grades differ from those of `scalp grade`.
    """
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with console.status("preparing images and bundle"):
            drawn = inputs.read_images(None, options.photographs)
            bundle = inputs.write_bundle(str(root / "bundle"), options.bundle, options.size, drawn)
            decided = decided_images(drawn, str(root / "bundle"), device)
            files = _write_images(root / "photographs", decided, options.photographs)
            bad = _add_bad_files(root, files)
        with s3_server(root / "s3") as server:
            _upload(server, files)
            cases = _cases(root, device, server, len(files), bad, options.daft)
            named = {f"{case.what}, {case.source}": case for case in cases}
            if unknown := set(options.only) - named.keys():
                names = "; ".join(named)
                raise UserError(f"--only {unknown.pop()}: no such candidate; the candidates are {names}")
            _run_rounds([named[name] for name in options.only] or cases, root, options.rounds)
    settings = vars(options) | {
        "only": list(options.only),
        "device": device,
        "weights": bundle.spec.model_version if options.bundle else "untrained",
        "architecture": bundle.spec.architecture,
        "size": bundle.spec.preprocess.size,
        "different_photographs": len(decided),
        "mean_file_bytes": round(statistics.mean(len(data) for data in files.values())),
        "bad_files": bad,
        "daft_version": version("daft") if options.daft else None,
    }
    rows = [_row(case, len(files)) for case in cases]
    result = write_result(out, "bulk", settings, rows, _without_none(ratios(rows)))
    _show(result, out)
    return result


def _without_none(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ratios of `scalp grade` to rivals by whole runs, and to its engine and itself by the steady rate."""
    steady = {(row["what"], row["source"]): row["photographs_per_second"] for row in rows}
    whole = {(row["what"], row["source"]): row["whole_seconds"] for row in rows}
    scalp = ("scalp grade", "local")

    def ratio(values: Mapping[tuple[str, str], float], over: tuple[str, str], under: tuple[str, str]) -> Any:
        return values[over] / values[under] if over in values and under in values else None

    return {
        "vs_engine": ratio(steady, scalp, ("engine alone", "memory")),
        "vs_plain": ratio(whole, ("plain PyTorch fp32", "local"), scalp),
        "vs_tuned": ratio(whole, ("tuned PyTorch", "local"), scalp),
        "vs_daft": ratio(whole, ("Daft, PyTorch", "local"), scalp),
        "vs_daft_s3": ratio(whole, ("Daft, PyTorch", "s3"), ("scalp grade", "s3")),
        "vs_daft_with_our_engine": ratio(whole, ("Daft, our engine", "local"), scalp),
        "steady_vs_daft": ratio(steady, scalp, ("Daft, PyTorch", "local")),
        "steady_vs_daft_with_our_engine": ratio(steady, scalp, ("Daft, our engine", "local")),
        "s3_vs_local": ratio(steady, ("scalp grade", "s3"), scalp),
        "zip_vs_prefix": ratio(steady, ("scalp grade", "s3 zip"), ("scalp grade", "s3")),
        "with_bad_files": ratio(steady, ("scalp grade", "local, 10 % bad files"), scalp),
    }


# --- images ------------------------------------------------------------------------------------------------


def _write_images(folder: Path, images: list[bytes], count: int) -> dict[str, bytes]:
    """Write `count` JPEG files into a few folders, each image about twice; return them by name."""
    files = {f"{index:06d}.jpg": data for index, data in zip(range(count), cycle(images), strict=False)}
    for index, (name, data) in enumerate(files.items()):
        path = folder / f"{index % _FOLDERS:02d}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def _add_bad_files(root: Path, files: dict[str, bytes]) -> int:
    """Make a folder of the images and one ungradable file per nine images; return the number of those."""
    bad = [data for data, outcomes in corpus().values() if GRADED not in outcomes]
    count = round(len(files) * _BAD_SHARE / (1 - _BAD_SHARE))
    for path in sorted((root / "photographs").rglob("*.jpg")):
        link = root / "with bad files" / path.relative_to(root / "photographs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
    for index in range(count):
        # Their names sort between those of the images, so that each shard has some.
        name = f"{index % _FOLDERS:02d}/{index * len(files) // count:06d} bad.jpg"
        (root / "with bad files" / name).write_bytes(bad[index % len(bad)])
    return count


def _upload(server: S3Server, files: dict[str, bytes]) -> None:
    """Upload the images under a prefix and in a zip."""
    os.environ.update(server.environment)
    base = f"s3://{server.bucket}/bulk"
    with console.status("uploading"), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: storage.write(f"{base}/photographs/{item[0]}", item[1]), files.items()))
        with tempfile.NamedTemporaryFile() as file:
            with zipfile.ZipFile(file.name, "w", zipfile.ZIP_STORED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            storage.write(f"{base}/photographs.zip", Path(file.name).read_bytes())


# --- candidates --------------------------------------------------------------------------------------------


def _cases(root: Path, device: Hardware, server: S3Server, count: int, bad: int, daft: bool) -> list[_Case]:
    local, s3 = str(root / "photographs"), f"s3://{server.bucket}/bulk/photographs"
    bundle = str(root / "bundle")

    def scalp(source: str, failed: int = 0) -> Callable[[Path], Run]:
        return partial(run_grade, bundle, source, device, count, failed)

    def rival(way: str, source: str) -> Callable[[Path], Run]:
        return partial(run_rival, way, bundle, source, device, count)

    cases = [
        _Case("engine alone", "memory", rival("engine", local)),
        _Case("scalp grade", "local", scalp(local)),
        _Case("scalp grade", "local, 10 % bad files", scalp(str(root / "with bad files"), bad)),
        _Case("scalp grade", "s3", scalp(s3)),
        _Case("scalp grade", "s3 zip", scalp(f"{s3}.zip")),
        _Case("plain PyTorch fp32", "local", rival("plain", local)),
        _Case("tuned PyTorch", "local", rival("tuned", local)),
    ]
    if daft:
        cases += [
            _Case("Daft, PyTorch", "local", rival("daft_torch", local)),
            _Case("Daft, PyTorch", "s3", rival("daft_torch", s3)),
            _Case("Daft, our engine", "local", rival("daft_engine", local)),
        ]
    return cases


def run_grade(bundle: str, source: str, device: Hardware, count: int, failed: int, folder: Path) -> Run:
    """Run the `scalp grade` command, without the heatmaps of its report, which no rival makes."""
    out = str(folder / "out")
    command = ["-m", "jobs.cli", "grade", bundle, source, out, "--device", device, "--heatmaps", "0"]
    whole = _seconds(command)
    summary = read_json(storage.join(out, SUMMARY_FILE)) or {}
    if (summary["graded"], summary["failed"]) != (count, failed):
        raise RuntimeError(f"{source}: {summary['graded']} graded and {summary['failed']} failed")
    rows = read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()
    good = [row for row in rows if row["status"] == "graded"]
    grades = {(row["member"] or row["uri"]).rsplit("/", 1)[-1]: row["grade"] for row in good}
    times = [row["graded_at"].timestamp() for row in good]  # one per shard
    # From about when each model has committed its first shard.
    first = sorted(set(times))[summary["settings"]["models"][1] - 1]
    return Run(whole, sum(time > first for time in times) / (max(times) - first), grades)


def run_rival(way: str, bundle: str, source: str, device: Hardware, count: int, folder: Path) -> Run:
    """Run a candidate of `rivals`; `grades` is empty if it writes none."""
    arguments = Arguments(bundle=bundle, source=source, out=str(folder), device=device, cores=cpu_count())
    whole = _seconds(["-m", "tests.benchmarks.grade.rivals", way, arguments.model_dump_json()])
    points = [line.split() for line in arguments.points_file.read_text().splitlines()]
    first, last = float(points[0][0]), float(points[-1][0])
    if (done := sum(int(graded) for _, graded in points)) != count:
        raise RuntimeError(f"{way} graded {done} of {count} images")
    steady = (done - int(points[0][1])) / (last - first)
    rows = folder / "rows.parquet"
    grades = {}
    if rows.exists():
        table = pq.read_table(rows, columns=["uri", "grade"])
        names = (uri.rsplit("/", 1)[-1] for uri in table["uri"].to_pylist())
        grades = dict(zip(names, table["grade"].to_pylist(), strict=True))
    return Run(whole, steady, grades)


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    # A separate Ray, and no telemetry of Daft.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=environment | {"DO_NOT_TRACK": "true"},
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return seconds


def _run_rounds(cases: list[_Case], root: Path, rounds: int) -> None:
    reference: dict[str, int] = {}
    with progress_bar("grading", rounds * len(cases)) as (progress, task):
        for number in range(rounds):
            for place, case in enumerate(cases):
                progress.update(task, note=f"{case.what}, {case.source}")
                with tempfile.TemporaryDirectory(dir=root, prefix=f"{number}-{place}-") as folder:
                    run = case.turn(Path(folder))
                if run.grades:
                    reference = reference or run.grades
                    what = f"{case.what}, {case.source}"
                    case.same_grades.append(check_agreement(what, run.grades, reference))
                case.runs.append(run)
                progress.update(task, advance=1)


def _row(case: _Case, count: int) -> dict[str, Any]:
    return {
        "what": case.what,
        "source": case.source,
        "photographs_per_second": round(case.steady, 1),
        "of_each_run": [round(run.steady, 1) for run in case.runs],
        "whole_seconds": round(case.whole_seconds, 1),
        "of_each_whole_run": [round(run.whole_seconds, 1) for run in case.runs],
        # All but grading at the steady rate: start, listing, end.
        "start_up_seconds": round(case.whole_seconds - count / case.steady, 1),
        "same_grades": min(case.same_grades, default=None),
    }


def _show(result: dict[str, Any], out: str) -> None:
    count = result["settings"]["photographs"]
    table = Table("what", "source", title=f"{count:,} images", title_justify="left", title_style="bold")
    for heading in ("images/s, steady", "seconds, whole", "of which start-up"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        numbers = (row["photographs_per_second"], row["whole_seconds"], row["start_up_seconds"])
        table.add_row(row["what"], row["source"], *(f"{number:.1f}" for number in numbers))
    console.print(table)
    measured = result["ratios"]
    show("ratios", measured | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
