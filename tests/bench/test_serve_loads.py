"""The benches of overload and autoscaling measure a real endpoint; how it fares here is no test."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from jobs.bench import inputs
from jobs.bench.autoscale import PICTURE_FILE as REPLICAS
from jobs.bench.autoscale import AutoscaleOptions, bench_autoscale
from jobs.bench.overload import PICTURE_FILE as STORM
from jobs.bench.overload import OverloadOptions, bench_overload, ratios


@pytest.fixture(autouse=True)
def _few_photographs(monkeypatch):
    monkeypatch.setattr(inputs, "_PHOTOGRAPHS", 16)


def result(folder, picture: str) -> dict:
    assert Image.open(io.BytesIO((folder / picture).read_bytes())).size[0] > 800
    return json.loads((folder / "summary.json").read_text())


def test_what_is_offered_is_answered_or_refused(tmp_path):
    options = OverloadOptions("cpu", size=96, times=3, seconds=5, calm_seconds=1.5)
    bench_overload(str(tmp_path), options)
    summary = result(tmp_path, STORM)
    storm = {row["what"]: row for row in summary["rows"]}["overload"]
    offered = summary["settings"]["offered"] * options.seconds
    assert storm["requests"] == pytest.approx(offered, rel=0.2)
    assert 0 < storm["refused"] < storm["requests"] and storm["lost"] == 0
    assert len(summary["memory_mib"]) >= 4 and min(summary["memory_mib"]) > 100


def test_ratios_are_those_of_what_was_measured():
    def row(p99: float, accepted: float, refused: int = 0, lost: int = 0) -> dict:
        counts = {"requests": 100, "refused": refused, "lost": lost}
        return {"p99_ms": p99, "accepted_per_second": accepted} | counts

    rows = [row(50, 20), row(200, 40), row(1075, 36, refused=50, lost=1), row(60, 20)]
    assert ratios(rows, 2.0, [100, 100, 100, 150, 120, 120, 120]) == pytest.approx(
        {
            "accepted_p99_vs_allowed": 0.5,
            "lost_share": 0.01,
            "refused_share": 0.5,
            "accepted_vs_capacity": 0.9,
            "memory_last_vs_first": 1.2,
            "p99_after_vs_before": 1.2,
        }
    )


def test_graders_are_counted_while_the_load_changes(tmp_path):
    bench_autoscale(str(tmp_path), AutoscaleOptions("cpu", size=96, graders=2, phases=((1, 2.0), (4, 3.0))))
    summary = result(tmp_path, REPLICAS)
    assert [row["clients"] for row in summary["rows"]] == [1, 4]
    assert all(row["requests_per_second"] > 0 and row["errors"] == 0 for row in summary["rows"])
    assert {count for _, count in summary["replicas"]} <= {1, 2}
