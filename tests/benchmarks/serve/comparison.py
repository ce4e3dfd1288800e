"""`serve`: compare the endpoint with LitServe and FastAPI under equal loads, and under a kill."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

from joblib import cpu_count
from rich.table import Table

from jobs.bench import inputs, load
from jobs.bench.load import Load
from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, Hardware, resolve_device, resolve_precision
from tests.benchmarks.agreement import check_agreement, decided_images
from tests.benchmarks.serve.faults import kill_a_grader
from tests.benchmarks.serve.rivals import Arguments
from tests.benchmarks.serve.servers import Server
from tests.support.processes import machine_seconds

OURS = "scalp serve"
LITSERVE = "LitServe, PyTorch"
LITSERVE_ENGINE = "LitServe, our engine"
FASTAPI = "FastAPI, PyTorch"

CLOSED = "closed"
OWN, COMMON = "open, share of its own capacity", "open, the same for all"

# For the best speed of PyTorch: otherwise glibc maps and unmaps each large activation (docs/architecture.md).
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_IDLE_S = 2.0
# Concurrency at which the capacity for the open loops is measured.
_CAPACITY_AT = 16
_FAULT_AT = 8


@dataclass(frozen=True)
class ServeOptions:
    """Options of `serve`.

    Args:
        device: Device of the model.
        bundle: Trained bundle; None: random weights, which are as fast.
        size: Input size of random weights, pixels.
        concurrency: Numbers of clients of the closed loops.
        rounds: Rounds per server and load.
        seconds: Measured seconds per server, load and round.
        warm_up: Seconds of the same load before those.
        share: Load of the open loops, as a fraction of the server's capacity.
        fault_seconds: Seconds of load around the kill.
    """

    device: Device = "auto"
    bundle: str | None = None
    size: int = 224
    concurrency: tuple[int, ...] = (1, 8, 16, 32)
    rounds: int = 3
    seconds: float = 5.0
    warm_up: float = 1.0
    share: float = 0.7
    fault_seconds: float = 30.0


@dataclass
class _Case:
    """One server under one load.

    Args:
        server: Server to measure.
        load: Kind of load.
        size: Clients of a closed loop, arrivals per second of an open one.
        turn: Applies the load once.
        loads: Result of each turn.
        cpu: CPU seconds of the server's processes in all turns, with their warm-ups.
        others: Cores busy with other processes, per turn.
    """

    server: Server
    load: str
    size: float
    turn: Callable[[], Load]
    loads: list[Load] = field(default_factory=list)
    cpu: Counter[str] = field(default_factory=Counter)
    others: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median successful answers per second of all turns."""
        return statistics.median(len(turn.latencies) / turn.seconds for turn in self.loads)

    def take_turn(self) -> None:
        """Apply the load once, while only this server is awake."""
        with self.server.awake():
            machine, before, started = machine_seconds(), self.server.cpu_seconds(), time.monotonic()
            result = self.turn()
            used = self.server.cpu_seconds() - before
            machine, seconds = machine_seconds() - machine, time.monotonic() - started
        self.loads.append(result)
        self.cpu += used
        self.others.append((machine - used.total() - result.cpu_seconds) / seconds)


def bench_serve(out: str, options: ServeOptions) -> dict[str, Any]:
    """Apply the same loads to each server, in alternating rounds; one server is awake at a time.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: The bundle or the device is unavailable.
        RuntimeError: A server fails, or its grades differ from those of `scalp serve`.
    """
    device = resolve_device(options.device)
    files = inputs.read_images(None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("preparing the bundle"):
            bundle = inputs.write_bundle(folder, options.bundle, options.size, files)
            files = decided_images(files, folder, device)
        client = OwnProcess(load.setup, files)
        stack.callback(client.close)
        servers = []
        for what, command in _commands(folder, device).items():
            with console.status(f"starting {what}"):
                environment = _ALLOCATOR if "PyTorch" in what else {}
                servers.append(stack.enter_context(Server(what, command, files[0], environment)))
                servers[-1].freeze()
        agreed = _check_same(servers, client)
        rows = [_idle(server) for server in servers]
        rows += _measure(servers, client, options)
        with servers[0].awake():
            rows.append(kill_a_grader(servers[0], files, _FAULT_AT, options.fault_seconds))
    settings = vars(options) | {
        "device": device,
        "precision": resolve_precision("auto", device),
        "weights": bundle.spec.model_version if options.bundle else "untrained",
        "architecture": bundle.spec.architecture,
        "size": bundle.spec.preprocess.size,
        "photographs": len(files),
        "mean_file_bytes": round(statistics.mean(map(len, files))),
        "same_grades": agreed,
        "litserve_version": version("litserve"),
    }
    result = write_result(out, "serve", settings, rows, ratios(rows))
    _show(result, out)
    return result


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ratios of `scalp serve` to the best configuration of each rival, and failures under the kill."""
    closed = [row for row in rows if row["load"] == CLOSED]

    def best_of(column: str, best: Callable[..., float], what: str, concurrency: int) -> float | None:
        values = [
            row[column]
            for row in closed
            if row["what"].startswith(what) and row["clients"] == concurrency and row[column]
        ]
        return best(values) if values else None

    def ratio(column: str, best: Callable[..., float], other: str, concurrency: int) -> float | None:
        own, rival = best_of(column, best, OURS, concurrency), best_of(column, best, other, concurrency)
        return own / rival if own and rival else None

    fault = next((row for row in rows if "failed_without_retries" in row), {})
    rate, p50 = "requests_per_second", "p50_ms"
    return {
        "rps_vs_litserve_c8": ratio(rate, max, LITSERVE, 8),
        "rps_vs_litserve_c16": ratio(rate, max, LITSERVE, 16),
        "rps_vs_litserve_c32": ratio(rate, max, LITSERVE, 32),
        "p50_vs_litserve_c1": ratio(p50, min, LITSERVE, 1),
        "rps_vs_fastapi_c8": ratio(rate, max, FASTAPI, 8),
        "rps_vs_litserve_with_our_engine_c8": ratio(rate, max, LITSERVE_ENGINE, 8),
        "rps_vs_litserve_with_our_engine_c16": ratio(rate, max, LITSERVE_ENGINE, 16),
        "rps_vs_litserve_with_our_engine_c32": ratio(rate, max, LITSERVE_ENGINE, 32),
        "p50_vs_litserve_with_our_engine_c1": ratio(p50, min, LITSERVE_ENGINE, 1),
        "failed_under_fault": fault.get("failed"),
        "failed_without_retries": fault.get("failed_without_retries"),
    }


# --- servers -----------------------------------------------------------------------------------------------


def _commands(bundle: str, device: Hardware) -> dict[str, list[str]]:
    """Commands of the servers by name, scalp's first; LitServe with one worker, and with one per core."""
    cores = cpu_count()

    def rival(way: str, **more: Any) -> list[str]:
        arguments = Arguments(bundle=bundle, device=device, cores=cores, **more)
        return ["-m", "tests.benchmarks.serve.rivals", way, "PORT", arguments.model_dump_json()]

    commands = {
        OURS: ["-m", "jobs.cli", "serve", bundle, "--port", "PORT", "--device", device],
        f"{LITSERVE}, 1 worker": rival("litserve"),
        LITSERVE_ENGINE: rival("litserve", engine=True),
        FASTAPI: rival("fastapi"),
    }
    if device == "cpu" and cores > 1:
        commands[f"{LITSERVE}, {cores} workers"] = rival("litserve", workers=cores)
    return commands


def _check_same(servers: list[Server], client: OwnProcess) -> dict[str, float]:
    """Fraction of each server's grades that equal scalp's; refuse a server that differs."""
    agreed: dict[str, float] = {}
    reference: dict[int, int] = {}
    for server in servers:
        with console.status(f"grading with {server.what}"), server.awake():
            answers = client.call(load.answers, server.url)
        grades = {number: answer["grade"] for number, answer in enumerate(answers)}
        reference = reference or grades
        agreed[server.what] = check_agreement(server.what, grades, reference)
    return agreed


# --- loads -------------------------------------------------------------------------------------------------


def _idle(server: Server) -> dict[str, Any]:
    """Measure CPU use and memory (PSS) of a server that has answered and is idle."""
    with server.awake():
        time.sleep(_IDLE_S)  # until it is idle
        before = server.cpu_seconds()
        time.sleep(_IDLE_S)
        used = (server.cpu_seconds() - before).total()
        memory = server.memory_mib()
    return {
        "what": server.what,
        "load": "idle",
        "cores": round(used / _IDLE_S, 3),
        "memory_mib": round(memory),
    }


def _measure(servers: list[Server], client: OwnProcess, options: ServeOptions) -> list[dict[str, Any]]:
    def closed(server: Server, concurrency: int) -> _Case:
        turn = partial(client.call, load.closed, server.url, concurrency, options.warm_up, options.seconds)
        return _Case(server, CLOSED, concurrency, turn)

    def open_loop(server: Server, kind: str, rate: float) -> _Case:
        turn = partial(client.call, load.open_loop, server.url, rate, options.warm_up, options.seconds)
        return _Case(server, kind, round(rate, 1), turn)

    cases = [closed(server, clients) for clients in options.concurrency for server in servers]
    _run_rounds("closed loops", cases, options.rounds)
    at = min(options.concurrency, key=lambda clients: abs(clients - _CAPACITY_AT))
    capacity = {case.server.what: case.rate for case in cases if case.size == at}
    common = max(rate for what, rate in capacity.items() if what != OURS)
    open_cases = [open_loop(server, OWN, options.share * capacity[server.what]) for server in servers]
    open_cases += [open_loop(server, COMMON, options.share * common) for server in servers]
    _run_rounds("open loops", open_cases, options.rounds)
    return [_row(case) for case in cases + open_cases]


def _run_rounds(what: str, cases: list[_Case], rounds: int) -> None:
    with progress_bar(what, rounds * len(cases)) as (progress, task):
        for _ in range(rounds):
            for case in cases:
                progress.update(task, note=f"{case.server.what}, {case.size:g}")
                case.take_turn()
                progress.update(task, advance=1)


def _row(case: _Case) -> dict[str, Any]:
    try:
        summary = load.summarize(case.loads)
    except ValueError as error:
        raise RuntimeError(f"{case.server.what}, {case.load}, {case.size:g}: {error}") from None
    answers = sum(turn.answers for turn in case.loads)
    spent = {name: round(1000 * seconds / answers, 2) for name, seconds in case.cpu.most_common()}
    return {
        "what": case.server.what,
        "load": case.load,
        "clients" if case.load == CLOSED else "offered_per_second": case.size,
        **summary,
        "cpu_ms_per_request": {name: cost for name, cost in spent.items() if cost >= 0.05},
        "client_cpu_ms_per_request": round(1000 * sum(turn.cpu_seconds for turn in case.loads) / answers, 2),
    }


def _show(result: dict[str, Any], out: str) -> None:
    rows = [row for row in result["rows"] if "p50_ms" in row]
    for kind in dict.fromkeys(row["load"] for row in rows):
        table = Table("server", title=kind, title_justify="left", title_style="bold")
        for heading in (
            "clients" if kind == CLOSED else "offered/s",
            "answers/s",
            "p50 ms",
            "p95 ms",
            "p99 ms",
        ):
            table.add_column(heading, justify="right")
        for heading in ("errors", "batch", "CPU ms"):
            table.add_column(heading, justify="right")
        for row in (row for row in rows if row["load"] == kind):
            size = row["clients"] if kind == CLOSED else row["offered_per_second"]
            times = (row["requests_per_second"], row["p50_ms"], row["p95_ms"], row["p99_ms"])
            spent = sum(row["cpu_ms_per_request"].values())
            table.add_row(
                row["what"],
                f"{size:g}",
                *(f"{value:.1f}" for value in times),
                str(row["errors"]),
                "" if row["batch_fill"] is None else f"{row['batch_fill']:.1f}",
                f"{spent:.1f}",
            )
        console.print(table)
    measured = {name: value for name, value in result["ratios"].items() if value is not None}
    show("ratios", measured | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
