"""`scalp grade`: photographs in a folder, a zip or object storage to Parquet result rows."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.local import connect
from jobs.console import SUMMARY_FILE, console, now, progress_bar, read_json, show, write_json
from jobs.images import Columns, photographs
from jobs.pipeline import ModelOptions, with_logits
from scalp_core import sources, storage
from scalp_core.bundle import Bundle, BundleSpec, load_bundle
from scalp_core.errors import UserError
from scalp_core.manifest import location_id
from scalp_core.results import RESULTS_FOLDER, read_results, result_table
from scalp_core.sources import Location

_MAX_ROWS_A_FILE = 4096
_MIN_ROWS_A_FILE = 64


def grade(bundle: str, source: str, out: str, options: ModelOptions = ModelOptions()) -> dict[str, Any]:  # noqa: B008
    """Grades every photograph of `source` that `out` does not hold yet.

    Args:
        bundle: directory of the bundle, local or `s3://`.
        source: folder, prefix, `.zip`, `.tar` or `.tar.gz`, local or `s3://`.
        out: directory, local or `s3://`; a run that was stopped goes on where it was.

    Returns:
        the summary that is also written to `out/summary.json`.

    Raises:
        UserError: bad input, or rows that are not accounted for at the end.
    """
    out, started = storage.absolute(out), time.monotonic()
    loaded = load_bundle(bundle)
    listing = sources.list_photographs(source)
    version = loaded.spec.version_in(options.precision)
    _check_identity(out, {"model_version": version, "source": storage.absolute(source)})
    done = _committed(out)
    pending = [location for location in listing.photographs if location_id(location) not in done]
    summary = read_json(storage.join(out, SUMMARY_FILE)) or {}
    if not pending and summary.get("rows_unaccounted") == 0:
        console.print(f"{out} is finished: all {summary['rows']} photographs are accounted for")
        return summary
    if done:
        console.print(f"going on: {len(done)} of {len(listing.photographs)} photographs are done already")
    if pending:
        _run(pending, loaded, out, options)
    summary = _summary(out, listing, time.monotonic() - started, loaded.spec, version, len(pending))
    write_json(storage.join(out, SUMMARY_FILE), summary)
    _show(summary, out)
    if summary["rows_unaccounted"]:
        raise UserError(
            f"{summary['rows_unaccounted']} of {summary['rows']} photographs are not accounted for exactly "
            f"once in {out}; run the same command again for those without a row, and with another OUT for "
            "those with more than one"
        )
    return summary


def _check_identity(out: str, identity: dict[str, str]) -> None:
    """One output belongs to one bundle and one source; mixing would make every count a lie."""
    uri = storage.join(out, "run.json")
    known = read_json(uri)
    if known is None:
        write_json(uri, identity)
        return
    for name, value in identity.items():
        if known.get(name) != value:
            raise UserError(
                f"{out} holds results of {name} {known.get(name)}, not {value}; "
                "choose another OUT, or remove it"
            )


def _committed(out: str) -> set[str]:
    folder = storage.join(out, RESULTS_FOLDER)
    return (
        set(read_results(folder, ["image_id"])["image_id"].to_pylist()) if storage.exists(folder) else set()
    )


def _run(pending: list[Location], bundle: Bundle, out: str, options: ModelOptions) -> None:
    cluster = connect()
    version = bundle.spec.version_in(options.precision)
    console.print(f"grading {len(pending)} photographs with {version}")
    per_file = min(_MAX_ROWS_A_FILE, max(_MIN_ROWS_A_FILE, len(pending) // 32))
    written = with_logits(photographs(_input_rows(pending)), bundle, options, cluster).map_batches(
        WriteResults(out, bundle.spec, version), batch_size=per_file, num_cpus=0.5
    )
    graded = failed = 0
    with progress_bar("grading", len(pending)) as (progress, task):
        for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
            graded, failed = graded + int(batch["graded"].sum()), failed + int(batch["failed"].sum())
            progress.update(task, completed=graded + failed, note=f"{failed} failed")


def _input_rows(locations: list[Location]) -> pa.Table:
    columns = {
        "image_id": [location_id(location) for location in locations],
        "uri": [location.uri for location in locations],
        "member": [location.member for location in locations],
    }
    return pa.table(columns, schema=pa.schema({name: pa.string() for name in columns}))


def _summary(
    out: str, listing: sources.Listing, seconds: float, spec: BundleSpec, version: str, pending: int
) -> dict[str, Any]:
    results = read_results(
        storage.join(out, RESULTS_FOLDER), ["image_id", "status", "error_code", "grade_name", "refer"]
    )
    counts = Counter(results["image_id"].to_pylist())
    wanted = {location_id(location) for location in listing.photographs}
    unaccounted = sum(counts[image_id] != 1 for image_id in wanted) + sum(
        name not in wanted for name in counts
    )
    failures = Counter(code for code in results["error_code"].to_pylist() if code)
    grades = Counter(name for name in results["grade_name"].to_pylist() if name)
    return {
        "kind": "grade",
        "date": now(),
        "model_version": version,
        "rows": len(wanted),
        "graded": sum(grades.values()),
        "failed": sum(failures.values()),
        "rows_unaccounted": unaccounted,
        "by_grade": {name: grades[name] for name in spec.grade_names},
        "by_error": dict(failures.most_common()),
        "referred": sum(bool(value) for value in results["refer"].to_pylist()),
        "other_files": listing.other_files,
        "seconds": round(seconds, 1),
        "photographs_per_second": round(pending / seconds, 1),
    }


def _show(summary: dict[str, Any], out: str) -> None:
    names = ("rows", "graded", "failed", "by_error", "by_grade", "referred", "rows_unaccounted", "seconds")
    show("grade", {name: summary[name] for name in names} | {"results": storage.join(out, RESULTS_FOLDER)})


class WriteResults:
    """Writes each batch as one Parquet file, whole or not at all, and returns what is in it."""

    def __init__(self, out: str, spec: BundleSpec, model_version: str) -> None:
        self._out = out
        self._spec = spec
        self._model_version = model_version

    def __call__(self, batch: Columns) -> Columns:
        table = result_table(batch, batch["logits"], self._spec, self._model_version)
        name = f"part-{uuid.uuid4().hex}.parquet"
        storage.write_parquet(storage.join(self._out, RESULTS_FOLDER, name), table)
        failed = table["status"].to_pylist().count("failed")
        return {"graded": np.array([table.num_rows - failed]), "failed": np.array([failed])}
