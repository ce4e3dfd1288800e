"""`scalp bench scale`: what grows with the number of objects, and what must not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from rich.table import Table

from jobs.bench.measure import OwnProcess, write_result
from jobs.console import SUMMARY_FILE, console, progress_bar, show
from jobs.prepare import prepare
from jobs.shards import EXAMINED, LISTED, ExamineShard, ListRoots, write_listed
from scalp_core import aihub, inventory, near_duplicates, parquet, storage
from scalp_core.grades import GRADE_NAMES_KO, SYMPTOMS

_SHARES = (0.05, 0.35, 0.43, 0.17)  # of the grades, about as in the paper
_DEVICES = 100
_SHOTS = 5
_FOLDERS = 64
_START_MS = int(datetime(2020, 10, 13, tzinfo=UTC).timestamp() * 1000)


@dataclass(frozen=True)
class ScaleOptions:
    """What to measure.

    Args:
        objects: photographs, from small to large; JPEG files of 640x480 on this disk.
        simulated: objects of one more run whose tasks read no files; 0 for none.
    """

    objects: tuple[int, ...] = (1_000, 10_000, 100_000)
    simulated: int = 1_000_000


def bench_scale(out: str, options: ScaleOptions) -> dict[str, Any]:
    """Prepares sources of growing size, each in a process of its own with a Ray of its own.

    Args:
        out: directory for `summary.json`.
        options: what to measure.

    Returns:
        the summary.
    """
    sizes = sorted(options.objects)
    with tempfile.TemporaryDirectory() as root:
        source = Path(root, "source")
        size_bytes = _draw(source, sizes[-1])
        rows = [_run(f"{number:,} photographs", number, _part_of(source, number), root) for number in sizes]
        if options.simulated:
            folders = Path(root, "simulated")
            for number in range(_FOLDERS):
                (folders / f"{number:02d}").mkdir(parents=True)
                (folders / f"{number:02d}" / "listed.by.none").touch()
            rows.append(_run(f"{options.simulated:,} simulated", options.simulated, folders, root, True))
    settings = {"mean_file_bytes": size_bytes, "picture": "640x480", **vars(options)}
    result = write_result(out, "scale", settings, rows, ratios(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How rate and memory of the largest source on disk, and of the simulated one, compare with the least."""
    first, *_, last = [row for row in rows if not row["simulated"]] * 2
    found = {
        "rate_last_vs_first": last["objects_per_second"] / first["objects_per_second"],
        "driver_memory_last_vs_first": last["driver_peak_mib"] / first["driver_peak_mib"],
    }
    for row in rows:
        if row["simulated"]:
            found["driver_memory_simulated_vs_first"] = row["driver_peak_mib"] / first["driver_peak_mib"]
    return found


def _run(what: str, number: int, source: Path, root: str, simulated: bool = False) -> dict[str, Any]:
    console.print(f"preparing {what}")
    own = OwnProcess(_nothing)
    try:
        summary = own.call(_prepare, str(source), str(Path(root, f"out{number}")), number, simulated)
        driver_mib = own.peak_mib()
    finally:
        own.close()
    stages = summary["seconds_of_stages"]
    return {
        "part": "prepare",
        "what": what,
        "simulated": simulated,
        "objects": summary["objects_listed"],
        "photographs": summary["photographs"],
        "seconds": summary["seconds"],
        "seconds_of_stages": stages,
        "objects_per_second": round(summary["objects_listed"] / summary["seconds"], 3),
        "examined_per_second": round(summary["objects_listed"] / max(stages["examine"], 0.1), 1),
        "driver_peak_mib": driver_mib,
        "audit_peak_mib": summary["peak_mib"]["audit"],
    }


def _nothing() -> None:
    """The process needs no preparation."""


def _prepare(source: str, out: str, number: int, simulated: bool) -> dict[str, Any]:
    if not simulated:
        return prepare(source, out)
    return prepare(source, out, list_task=partial(SimulatedRoots, number=number), examine_task=SimulatedShard)


# --- photographs -----------------------------------------------------------------------------------------


def _names(number: int, step: int = 1, start: int = 0) -> Iterator[tuple[int, str]]:
    """Index, and path below the source, of each photograph: AI Hub's layout, people with five shots."""
    for index in range(start, number, step):
        person = index // _SHOTS
        grade = int(np.searchsorted(np.cumsum(_SHARES), np.random.default_rng(index).random()))
        folder = f"[원천]{SYMPTOMS[0]}_{min(grade, 3)}.{GRADE_NAMES_KO[min(grade, 3)]}"
        device = person % _DEVICES
        stem = f"{device:04d}_A2LEBJJDE{device:05d}O_{_START_MS + person * 60_000}_{index % _SHOTS + 2}_TH"
        part = "Training" if index % 9 < 7 else "Validation"
        yield index, f"{part}/{folder}/{stem}.jpg"


def _draw(source: Path, number: int) -> int:
    """Writes distinct JPEG files; their mean size in bytes."""
    workers = os.cpu_count() or 1
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        progress_bar("drawing", workers) as (progress, task),
    ):
        sizes = []
        for size in pool.map(_draw_share, [str(source)] * workers, [number] * workers, range(workers)):
            sizes.append(size)
            progress.update(task, advance=1)
    return round(sum(sizes) / number)


def _draw_share(source: str, number: int, share: int) -> int:
    total = 0
    for index, name in _names(number, os.cpu_count() or 1, share):
        path = Path(source, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _picture(index)
        path.write_bytes(data)
        total += len(data)
    return total


def _picture(seed: int) -> bytes:
    """A JPEG of 640x480 of smooth colours, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(60, 220, (12, 16, 3), dtype=np.uint8)
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom))
    result = ImageData(640, 480, PixelType.U8x3)
    Resizer().resize(ImageData(16, 12, PixelType.U8x3, coarse.tobytes()), result, options)
    return simplejpeg.encode_jpeg(np.frombuffer(result.get_buffer(), np.uint8).reshape(480, 640, 3), 88)


def _part_of(source: Path, number: int) -> Path:
    """A folder of the first photographs, as links to the same bytes."""
    folder = source.with_name(f"source{number}")
    for _, name in _names(number):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.hardlink_to(source / name)
    return folder


# --- a source that is only said to be there --------------------------------------------------------------


class SimulatedRoots(ListRoots):
    """Lists objects that nobody wrote, spread over the tasks of the real listing."""

    def __init__(self, work: str, number: int) -> None:
        super().__init__(work)
        self._number = number

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        names = _names(self._number, _FOLDERS, row["number"])
        rows = ({"uri": f"/simulated/{name}", "bytes": 60_000} for _, name in names)
        return write_listed(self._work, row["number"], rows)


class SimulatedShard(ExamineShard):
    """Examines them without reading: hashes are those of the names."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        listed = parquet.read(storage.join(self._work, LISTED, row["name"])).to_pylist()
        table = pa.Table.from_pylist(list(map(_simulated, listed)), schema=inventory.EXAMINED)
        parquet.write(storage.join(self._work, EXAMINED, row["name"]), table)
        return {"objects": len(listed), "rows": table.num_rows, "unfetched": 0}


def _simulated(row: dict[str, Any]) -> dict[str, Any]:
    uri = row["uri"]
    folders, stem = aihub.read_folders(uri.rpartition("/")[0]), aihub.stem_of(uri)
    digest = sha256(uri.encode())
    shot = aihub.read_stem(stem)
    return {
        "uri": uri,
        "kind": "photograph",
        "bytes": row["bytes"],
        "stem": stem,
        "part": folders.part,
        "symptom": folders.symptom,
        "folder_grade": folders.grade,
        "sha256": digest.hexdigest(),
        "width": 640,
        "height": 480,
        "hash": int.from_bytes(digest.digest()[:8]),
        "thumbnail": digest.digest() * (near_duplicates.THUMBNAIL_BYTES // 32),
        **(vars(shot) if shot else {}),
    }


def _show(result: dict[str, Any], out: str) -> None:
    table = Table(
        "", "seconds", "objects/s", "driver, MiB", "audit, MiB", title="prepare", title_justify="left"
    )
    for row in result["rows"]:
        table.add_row(
            row["what"], f"{row['seconds']:.1f}", f"{row['objects_per_second']:,.0f}",
            f"{row['driver_peak_mib']:.0f}", f"{row['audit_peak_mib']:.0f}",
        )  # fmt: skip
    console.print(table)
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
