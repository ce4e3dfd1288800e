"""`scalp bench serve`: the endpoint beside LitServe and plain FastAPI, under equal loads and under a kill."""

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

import numpy as np
from joblib import cpu_count
from rich.table import Table

from jobs.bench import inputs
from jobs.bench.measure import OwnProcess, write_result
from jobs.bench.processes import machine_seconds
from jobs.bench.serve import load
from jobs.bench.serve.faults import kill_a_grader
from jobs.bench.serve.load import Load
from jobs.bench.serve.rivals import Arguments
from jobs.bench.serve.servers import Server
from jobs.common.console import SUMMARY_FILE, console, progress_bar, show
from scalp_core import storage
from scalp_core.inference.predictor import Device, Hardware, resolve_device, resolve_precision

OURS = "scalp serve"
LITSERVE = "LitServe, PyTorch"
LITSERVE_ENGINE = "LitServe, our engine"
FASTAPI = "FastAPI, PyTorch"

CLOSED = "closed"
OWN, COMMON = "open, share of its own capacity", "open, the same for all"

# Others decode and compute in other ways, which moves answers near a limit; see `bulk`.
_LEAST_SAME = 0.75
# PyTorch at its best: else glibc maps and unmaps each large activation anew (docs/architecture.md).
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
_IDLE_S = 2.0
# The concurrency at which capacity is taken for the open loops.
_CAPACITY_AT = 16
_FAULT_AT = 8


@dataclass(frozen=True)
class ServeOptions:
    """What to measure.

    Args:
        device: where the model runs.
        bundle: a trained one; None takes random weights, which are as fast.
        size: side of the input of random weights, pixels.
        concurrency: clients of the closed loops.
        rounds: turns that each server gets at each load.
        seconds: that a turn counts.
        warm_up: seconds of the same load before those.
        share: of its capacity that is offered to a server in the open loops.
        fault_seconds: under load around the kill.
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
    """A server under a load.

    Args:
        server: that bears it.
        load: its kind.
        size: clients of a closed loop, arrivals a second of an open one.
        turn: puts the load on.
        loads: what each turn came to.
        cpu: seconds of the server's processes in all turns, with their warm-ups.
        others: cores that were busy in each turn with something else.
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
        """Good answers a second, the middle one of all turns."""
        return statistics.median(len(each.latencies) / each.seconds for each in self.loads)

    def take_turn(self) -> None:
        """Puts the load on once; the server is awake meanwhile, and no other one."""
        with self.server.awake():
            machine, before, started = machine_seconds(), self.server.cpu_seconds(), time.monotonic()
            found = self.turn()
            used = self.server.cpu_seconds() - before
            machine, seconds = machine_seconds() - machine, time.monotonic() - started
        self.loads.append(found)
        self.cpu += used
        self.others.append((machine - used.total() - found.cpu_seconds) / seconds)


def bench_serve(out: str, options: ServeOptions) -> dict[str, Any]:
    """Puts the same loads on every server, in turns; all run on this machine, one at a time.

    Args:
        out: directory for `summary.json`.
        options: what to measure.

    Returns:
        the summary.

    Raises:
        UserError: the bundle or the device cannot be had.
        RuntimeError: a server fails, or comes to other grades than `scalp serve`.
    """
    device = resolve_device(options.device)
    files = inputs.read_photographs(None)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with console.status("laying out the bundle"):
            bundle = inputs.lay_out_bundle(folder, options.bundle, options.size, files)
        client = OwnProcess(load.setup, files)
        stack.callback(client.close)
        servers = []
        for what, command in _commands(folder, device).items():
            with console.status(f"starting {what}"):
                more = _ALLOCATOR if "PyTorch" in what else {}
                servers.append(stack.enter_context(Server(what, command, files[0], more)))
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
    """`scalp serve` beside the best set-up of the others at each concurrency, and what a kill cost."""
    closed = [row for row in rows if row["load"] == CLOSED]

    def of(column: str, best: Callable[..., float], what: str, concurrency: int) -> float | None:
        found = [
            row[column]
            for row in closed
            if row["what"].startswith(what) and row["clients"] == concurrency and row[column]
        ]
        return best(found) if found else None

    def ratio(column: str, best: Callable[..., float], other: str, concurrency: int) -> float | None:
        ours, theirs = of(column, best, OURS, concurrency), of(column, best, other, concurrency)
        return ours / theirs if ours and theirs else None

    fault = next((row for row in rows if "failed_without_retries" in row), {})
    rate, middle = "requests_per_second", "p50_ms"
    return {
        "rps_vs_litserve_c8": ratio(rate, max, LITSERVE, 8),
        "rps_vs_litserve_c16": ratio(rate, max, LITSERVE, 16),
        "p50_vs_litserve_c1": ratio(middle, min, LITSERVE, 1),
        "rps_vs_fastapi_c8": ratio(rate, max, FASTAPI, 8),
        "rps_vs_litserve_with_our_engine_c8": ratio(rate, max, LITSERVE_ENGINE, 8),
        "rps_vs_litserve_with_our_engine_c16": ratio(rate, max, LITSERVE_ENGINE, 16),
        "p50_vs_litserve_with_our_engine_c1": ratio(middle, min, LITSERVE_ENGINE, 1),
        "failed_under_fault": fault.get("failed"),
        "failed_without_retries": fault.get("failed_without_retries"),
    }


# --- servers -----------------------------------------------------------------------------------------------


def _commands(bundle: str, device: Hardware) -> dict[str, list[str]]:
    """The servers by name, ours first. Of LitServe both ways to use the cores: which one is best depends."""
    cores = cpu_count()

    def other(way: str, **more: Any) -> list[str]:
        arguments = Arguments(bundle=bundle, device=device, cores=cores, **more)
        return ["-m", "jobs.bench.serve.rivals", way, "PORT", arguments.model_dump_json()]

    commands = {
        OURS: ["-m", "jobs.cli", "serve", bundle, "--port", "PORT", "--device", device],
        f"{LITSERVE}, 1 worker": other("litserve"),
        LITSERVE_ENGINE: other("litserve", engine=True),
        FASTAPI: other("fastapi"),
    }
    if device == "cpu" and cores > 1:
        commands[f"{LITSERVE}, {cores} workers"] = other("litserve", workers=cores)
    return commands


def _check_same(servers: list[Server], client: OwnProcess) -> dict[str, float]:
    """The share of each server's grades that are ours; who does something else has no place in the table."""
    agreed: dict[str, float] = {}
    reference: list[int] = []
    for server in servers:
        with console.status(f"grading with {server.what}"), server.awake():
            grades = [answer["grade"] for answer in client.call(load.answers, server.port)]
        reference = reference or grades
        agreed[server.what] = statistics.mean(a == b for a, b in zip(grades, reference, strict=True))
        if agreed[server.what] < _LEAST_SAME:
            raise RuntimeError(f"{server.what}: {agreed[server.what]:.1%} of the grades are those of {OURS}")
    return agreed


# --- loads -------------------------------------------------------------------------------------------------


def _idle(server: Server) -> dict[str, Any]:
    """What a server costs that nobody asks."""
    with server.awake():
        time.sleep(_IDLE_S)  # it settles
        before = server.cpu_seconds()
        time.sleep(_IDLE_S)
        used = (server.cpu_seconds() - before).total()
    return {"what": server.what, "load": "idle", "cores": round(used / _IDLE_S, 3)}


def _measure(servers: list[Server], client: OwnProcess, options: ServeOptions) -> list[dict[str, Any]]:
    def closed(server: Server, concurrency: int) -> _Case:
        turn = partial(client.call, load.closed, server.port, concurrency, options.warm_up, options.seconds)
        return _Case(server, CLOSED, concurrency, turn)

    def arriving(server: Server, kind: str, rate: float) -> _Case:
        turn = partial(client.call, load.open_loop, server.port, rate, options.warm_up, options.seconds)
        return _Case(server, kind, round(rate, 1), turn)

    cases = [closed(server, clients) for clients in options.concurrency for server in servers]
    _take_turns("closed loops", cases, options.rounds)
    at = min(options.concurrency, key=lambda clients: abs(clients - _CAPACITY_AT))
    capacity = {case.server.what: case.rate for case in cases if case.size == at}
    common = max(rate for what, rate in capacity.items() if what != OURS)
    opened = [arriving(server, OWN, options.share * capacity[server.what]) for server in servers]
    opened += [arriving(server, COMMON, options.share * common) for server in servers]
    _take_turns("open loops", opened, options.rounds)
    return [_row(case) for case in cases + opened]


def _take_turns(what: str, cases: list[_Case], rounds: int) -> None:
    with progress_bar(what, rounds * len(cases)) as (progress, task):
        for _ in range(rounds):
            for case in cases:
                progress.update(task, note=f"{case.server.what}, {case.size:g}")
                case.take_turn()
                progress.update(task, advance=1)


def _row(case: _Case) -> dict[str, Any]:
    latencies = [1000 * each for turn in case.loads for each in turn.latencies]
    if not latencies:
        raise RuntimeError(f"{case.server.what} answered nothing under {case.load}, {case.size:g}")
    batches = [each for turn in case.loads for each in turn.batches]
    answers = sum(turn.answers for turn in case.loads)
    spent = {name: round(1000 * seconds / answers, 2) for name, seconds in case.cpu.most_common()}
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99]).round(1).tolist()
    return {
        "what": case.server.what,
        "load": case.load,
        "clients" if case.load == CLOSED else "offered_per_second": case.size,
        "requests_per_second": round(case.rate, 1),
        "of_each_turn": [round(len(turn.latencies) / turn.seconds, 1) for turn in case.loads],
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "errors": sum(turn.errors for turn in case.loads),
        # Each pass of n photographs is in n answers.
        "batch_fill": round(len(batches) / sum(1 / each for each in batches), 2) if batches else None,
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
                *(f"{each:.1f}" for each in times),
                str(row["errors"]),
                "" if row["batch_fill"] is None else f"{row['batch_fill']:.1f}",
                f"{spent:.1f}",
            )
        console.print(table)
    found = {name: value for name, value in result["ratios"].items() if value is not None}
    show("ratios", found | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
