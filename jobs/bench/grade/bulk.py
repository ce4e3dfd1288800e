"""`scalp bench bulk`: `scalp grade` beside the bare engine, a plain loop and Daft, from disk and from S3."""

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
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from joblib import cpu_count
from rich.table import Table

from cluster.testing.local_s3 import S3Server, s3_server
from jobs.bench import inputs
from jobs.bench.grade.rivals import Arguments
from jobs.bench.measure import write_result
from jobs.bench.odd_files import GRADED, corpus
from jobs.common.console import SUMMARY_FILE, console, progress_bar, read_json, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, Hardware, resolve_device
from scalp_core.results.schema import RESULTS_FOLDER, read_results
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

_BAD_SHARE = 0.1
_FOLDERS = 8
# Other decoders and precisions move answers that are near a limit, of random weights one in eight; other work
# would agree by chance.
_LEAST_SAME = 0.75


@dataclass(frozen=True)
class BulkOptions:
    """What to measure.

    Args:
        device: where the model runs.
        bundle: a trained one; None takes untrained weights, which are as fast.
        photographs: synthetic ones.
        size: side of the input of untrained weights, pixels.
        rounds: turns that each way gets.
        daft: whether to run Daft.
    """

    device: Device = "auto"
    bundle: str | None = None
    photographs: int = 2000
    size: int = 224
    rounds: int = 2
    daft: bool = True


@dataclass
class Run:
    """One run of a way.

    Args:
        whole_seconds: from the start of its process to the end.
        steady: photographs that were graded a second, from the first of them to the last.
        grades: by the file's name.
    """

    whole_seconds: float
    steady: float
    grades: dict[str, int]


@dataclass
class _Case:
    """A way on a source.

    Args:
        what: names it.
        source: local, `s3` or `s3 zip`.
        turn: runs it, in an empty folder.
    """

    what: str
    source: str
    turn: Callable[[Path], Run]
    runs: list[Run] = field(default_factory=list)

    @property
    def steady(self) -> float:
        return statistics.median(run.steady for run in self.runs)

    @property
    def whole_seconds(self) -> float:
        return statistics.median(run.whole_seconds for run in self.runs)


def bench_bulk(out: str, options: BulkOptions) -> dict[str, Any]:
    """Grades the same photographs in every way, in turns, each in processes of its own.

    Args:
        out: directory for `summary.json`.
        options: what to measure.

    Returns:
        the summary.

    Raises:
        UserError: the bundle or the device cannot be had.
        RuntimeError: a way fails, or comes to other grades than `scalp grade`.
    """
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with console.status("laying out photographs and bundle"):
            files = _draw(root / "photographs", options.photographs)
            sample = inputs.read_photographs(str(root / "photographs"))
            bundle = inputs.lay_out_bundle(str(root / "bundle"), options.bundle, options.size, sample)
            bad = _with_bad_files(root, files)
        with s3_server(root / "s3") as server:
            _upload(server, files)
            cases = _cases(root, device, server, len(files), bad, options.daft)
            _take_turns(cases, root, options.rounds)
    settings = vars(options) | {
        "device": device,
        "weights": bundle.spec.model_version if options.bundle else "untrained",
        "architecture": bundle.spec.architecture,
        "size": bundle.spec.preprocess.size,
        "mean_file_bytes": round(statistics.mean(len(data) for data in files.values())),
        "bad_files": bad,
        "daft_version": version("daft") if options.daft else None,
    }
    rows = [_row(case, len(files)) for case in cases]
    result = write_result(out, "bulk", settings, rows, ratios(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """How `scalp grade` compares with others by whole runs, with the engine and itself by the steady rate."""
    steady = {(row["what"], row["source"]): row["photographs_per_second"] for row in rows}
    whole = {(row["what"], row["source"]): row["whole_seconds"] for row in rows}
    ours = ("scalp grade", "local")

    def ratio(values: Mapping[tuple[str, str], float], over: tuple[str, str], under: tuple[str, str]) -> Any:
        return values[over] / values[under] if over in values and under in values else None

    return {
        "vs_engine": ratio(steady, ours, ("engine alone", "memory")),
        "vs_plain": ratio(whole, ("plain PyTorch fp32", "local"), ours),
        "vs_tuned": ratio(whole, ("tuned PyTorch", "local"), ours),
        "vs_daft": ratio(whole, ("Daft, PyTorch", "local"), ours),
        "vs_daft_s3": ratio(whole, ("Daft, PyTorch", "s3"), ("scalp grade", "s3")),
        "vs_daft_with_our_engine": ratio(whole, ("Daft, our engine", "local"), ours),
        "steady_vs_daft": ratio(steady, ours, ("Daft, PyTorch", "local")),
        "steady_vs_daft_with_our_engine": ratio(steady, ours, ("Daft, our engine", "local")),
        "s3_vs_local": ratio(steady, ("scalp grade", "s3"), ours),
        "zip_vs_prefix": ratio(steady, ("scalp grade", "s3 zip"), ("scalp grade", "s3")),
        "with_bad_files": ratio(steady, ("scalp grade", "local, 10 % bad files"), ours),
    }


# --- photographs -------------------------------------------------------------------------------------------


def _draw(folder: Path, count: int) -> dict[str, bytes]:
    """Writes JPEG files into a few folders, and returns them by their names."""
    with tempfile.TemporaryDirectory() as drawn:
        write_dataset(Path(drawn), SynthOptions(images=count))
        found = sorted(Path(drawn).rglob("*.jpg"))
        files = {f"{index:06d}.jpg": path.read_bytes() for index, path in enumerate(found)}
    for index, (name, data) in enumerate(files.items()):
        path = folder / f"{index % _FOLDERS:02d}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def _with_bad_files(root: Path, files: dict[str, bytes]) -> int:
    """A folder of the photographs and, for every nine, a file that cannot be graded; how many of these."""
    bad = [data for data, outcomes in corpus().values() if GRADED not in outcomes]
    count = round(len(files) * _BAD_SHARE / (1 - _BAD_SHARE))
    for path in sorted((root / "photographs").rglob("*.jpg")):
        link = root / "with bad files" / path.relative_to(root / "photographs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
    for index in range(count):
        # Their names lie between those of the photographs, so that every shard has some.
        name = f"{index % _FOLDERS:02d}/{index * len(files) // count:06d} bad.jpg"
        (root / "with bad files" / name).write_bytes(bad[index % len(bad)])
    return count


def _upload(server: S3Server, files: dict[str, bytes]) -> None:
    """The photographs under a prefix and in a zip."""
    os.environ.update(server.environment)
    base = f"s3://{server.bucket}/bulk"
    with console.status("uploading"), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: storage.write(f"{base}/photographs/{item[0]}", item[1]), files.items()))
        with tempfile.NamedTemporaryFile() as file:
            with zipfile.ZipFile(file.name, "w", zipfile.ZIP_STORED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            storage.write(f"{base}/photographs.zip", Path(file.name).read_bytes())


# --- ways --------------------------------------------------------------------------------------------------


def _cases(
    root: Path, device: Hardware, server: S3Server, photographs: int, bad: int, daft: bool
) -> list[_Case]:
    local, s3 = str(root / "photographs"), f"s3://{server.bucket}/bulk/photographs"
    bundle = str(root / "bundle")

    def ours(source: str, failed: int = 0) -> Callable[[Path], Run]:
        return partial(run_grade, bundle, source, device, photographs, failed)

    def other(way: str, source: str) -> Callable[[Path], Run]:
        return partial(run_other, way, bundle, source, device, photographs)

    cases = [
        _Case("engine alone", "memory", other("engine", local)),
        _Case("scalp grade", "local", ours(local)),
        _Case("scalp grade", "local, 10 % bad files", ours(str(root / "with bad files"), bad)),
        _Case("scalp grade", "s3", ours(s3)),
        _Case("scalp grade", "s3 zip", ours(f"{s3}.zip")),
        _Case("plain PyTorch fp32", "local", other("plain", local)),
        _Case("tuned PyTorch", "local", other("tuned", local)),
    ]
    if daft:
        cases += [
            _Case("Daft, PyTorch", "local", other("daft_torch", local)),
            _Case("Daft, PyTorch", "s3", other("daft_torch", s3)),
            _Case("Daft, our engine", "local", other("daft_engine", local)),
        ]
    return cases


def run_grade(bundle: str, source: str, device: Hardware, photographs: int, failed: int, folder: Path) -> Run:
    """`scalp grade` as a user starts it, but for the heatmaps in its report, which nobody else makes."""
    out = str(folder / "out")
    command = ["-m", "jobs.cli", "grade", bundle, source, out, "--device", device, "--heatmaps", "0"]
    whole = _seconds(command)
    summary = read_json(storage.join(out, SUMMARY_FILE)) or {}
    if (summary["graded"], summary["failed"]) != (photographs, failed):
        raise RuntimeError(f"{source}: {summary['graded']} graded and {summary['failed']} failed")
    rows = read_results(storage.join(out, RESULTS_FOLDER)).to_pylist()
    good = [row for row in rows if row["status"] == "graded"]
    grades = {(row["member"] or row["uri"]).rsplit("/", 1)[-1]: row["grade"] for row in good}
    times = [row["graded_at"].timestamp() for row in good]  # one for each shard
    # Counted from when every model has ended its first shard, about.
    first = sorted(set(times))[summary["settings"]["models"][1] - 1]
    return Run(whole, sum(time > first for time in times) / (max(times) - first), grades)


def run_other(way: str, bundle: str, source: str, device: Hardware, photographs: int, folder: Path) -> Run:
    """A way of `bulk_ways`; without grades where it writes none."""
    arguments = Arguments(bundle=bundle, source=source, out=str(folder), device=device, cores=cpu_count())
    whole = _seconds(["-m", "jobs.bench.grade.rivals", way, arguments.model_dump_json()])
    points = [line.split() for line in arguments.points_file.read_text().splitlines()]
    first, last = float(points[0][0]), float(points[-1][0])
    if (done := sum(int(count) for _, count in points)) != photographs:
        raise RuntimeError(f"{way} graded {done} of {photographs} photographs")
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
    # A Ray of its own, and no reports of Daft's.
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


def _take_turns(cases: list[_Case], root: Path, rounds: int) -> None:
    reference: dict[str, int] = {}
    with progress_bar("grading", rounds * len(cases)) as (progress, task):
        for number in range(rounds):
            for place, case in enumerate(cases):
                progress.update(task, note=f"{case.what}, {case.source}")
                with tempfile.TemporaryDirectory(dir=root, prefix=f"{number}-{place}-") as folder:
                    run = case.turn(Path(folder))
                if run.grades:
                    reference = reference or run.grades
                    _check_same(case, run.grades, reference)
                case.runs.append(run)
                progress.update(task, advance=1)


def _check_same(case: _Case, grades: dict[str, int], reference: dict[str, int]) -> None:
    """Whoever does something else has no place in the table."""
    if grades.keys() != reference.keys():
        raise RuntimeError(f"{case.what}, {case.source}: other photographs than scalp grade")
    if (same := _same(grades, reference)) < _LEAST_SAME:
        raise RuntimeError(f"{case.what}, {case.source}: {same:.1%} of the grades are those of scalp grade")


def _same(grades: dict[str, int], reference: dict[str, int]) -> float:
    return statistics.mean(grades[name] == grade for name, grade in reference.items())


def _row(case: _Case, photographs: int) -> dict[str, Any]:
    return {
        "what": case.what,
        "source": case.source,
        "photographs_per_second": round(case.steady, 1),
        "of_each_run": [round(run.steady, 1) for run in case.runs],
        "whole_seconds": round(case.whole_seconds, 1),
        "of_each_whole_run": [round(run.whole_seconds, 1) for run in case.runs],
        # Everything but grading at the steady rate: starting, listing, the end.
        "start_up_seconds": round(case.whole_seconds - photographs / case.steady, 1),
    }


def _show(result: dict[str, Any], out: str) -> None:
    count = result["settings"]["photographs"]
    table = Table("what", "source", title=f"{count:,} photographs", title_justify="left", title_style="bold")
    for heading in ("photographs/s, steady", "seconds, whole", "of them start-up"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        numbers = (row["photographs_per_second"], row["whole_seconds"], row["start_up_seconds"])
        table.add_row(row["what"], row["source"], *(f"{number:.1f}" for number in numbers))
    console.print(table)
    found = {name: value for name, value in result["ratios"].items() if value is not None}
    show("ratios", found | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
