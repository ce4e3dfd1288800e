"""`train`: compare the default recipe with PyTorch loops and torchrun, for 1 and N workers."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from joblib import cpu_count
from rich.table import Table

from jobs.bench.measure import OwnProcess, write_result
from jobs.common.console import SUMMARY_FILE, console, progress_bar, show
from jobs.data.prepare import prepare
from jobs.train.driver import RECIPES, train
from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Device, Hardware, resolve_device
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE, Recipe, load_recipe
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions
from tests.benchmarks.loops import Loop

_PLAIN = "PyTorch, Pillow and fp32"
_ALONE = "PyTorch, tuned, 1 process"


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    Args:
        device: Device of the models.
        size: Input size, pixels.
        photographs: Number of synthetic images, of which 70 % are trained on.
        batch_size: Batch size, summed over the workers.
        epochs: Epochs per round; the first is warm-up.
        rounds: Rounds per candidate.
        workers: Workers of the parallel candidates; 1 skips them; None: one per GPU, or 2 without.
        architecture: timm name.
    """

    device: Device = "auto"
    size: int = 224
    photographs: int = 800
    batch_size: int = 32
    epochs: int = 2
    rounds: int = 2
    workers: int | None = None
    architecture: str = DEFAULT_ARCHITECTURE


@dataclass
class _Candidate:
    """One way to train: a turn trains from scratch, and returns metrics of all epochs but the first."""

    name: str
    workers: int
    turn: Callable[[Path], list[dict[str, float]]]
    epochs: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float | None:
        values = [epoch[key] for epoch in self.epochs if key in epoch]
        return statistics.median(values) if values else None


def bench_train(out: str, options: TrainOptions) -> dict[str, Any]:
    """Train the same model on the same images in each way, in alternating rounds.

    Args:
        out: Output directory, for `summary.json`.
        options: Options of the benchmark.

    Returns:
        The summary.

    Raises:
        UserError: An epoch has fewer than two steps, or the device or the workers are unavailable.
    """
    device = resolve_device(options.device)
    workers = options.workers or _default_workers(device)
    if options.epochs < 2:
        raise UserError(f"--epochs {options.epochs}: the first epoch is warm-up; use 2 or more")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = str(root / "data")
        with console.status("generating images"):
            write_dataset(root / "photographs", SynthOptions(images=options.photographs))
        images = _in_own_process(prepare, str(root / "photographs"), data)["parts"]["train"]["photographs"]
        steps = images // options.batch_size
        if steps < 2:
            raise UserError(
                f"{images} training images are {steps} steps of {options.batch_size}; use more --photographs"
            )
        candidates = _candidates(data, device, options, workers, steps * options.batch_size)
        _take_turns(candidates, root, options.rounds)
    settings = vars(options) | {
        "device": device,
        "workers": workers,
        "steps_an_epoch": steps,
        "recipe": _recipe(options).model_dump(),
    }
    rows = [_row(candidate) for candidate in candidates]
    result = write_result(out, "train", settings, rows, ratios(rows, workers))
    _show(result, out)
    return result


def _default_workers(device: Hardware) -> int:
    if device == "cpu":
        return 2
    import torch

    return torch.cuda.device_count()


def ratios(rows: list[dict[str, Any]], workers: int) -> dict[str, float | None]:
    """Ratios of images per second of `scalp train` to those of the loops; its share of waiting for data."""
    rate = {row["what"]: row["photographs_per_second"] for row in rows}
    waiting = {row["what"]: row.get("data_wait_share") for row in rows}
    several, one = rate[_scalp(workers)], rate[_scalp(1)]
    single = {
        "default_vs_tuned_loop": one / rate[_ALONE],
        "vs_plain": one / rate[_PLAIN],
        "data_wait_share": waiting[_scalp(workers)],
    }
    if workers == 1:
        return single
    return single | {
        "vs_torchrun": several / rate[_torchrun(workers)],
        f"scaling_{workers}_workers": several / one,
        f"torchrun_scaling_{workers}_processes": rate[_torchrun(workers)] / rate[_ALONE],
    }


def _scalp(workers: int) -> str:
    return f"scalp train, {workers} worker{'s' * (workers > 1)}"


def _torchrun(workers: int) -> str:
    return f"PyTorch, tuned, torchrun, {workers} processes"


def _candidates(
    data: str, device: Hardware, options: TrainOptions, several: int, images: int
) -> list[_Candidate]:
    recipe = _recipe(options)

    def run_pytorch(
        kind: Literal["plain", "tuned"], processes: int, threads: int = 0
    ) -> Callable[[Path], list[dict[str, float]]]:
        loop = Loop(kind=kind, device=device, recipe=recipe, threads=threads)
        return lambda folder: run_loop(folder, data, loop, processes, images)

    def run_scalp(workers: int) -> Callable[[Path], list[dict[str, float]]]:
        def turn(folder: Path) -> list[dict[str, float]]:
            summary = _in_own_process(train, data, str(folder / "run"), recipe, workers, device)
            return steady_epochs(summary)

        return turn

    # One process has all cores; several divide them, as the workers of `scalp train` do.
    threads = max(1, cpu_count() // several)
    alone = [
        _Candidate(_PLAIN, 1, run_pytorch("plain", 1)),
        _Candidate(_ALONE, 1, run_pytorch("tuned", 1)),
        _Candidate(_scalp(1), 1, run_scalp(1)),
    ]
    parallel = [
        _Candidate(_torchrun(several), several, run_pytorch("tuned", several, threads)),
        _Candidate(_scalp(several), several, run_scalp(several)),
    ]
    return alone + parallel if several > 1 else alone


def steady_epochs(summary: dict[str, Any]) -> list[dict[str, float]]:
    """Throughput and share of waiting for data per epoch of `scalp train`, without the first epoch."""
    keys = ("photographs_per_second", "data_wait_share")
    return [{key: epoch[key] for key in keys} for epoch in summary["history"][1:]]


def _recipe(options: TrainOptions) -> Recipe:
    """The default recipe at the size of the benchmark, from random weights and without frozen epochs."""
    changes = {
        "architecture": options.architecture,
        "weights": "none",
        "size": options.size,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "frozen_epochs": 0,
        "batch_norm": "worker",  # as the loops
    }
    return load_recipe("default", RECIPES, [f"{name}={value}" for name, value in changes.items()])


def run_loop(folder: Path, data: str, loop: Loop, processes: int, images: int) -> list[dict[str, float]]:
    """Train in separate processes; return images per second of all epochs but the first.

    Args:
        folder: Folder for the output of the loop.
        data: Output directory of `scalp prepare`.
        loop: Options of the loop.
        processes: Number of processes; `torchrun` starts more than one.
        images: Images per epoch.
    """
    launch = [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--module",
    ] if processes > 1 else ["-m"]  # fmt: skip
    out = folder / "seconds.json"
    command = [sys.executable, *launch, "tests.benchmarks.loops", data, loop.model_dump_json(), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [{"photographs_per_second": images / seconds} for seconds in json.loads(out.read_text())[1:]]


def _in_own_process(verb: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Run in a separate process with its own Ray, whose idle processes end with it."""
    own = OwnProcess()
    try:
        return own.call(verb, *arguments)
    finally:
        own.close()


def _take_turns(candidates: list[_Candidate], root: Path, rounds: int) -> None:
    with progress_bar("training", rounds * len(candidates)) as (progress, task):
        for number in range(rounds):
            for place, candidate in enumerate(candidates):
                progress.update(task, note=candidate.name)
                folder = root / f"{number}-{place}"
                folder.mkdir()
                candidate.epochs += candidate.turn(folder)
                progress.update(task, advance=1)


def _row(candidate: _Candidate) -> dict[str, Any]:
    waiting = candidate.median("data_wait_share")
    rates = [round(epoch["photographs_per_second"], 2) for epoch in candidate.epochs]
    return {
        "what": candidate.name,
        "workers": candidate.workers,
        "photographs_per_second": round(statistics.median(rates), 2),
        "of_each_epoch": rates,
    } | ({} if waiting is None else {"data_wait_share": waiting})


def _show(result: dict[str, Any], out: str) -> None:
    table = Table("what", title="training, without first epochs", title_justify="left", title_style="bold")
    for heading in ("images/s", "min", "max", "waiting for data"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        rates, waiting = row["of_each_epoch"], row.get("data_wait_share")
        table.add_row(
            row["what"],
            *(f"{rate:.1f}" for rate in (row["photographs_per_second"], min(rates), max(rates))),
            "" if waiting is None else f"{waiting:.1%}",
        )
    console.print(table)
    show("ratios", result["ratios"] | {"summary": storage.join(storage.absolute(out), SUMMARY_FILE)})
