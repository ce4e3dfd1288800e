"""`scalp bench engine`: measure decoding, forward pass, and bytes to grade, in one run."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from joblib import cpu_count
from rich.table import Table

from jobs.bench import forwards, inputs
from jobs.bench.decoders import OURS, decode_rows
from jobs.bench.forwards import Way
from jobs.bench.measure import Candidate, OwnProcess, time_in_turns, write_result
from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, Hardware, has_bf16, resolve_device

# Extrapolated for the plan, not measured: timm publishes 4,725 images/s at 299 px for a card of that class,
# so 8,400 images/s at 224 px. With --device cuda the plan uses the measured rate.
_H100_RATE = 8400

_PLAIN = Way("PyTorch fp32", "plain", "fp32")
_PLAIN_BATCH = 16
_BATCHES: dict[Hardware, tuple[int, ...]] = {"cpu": (1, 8, 32), "cuda": (1, 32, 128, 512)}

Row = dict[str, Any]


@dataclass(frozen=True)
class EngineOptions:
    """Options of `scalp bench engine`.

    Args:
        device: Device of the model.
        bundle: Trained bundle, for meaningful differences of grades; None: untrained weights.
        photographs: Folder or prefix of JPEG files; None: synthetic images.
        size: Input size of untrained weights, pixels.
        rounds: Rounds per candidate.
        seconds: Shortest time per candidate and round.
        compiled: Also measure torch.compile, which takes a minute.
    """

    device: Device = "auto"
    bundle: str | None = None
    photographs: str | None = None
    size: int = 224
    rounds: int = 5
    seconds: float = 1.0
    compiled: bool = True


def bench_engine(out: str, options: EngineOptions) -> dict[str, Any]:
    """Benchmark the engine on this machine.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The bundle, the images or the device is unavailable.
    """
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as root:
        folder = str(Path(root, "bundle"))
        with console.status("preparing images and bundle"):
            files = inputs.read_images(options.photographs)
            bundle = inputs.write_bundle(folder, options.bundle, options.size, files)
            spec = bundle.spec.preprocess
            if device == "cpu" and "int8" not in bundle.spec.graphs:
                inputs.write_int8(folder, bundle, inputs.decoded(files, spec))
        rows = decode_rows(files, spec, options.rounds, options.seconds)
        ways = _ways(device, options.compiled)
        processes = {way: OwnProcess(forwards.setup, way, device, folder, files) for way in ways}
        try:
            rows += _bare_rows(processes, device, options)
            int8 = "int8" in bundle.spec.graphs
            rows += _whole_rows(processes, _scalp_ways(ways, device, int8=int8), rows, options, len(files))
            rows += [_row("memory", way.name, peak_mib=own.peak_mib()) for way, own in processes.items()]
        finally:
            for own in processes.values():
                own.close()
    settings = {
        "device": device,
        "weights": bundle.spec.model_version if options.bundle else "untrained",
        "architecture": bundle.spec.architecture,
        "size": spec.size,
        "resize": spec.resize,
        "photographs": len(files),
        "mean_file_bytes": round(float(np.mean([len(data) for data in files]))),
        "rounds": options.rounds,
        "seconds_a_turn": options.seconds,
    }
    result = write_result(out, "engine", settings, rows, _ratios(rows), plan=_plan(rows, device))
    _show(result, out)
    return result


def _ways(device: Hardware, compiled: bool) -> list[Way]:
    """Runtimes to measure, the plain one first."""
    best: Literal["bf16", "fp32"] = "bf16" if has_bf16(device) else "fp32"
    ways = [_PLAIN, Way("PyTorch fp32, channels last", "plain", "fp32", channels_last=True)]
    if best == "bf16":
        ways.append(Way("PyTorch bf16 autocast, channels last", "plain", "bf16", channels_last=True))
    ways.append(Way(f"PyTorch {best}, folded", "torch", best))
    if compiled:
        ways.append(Way(f"PyTorch {best}, folded, compiled", "torch-compile", best))
    if device == "cpu":
        ways.append(Way("OpenVINO fp32", "openvino", "fp32"))
        if best == "bf16":
            ways.append(Way("OpenVINO bf16", "openvino", "bf16"))
        ways.append(Way("OpenVINO int8", "openvino", "int8"))
    return ways


def _scalp_ways(ways: list[Way], device: Hardware, *, int8: bool) -> dict[str, Way]:
    """scalp's runtimes by name: the default one, and int8 if the bundle has it."""
    best: Literal["bf16", "fp32"] = "bf16" if has_bf16(device) else "fp32"
    runtime = "openvino" if device == "cpu" else "torch"
    by_precision = {way.precision: way for way in ways if way.runtime == runtime}
    return {"scalp": by_precision[best]} | (
        {"scalp int8": by_precision["int8"]} if int8 and device == "cpu" else {}
    )


def _bare_rows(processes: dict[Way, OwnProcess], device: Hardware, options: EngineOptions) -> list[Row]:
    """Measure forward passes on decoded pixels, at several batch sizes."""
    reference: np.ndarray | None = None
    candidates, rows = [], []
    for way, own in processes.items():
        with console.status(f"loading {way.name}"):
            logits = own.call(forwards.logits)
        reference = logits if reference is None else reference
        for batch in (_PLAIN_BATCH,) if way == _PLAIN else _BATCHES[device]:
            candidates.append(Candidate(way.name, partial(own.call, forwards.bare, batch), batch))
            rows.append(
                _row(
                    "bare",
                    way.name,
                    batch=batch,
                    logit_difference=round(float(np.abs(logits - reference).max()), 6),
                    same_grade=round(float(np.mean(logits.argmax(1) == reference.argmax(1))), 4),
                )
            )
    time_in_turns("bare model", candidates, options.rounds, options.seconds)
    return [row | _speed(candidate) for row, candidate in zip(rows, candidates, strict=True)]


def _whole_rows(
    processes: dict[Way, OwnProcess],
    scalp_ways: dict[str, Way],
    rows: list[Row],
    options: EngineOptions,
    count: int,
) -> list[Row]:
    """Measure JPEG bytes in memory to grades, in bulk and one by one.

    Forward passes run again in the same rounds: ratios of runs minutes apart would measure the machine.
    """
    candidates = [("bulk", Candidate("plain", partial(processes[_PLAIN].call, forwards.bulk), count))]
    for name, way in scalp_ways.items():
        call = processes[way].call
        best = max((row for row in rows if row["what"] == way.name), key=_rate)["batch"]
        candidates += [
            ("bulk", Candidate(f"{name}, bare", partial(call, forwards.bare, best), best)),
            ("bulk", Candidate(name, partial(call, forwards.bulk), count * forwards.PASSES)),
            ("one photograph", Candidate(f"{name}, bare", partial(call, forwards.bare, 1), 1)),
            ("one photograph", Candidate(name, partial(call, forwards.single), 1)),
        ]
    time_in_turns(
        "bytes to grade", [candidate for _, candidate in candidates], options.rounds, options.seconds
    )
    return [_row(part, candidate.name) | _speed(candidate) for part, candidate in candidates]


def _row(part: str, what: str, **more: Any) -> Row:
    return {"part": part, "what": what, **more}


def _speed(candidate: Candidate) -> Row:
    return {
        "photographs_per_second": round(candidate.rate, 1),
        "milliseconds": round(candidate.median * 1000, 2),
    }


def _rate(row: Row) -> float:
    return row["photographs_per_second"]


def _ratios(rows: list[Row]) -> dict[str, float | None]:
    def rate(part: str, *words: str) -> float | None:
        """Rate of the fastest row of a part with one of these names."""
        rates = [_rate(row) for row in rows if row["part"] == part and row["what"] in words]
        return max(rates, default=None)

    def ratio(over: float | None, under: float | None) -> float | None:
        return over / under if over and under else None

    bare = {row["what"] for row in rows if row["part"] == "bare"}
    floating = [name for name in bare if "bf16" in name] or [name for name in bare if "fp32" in name]
    return {
        "bare_vs_plain": ratio(rate("bare", *floating), rate("bare", _PLAIN.name)),
        "end_to_end_vs_bare": ratio(rate("bulk", "scalp"), rate("bulk", "scalp, bare")),
        # Ratio of latencies: the inverse of the rates.
        "batch1_latency_vs_bare": ratio(
            rate("one photograph", "scalp, bare"), rate("one photograph", "scalp")
        ),
        "int8_vs_bf16": ratio(rate("bare", "OpenVINO int8"), rate("bare", "OpenVINO bf16")),
        "int8_end_to_end_vs_bare": ratio(rate("bulk", "scalp int8"), rate("bulk", "scalp int8, bare")),
        "end_to_end_vs_plain": ratio(rate("bulk", "scalp"), rate("bulk", "plain")),
    }


def _plan(rows: list[Row], device: Hardware) -> dict[str, Any]:
    """Number of cores that decode as fast as a GPU grades."""
    (per_core,) = (_rate(row) for row in rows if row["what"] == OURS and row.get("threads") == 1)
    fastest = max(_rate(row) for row in rows if row["part"] == "bare")
    rate = fastest if device == "cuda" else _H100_RATE
    return {
        "gpu": provenance.machine()["gpu"] if device == "cuda" else "an H100, by published rates",
        "gpu_photographs_per_second": rate,
        "decoded_per_core_and_second": per_core,
        "cores_for_one_gpu": ceil(rate / per_core),
        "cores_here": cpu_count(),
    }


_COLUMNS = {
    "decode": ("threads", "photographs_per_second", "difference_of_255", "threads_help"),
    "bare": ("batch", "photographs_per_second", "milliseconds", "logit_difference", "same_grade"),
    "bulk": ("photographs_per_second",),
    "one photograph": ("milliseconds",),
    "memory": ("peak_mib",),
}
_HEADINGS = {"photographs_per_second": "images/s", "milliseconds": "ms"}


def _show(result: dict[str, Any], out: str) -> None:
    for part, columns in _COLUMNS.items():
        table = Table("what", title=part, title_justify="left", title_style="bold")
        for column in columns:
            table.add_column(_HEADINGS.get(column, column.replace("_", " ")), justify="right")
        for row in result["rows"]:
            if row["part"] == part:
                table.add_row(row["what"], *(str(row.get(column, "")) for column in columns))
        console.print(table)
    ratios = result["ratios"].items()
    show("ratios", {name: "not measured" if value is None else value for name, value in ratios})
    plan = result["plan"]
    needed, here = plan["cores_for_one_gpu"], plan["cores_here"]
    console.print(
        f"{plan['gpu']}: {plan['gpu_photographs_per_second']:.0f} images/s need {needed} cores to decode"
    )
    if result["settings"]["device"] == "cuda" and needed > here:
        console.print(
            f"{here} cores are too few to feed this GPU: end_to_end_vs_bare measures decoding, not the engine"
        )
    console.print(f"written: {storage.join(storage.absolute(out), SUMMARY_FILE)}")
