"""`engine`: compare scalp's runtimes with plain PyTorch, each in a separate process, in one run."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.engine import PASSES, Row, bare_forward, grade_files, make_row
from jobs.bench.measure import Candidate, OwnProcess, repeat, time_in_turns, write_result
from jobs.common.console import console, show
from scalp_core.bundles.loading import load_bundle
from scalp_core.inference import openvino_runtime
from scalp_core.inference.openvino_runtime import OpenVinoRuntime
from scalp_core.inference.predictor import Device, Hardware, Predictor, has_bf16, resolve_device
from tests.benchmarks.plain import Forward, plain_decode, plain_forward

_BATCHES: dict[Hardware, tuple[int, ...]] = {"cpu": (1, 8, 32), "cuda": (1, 32, 128, 512)}
_PLAIN_BATCH = 16


@dataclass(frozen=True)
class Way:
    """One way to run the model; the runtime `plain` is PyTorch as in tutorials, `tuned` in channels last."""

    name: str
    runtime: Literal["plain", "tuned", "openvino", "torch", "torch-compile"]
    precision: Literal["fp32", "bf16", "int8"]


_PLAIN = Way("PyTorch fp32", "plain", "fp32")


@dataclass
class _Here:
    """State of the process of one way."""

    files: list[bytes]
    images: np.ndarray
    forward: Forward
    predictor: Predictor | None


_here: _Here


def setup(way: Way, device: Hardware, folder: str, files: list[bytes]) -> None:
    """Load the model in this process; int8 is made here if the bundle does not have it."""
    global _here
    bundle, predictor = load_bundle(folder), None
    images = inputs.decoded(files, bundle.spec.preprocess)
    forward: Forward
    if way.runtime in ("plain", "tuned"):
        precision: Literal["bf16", "fp32"] = "bf16" if way.precision == "bf16" else "fp32"
        forward = plain_forward(bundle, device, precision, channels_last=way.runtime == "tuned")
    elif way.precision == "int8" and "int8" not in bundle.spec.graphs:
        graph = openvino_runtime.quantize(openvino_runtime.load_graph(bundle, "float"), images)
        forward = OpenVinoRuntime(graph, "int8").logits
    else:
        predictor = Predictor(bundle, device, way.precision, runtime=way.runtime)  # type: ignore[arg-type]
        forward = bare_forward(predictor)
    _here = _Here(files, images, forward, predictor)


def logits() -> np.ndarray:
    """Logits of all images, float32 (N, 4)."""
    batches = range(0, len(_here.images), 8)
    return np.concatenate([_here.forward(_here.images[start : start + 8]) for start in batches])


def bare(batch: int, seconds: float) -> list[float]:
    """Time forward passes of one batch of decoded pixels."""
    images = np.resize(_here.images, (batch, *_here.images.shape[1:]))
    return repeat(lambda: _here.forward(images), seconds)


def bulk(seconds: float) -> list[float]:
    """Time bytes to grades of all images, repeated `PASSES` times; once in the plain way."""
    predictor = _here.predictor
    if predictor is None:
        return repeat(_plain_loop, seconds)
    return repeat(lambda: grade_files(predictor, _here.files * PASSES), seconds)


def _plain_loop() -> None:
    size = _here.images.shape[1]
    for start in range(0, len(_here.files), _PLAIN_BATCH):
        batch = _here.files[start : start + _PLAIN_BATCH]
        _here.forward(np.stack([plain_decode(data, size) for data in batch]))


def bench_engine(
    out: str,
    device: Device = "auto",
    bundle: str | None = None,
    photographs: str | None = None,
    size: int = 224,
    rounds: int = 5,
    seconds: float = 1.0,
) -> dict[str, Any]:
    """Compare the runtimes on this machine; arguments as for `jobs.bench.engine.bench_engine`."""
    hardware = resolve_device(device)
    ways = _ways(hardware)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with console.status("preparing images and bundle"):
            files = inputs.read_images(photographs)
            spec = inputs.write_bundle(folder, bundle, size, files).spec
        processes = {way: OwnProcess(setup, way, hardware, folder, files) for way in ways}
        for process in processes.values():
            stack.callback(process.close)
        rows = _bare_rows(processes, _BATCHES[hardware], rounds, seconds)
        candidates = [
            Candidate("plain", partial(processes[_PLAIN].call, bulk), len(files)),
            Candidate("scalp", partial(processes[ways[1]].call, bulk), PASSES * len(files)),
        ]
        time_in_turns("bytes to grade", candidates, rounds, seconds)
        rows += [make_row("bulk", candidate) for candidate in candidates]
    settings = {
        "device": hardware,
        "weights": spec.model_version if bundle else "untrained",
        "architecture": spec.architecture,
        "size": spec.preprocess.size,
        "photographs": len(files),
        "rounds": rounds,
        "seconds_a_turn": seconds,
    }
    result = write_result(out, "engine-compared", settings, rows, _ratios(rows, ways))
    table = Table("part", "what", "batch", "images/s", "ms", "logit difference", "same grade")
    columns = ("batch", "photographs_per_second", "milliseconds", "logit_difference", "same_grade")
    for row in rows:
        table.add_row(row["part"], row["what"], *(str(row.get(column, "")) for column in columns))
    console.print(table)
    show(
        "ratios",
        {name: "not measured" if value is None else value for name, value in result["ratios"].items()},
    )
    return result


def _ways(device: Hardware) -> list[Way]:
    """Plain PyTorch, what scalp chooses, and the others."""
    best: Literal["bf16", "fp32"] = "bf16" if has_bf16(device) else "fp32"
    tuned = Way(f"PyTorch {best}, channels last", "tuned", best)
    if device == "cuda":
        scalp = Way(f"PyTorch {best}, folded", "torch", best)
        return [_PLAIN, scalp, tuned, Way(f"{scalp.name}, compiled", "torch-compile", best)]
    precisions: dict[Literal["fp32", "bf16", "int8"], None] = dict.fromkeys((best, "fp32", "int8"))
    openvino = [Way(f"OpenVINO {precision}", "openvino", precision) for precision in precisions]
    return [_PLAIN, *openvino, tuned]


def _bare_rows(
    processes: dict[Way, OwnProcess], batches: tuple[int, ...], rounds: int, seconds: float
) -> list[Row]:
    """Measure forward passes on decoded pixels, at several batch sizes."""
    candidates, notes = [], []
    reference: np.ndarray | None = None
    for way, own in processes.items():
        with console.status(f"loading {way.name}"):
            answers = own.call(logits)
        reference = answers if reference is None else reference
        for batch in (_PLAIN_BATCH,) if way == _PLAIN else batches:
            candidates.append(Candidate(way.name, partial(own.call, bare, batch), batch))
            notes.append(
                {
                    "batch": batch,
                    "logit_difference": round(float(np.abs(answers - reference).max()), 6),
                    "same_grade": round(float(np.mean(answers.argmax(1) == reference.argmax(1))), 4),
                }
            )
    time_in_turns("bare model", candidates, rounds, seconds)
    return [make_row("bare", candidate, **note) for candidate, note in zip(candidates, notes, strict=True)]


def _ratios(rows: list[Row], ways: list[Way]) -> dict[str, float | None]:
    rates: dict[str, float] = {}
    for row in rows:
        rates[row["what"]] = max(rates.get(row["what"], 0), row["photographs_per_second"])

    def ratio(over: str, under: str) -> float | None:
        return rates[over] / rates[under] if {over, under} <= rates.keys() else None

    return {
        "bare_vs_plain": ratio(ways[1].name, _PLAIN.name),
        "bare_vs_tuned": ratio(ways[1].name, next(way.name for way in ways if way.runtime == "tuned")),
        "int8_vs_bf16": ratio("OpenVINO int8", "OpenVINO bf16"),
        "end_to_end_vs_plain": ratio("scalp", "plain"),
    }
