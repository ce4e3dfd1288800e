"""The benches of servers, whole: they do the same work under the same load, and a load moves the graders."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from jobs.bench import inputs
from tests.benchmarks.serve import comparison
from tests.benchmarks.serve.autoscale import PICTURE_FILE, AutoscaleOptions, bench_autoscale
from tests.benchmarks.serve.comparison import CLOSED, COMMON, OWN, ServeOptions, bench_serve, ratios


@pytest.mark.slow
def test_servers_grade_alike_under_every_load_and_after_a_kill(bundle, tmp_path, monkeypatch):
    every, chosen = comparison._commands, []

    def some(*arguments):
        """One of each kind: each takes seconds to start."""
        commands = every(*arguments)
        chosen.extend(commands)
        return {
            what: commands[what] for what in (comparison.OURS, comparison.LITSERVE_ENGINE, comparison.FASTAPI)
        }

    monkeypatch.setattr(comparison, "_commands", some)
    monkeypatch.setattr(comparison, "_IDLE_S", 0.2)
    monkeypatch.setattr(inputs, "_MAX_IMAGES", 32)
    turns = {"rounds": 1, "seconds": 0.5, "warm_up": 0.2, "fault_seconds": 4}
    options = ServeOptions("cpu", str(bundle), concurrency=(8,), **turns)
    bench_serve(str(tmp_path), options)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["kind"] == "serve"
    assert "LitServe, PyTorch, 1 worker" in chosen
    same = summary["settings"]["same_grades"]
    assert same[comparison.OURS] == same[comparison.LITSERVE_ENGINE] == 1 and same[comparison.FASTAPI] >= 0.98
    loads = [each for each in summary["rows"] if "p50_ms" in each]
    assert [each["load"] for each in loads] == [CLOSED] * 3 + [OWN] * 3 + [COMMON] * 3
    assert all(each["requests_per_second"] > 0 and each["errors"] == 0 for each in loads)
    assert all(each["cpu_ms_per_request"] for each in loads)
    assert summary["ratios"]["failed_under_fault"] == 0


@pytest.mark.slow
def test_graders_are_counted_while_the_load_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_IMAGES", 16)
    bench_autoscale(str(tmp_path), AutoscaleOptions("cpu", size=96, graders=2, phases=((1, 2.0), (4, 3.0))))
    assert Image.open(io.BytesIO((tmp_path / PICTURE_FILE).read_bytes())).size[0] > 800
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["clients"] for row in summary["rows"]] == [1, 4]
    assert all(row["requests_per_second"] > 0 and row["errors"] == 0 for row in summary["rows"])
    assert {count for _, count in summary["replicas"]} <= {1, 2}


def row(what, clients, rate, p50):
    return {"what": what, "load": CLOSED, "clients": clients, "requests_per_second": rate, "p50_ms": p50}


def test_ratios_are_against_the_best_of_the_others():
    rows = [
        *(row("scalp serve", clients, 60, 20) for clients in (1, 8, 16, 32)),
        *(row("LitServe, PyTorch, 1 worker", clients, 40, 40) for clients in (1, 8, 16, 32)),
        *(row("LitServe, PyTorch, 2 workers", clients, 50, 50) for clients in (1, 8, 16)),
        row("LitServe, our engine", 32, 80, 30),
        row("FastAPI, PyTorch", 8, 30, 99),
        {"what": "scalp serve", "load": "idle", "cores": 0.1},
        {"what": "a grader killed", "load": "", "failed": 0, "failed_without_retries": 9},
    ]
    found = ratios(rows)
    assert found["rps_vs_litserve_c8"] == found["rps_vs_litserve_c16"] == pytest.approx(1.2)
    assert found["rps_vs_litserve_c32"] == pytest.approx(1.5)
    assert found["rps_vs_litserve_with_our_engine_c32"] == pytest.approx(0.75)
    assert found["p50_vs_litserve_c1"] == pytest.approx(0.5)
    assert found["rps_vs_fastapi_c8"] == pytest.approx(2)
    assert (found["failed_under_fault"], found["failed_without_retries"]) == (0, 9)
    assert found["rps_vs_litserve_with_our_engine_c8"] is None  # it was not run
