"""`overload --hostile`: measure the latency of an ordinary client during attacks of another."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from jobs.bench import inputs, load
from jobs.bench.load import Load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, show
from scalp_core import storage
from scalp_core.inference.predictor import resolve_device
from serving.auth.keys import new_key
from tests.benchmarks.serve import attacks
from tests.benchmarks.serve.servers import Server

KIND = "overload-hostile"
RATE = 4.0
"""Requests per second of the ordinary client."""

_ALLOWED = 2.0  # ratio of latencies during an attack
_BEGUN_S = 3.0  # duration of an attack before the measurement
_SETTLED_S, _SETTLES_WITHIN_S = 1.0, 30.0
_SIZE = 224


def bench_hostile(out: str, device: str, uri: str | None, seconds: float) -> dict[str, Any]:
    """Measure paced requests of an ordinary client alone, and during each attack of a hostile one.

    Args:
        out: Output directory, for `summary.json`.
        device: Device of the model.
        uri: Trained bundle; None: random weights.
        seconds: Duration of each attack.

    Returns:
        The summary.

    Raises:
        UserError: The bundle or the device is unavailable.
        RuntimeError: The endpoint does not start.
    """
    device = resolve_device(device)  # type: ignore[arg-type]
    files = inputs.read_images(None)
    (key, line), (hostile_key, hostile_line) = new_key("ordinary"), new_key("hostile")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("preparing the bundle, starting the endpoint"):
            bundle = inputs.write_bundle(folder, uri, _SIZE, files)
            keys = Path(folder, "keys")
            keys.touch(0o600)
            keys.write_text(f"{line}\n{hostile_line}\n")
            command = ["-m", "jobs.cli", "serve", folder, "--port", "PORT", "--device", device]
            command += ["--keys", str(keys)]
            ordinary = OwnProcess(load.setup, files, key)
            stack.callback(ordinary.close)
            server = stack.enter_context(Server("scalp serve", command, files[0], {}, key))
            attacker = OwnProcess(attacks.setup, server.url, hostile_key, files)
            stack.callback(attacker.close)
            threads = stack.enter_context(ThreadPoolExecutor(1))
        with console.status("alone"):
            ordinary.call(load.open_loop, server.url, RATE, 0.0, 5.0)
            alone = [ordinary.call(load.open_loop, server.url, RATE, 0.0, seconds)]
        attacks_run: dict[str, tuple[Load, Counter[str]]] = {}
        for name, attack in attacks.ATTACKS.items():
            with console.status(name):
                attacked = threads.submit(attacker.call, attack, _BEGUN_S + seconds)
                time.sleep(_BEGUN_S)
                measured = ordinary.call(load.open_loop, server.url, RATE, 0.0, seconds)
                attacks_run[name] = measured, attacked.result()
                _settle(ordinary, server.url)
        with console.status("alone again"):
            alone.append(ordinary.call(load.open_loop, server.url, RATE, 0.0, seconds))
    rows = [_row("alone", alone, {}, None)]
    rows += [_row(name, [measured], ends, rows[0]) for name, (measured, ends) in attacks_run.items()]
    settings = {
        "device": device,
        "weights": bundle.spec.model_version if uri else "untrained",
        "size": bundle.spec.preprocess.size,
        "requests_per_second": RATE,
        "seconds": seconds,
    }
    result = write_result(out, KIND, settings, rows, ratios(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Worst ratios of all attacks; the goal is at most 2, and no request refused or lost."""
    attacked = rows[1:]
    return {
        "worst_p50_vs_alone": max((row["p50_ratio"] or float("inf")) for row in attacked),
        "worst_p99_vs_alone": max((row["p99_ratio"] or float("inf")) for row in attacked),
        "not_answered_share": sum(row["not_answered"] for row in attacked)
        / sum(row["requests"] for row in attacked),
        "attacks_above_twofold": sum(
            (row["p99_ratio"] or float("inf")) > _ALLOWED or (row["p50_ratio"] or float("inf")) > _ALLOWED
            for row in attacked
        ),
    }


def _row(
    what: str, loads: list[Load], ends: Counter[str] | dict[str, int], alone: dict[str, Any] | None
) -> dict[str, Any]:
    latencies = 1000 * np.array([seconds for run in loads for seconds in run.latencies])
    errors = sum(run.errors for run in loads)
    p50, p99 = np.quantile(latencies, (0.5, 0.99)) if len(latencies) else (np.nan, np.nan)
    return {
        "attack": what,
        "requests": len(latencies) + errors,
        "not_answered": errors,
        "p50_ms": _rounded(p50),
        "p99_ms": _rounded(p99),
        "p50_ratio": _rounded(p50 / alone["p50_ms"], 2) if alone else None,
        "p99_ratio": _rounded(p99 / alone["p99_ms"], 2) if alone else None,
        "attacker": dict(sorted(ends.items(), key=lambda item: -item[1])),
    }


def _rounded(value: float, digits: int = 1) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


def _settle(ordinary: OwnProcess, url: str) -> None:
    """Wait until the endpoint has finished the requests of an attack."""
    until = time.monotonic() + _SETTLES_WITHIN_S
    while time.monotonic() < until:
        probe = ordinary.call(load.open_loop, url, RATE, 0.0, _SETTLED_S)
        if not probe.errors and max(probe.latencies, default=0) < _SETTLED_S / RATE:
            return


def _show(result: dict[str, Any], out: str) -> None:
    table = Table()
    for name in result["rows"][0]:
        table.add_column(
            name.replace("_", " "), justify="left" if name in ("attack", "attacker") else "right"
        )
    for row in result["rows"]:
        ends = ", ".join(f"{count:,} x {code}" for code, count in row["attacker"].items())
        table.add_row(*("" if value is None else str(value) for value in list(row.values())[:-1]), ends)
    console.print(table)
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
