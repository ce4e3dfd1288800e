"""`scalp bench engine`: measure decoding, forward pass, and bytes to grade on this machine."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np
from joblib import cpu_count
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.measure import Candidate, repeat, time_in_turns, write_result
from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.images import statistics
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.inference.openvino_runtime import OpenVinoRuntime
from scalp_core.inference.predictor import Device, Hardware, Precision, Predictor, Runtime

_BATCHES: dict[Hardware, tuple[int, ...]] = {"cpu": (1, 8, 32), "cuda": (1, 32, 128, 512)}
_BULK_BATCH: dict[Hardware, int] = {"cpu": 32, "cuda": 256}
# Repetitions of the images per bulk measurement: an archive is longer than the sample.
PASSES = 3

Row = dict[str, Any]


def bench_engine(
    out: str,
    device: Device = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "auto",
    bundle: str | None = None,
    photographs: str | None = None,
    size: int = 224,
    rounds: int = 5,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Measure the engine on this machine; the arguments are the options of `scalp bench engine`.

    Returns:
        The summary, which is also written to `out`.

    Raises:
        UserError: The bundle, the images or the device is unavailable.
    """
    with tempfile.TemporaryDirectory() as folder, console.status("preparing images and bundle"):
        files = inputs.read_images(photographs)
        predictor = Predictor(
            inputs.write_bundle(folder, bundle, size, files), device, precision, runtime=runtime
        )
    spec = predictor.spec
    rows = decode_rows(files, spec.preprocess, rounds, seconds)
    rows += _grading_rows(predictor, files, rounds, seconds)
    settings = {
        "computed_by": predictor.computed_by,
        "weights": spec.model_version if bundle else "untrained",
        "architecture": spec.architecture,
        "size": spec.preprocess.size,
        "photographs": len(files),
        "mean_file_bytes": round(float(np.mean([len(data) for data in files]))),
        "rounds": rounds,
        "seconds_a_turn": seconds,
    }
    plan = _plan(rows) if predictor.device == "cuda" else None
    result = write_result(out, "engine", settings, rows, _ratios(rows), plan=plan)
    _show(result, out)
    return result


def decode_rows(files: list[bytes], spec: Preprocess, rounds: int, seconds: float) -> list[Row]:
    """Measure decoding of the files on one core and on all."""

    def load(data: bytes) -> np.ndarray:
        return decode(data, spec).pixels

    cores = cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        works = {1: lambda: list(map(load, files)), cores: lambda: list(pool.map(load, files))}
        candidates = [Candidate("scalp", partial(repeat, work), len(files)) for work in works.values()]
        time_in_turns("decoding", candidates, rounds, seconds)
    return [
        make_row("decode", timed, threads=threads) for threads, timed in zip(works, candidates, strict=True)
    ]


def _grading_rows(predictor: Predictor, files: list[bytes], rounds: int, seconds: float) -> list[Row]:
    """Measure the bare model at several batch sizes, and JPEG bytes in memory to grades.

    All run in the same rounds: ratios of runs minutes apart would measure the machine.
    """
    spec, batches = predictor.spec.preprocess, _BATCHES[predictor.device]
    images, forward, next_file = inputs.decoded(files, spec), bare_forward(predictor), cycle(files)
    images = np.concatenate([images] * ceil(max(batches) / len(images)))

    def grade_one() -> None:
        predictor.grade(decode(next(next_file), spec).pixels[None])

    timed = [
        (batch, Candidate("bare", partial(repeat, partial(forward, images[:batch])), batch))
        for batch in batches
    ]
    timed.append((1, Candidate("one image", partial(repeat, grade_one), 1)))
    bulk = partial(grade_files, predictor, files * PASSES)
    size = _BULK_BATCH[predictor.device]
    timed.append((size, Candidate("bulk", partial(repeat, bulk), PASSES * len(files))))
    time_in_turns("grading", [candidate for _, candidate in timed], rounds, seconds)
    return [make_row("grade", candidate, batch=batch) for batch, candidate in timed]


def bare_forward(predictor: Predictor) -> Any:
    """Forward pass without scalp's code around it; on a GPU, PyTorch's captured graphs."""
    runtime = predictor.forward
    if not isinstance(runtime, OpenVinoRuntime):
        return runtime.logits
    (request,) = runtime.requests
    return lambda images: request.infer([images], share_inputs=True)[0]


def grade_files(predictor: Predictor, files: list[bytes]) -> list[Grading]:
    """Grade image files; threads decode the next ones during the forward pass, as in `scalp grade`."""

    def load(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        pixels = decode(data, predictor.spec.preprocess).pixels
        return pixels, statistics.measure(pixels)

    answers, size = [], _BULK_BATCH[predictor.device]
    with ThreadPoolExecutor(cpu_count(), "decode") as pool:
        ahead = pool.map(load, files[:size])
        for start in range(size, len(files) + size, size):
            batch, ahead = list(ahead), pool.map(load, files[start : start + size])
            images, measured = (np.stack(values) for values in zip(*batch, strict=True))
            answers += make_gradings(predictor.logits(images), measured, predictor.spec)
    return answers


def make_row(part: str, candidate: Candidate, **more: Any) -> Row:
    """Row of a measurement."""
    return {
        "part": part,
        "what": candidate.name,
        **more,
        "photographs_per_second": round(candidate.rate, 1),
        "milliseconds": round(candidate.median * 1000, 2),
    }


def _rates(rows: list[Row], what: str) -> list[float]:
    return [row["photographs_per_second"] for row in rows if row["what"] == what]


def _ratios(rows: list[Row]) -> dict[str, float | None]:
    bare, (single,), (bulk,) = (_rates(rows, what) for what in ("bare", "one image", "bulk"))
    # The first bare row has one image. The ratio of latencies is the inverse of that of rates.
    return {"end_to_end_vs_bare": bulk / max(bare), "batch1_latency_vs_bare": bare[0] / single}


def _plan(rows: list[Row]) -> dict[str, Any]:
    """Number of cores that decode as fast as the GPU grades."""
    per_core, rate = _rates(rows, "scalp")[0], max(_rates(rows, "bare"))
    return {
        "gpu": provenance.machine()["gpu"],
        "gpu_photographs_per_second": rate,
        "decoded_per_core_and_second": per_core,
        "cores_for_one_gpu": ceil(rate / per_core),
        "cores_here": cpu_count(),
    }


def _show(result: dict[str, Any], out: str) -> None:
    table = Table("what", title=result["settings"]["computed_by"], title_justify="left", title_style="bold")
    for heading in ("threads", "batch", "images/s", "ms"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        what = "decode" if row["part"] == "decode" else row["what"]
        sizes = (str(row.get(name, "")) for name in ("threads", "batch"))
        table.add_row(what, *sizes, str(row["photographs_per_second"]), str(row["milliseconds"]))
    console.print(table)
    show("ratios", result["ratios"])
    if plan := result["plan"]:
        console.print(
            f"{plan['gpu']}: {plan['gpu_photographs_per_second']:.0f} images/s need "
            f"{plan['cores_for_one_gpu']} cores to decode; this machine has {plan['cores_here']}"
        )
    console.print(f"written: {storage.join(storage.absolute(out), SUMMARY_FILE)}")
