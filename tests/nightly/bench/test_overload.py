"""The bench of overload measures a real endpoint; how it fares here is no test."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from jobs.bench import inputs
from tests.benchmarks.serve.overload import PICTURE_FILE, OverloadOptions, bench_overload, ratios


@pytest.mark.slow
def test_what_is_offered_is_answered_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_IMAGES", 16)
    options = OverloadOptions("cpu", size=96, times=3, seconds=5, calm_seconds=1.5)
    bench_overload(str(tmp_path), options)
    assert Image.open(io.BytesIO((tmp_path / PICTURE_FILE).read_bytes())).size[0] > 800
    summary = json.loads((tmp_path / "summary.json").read_text())
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
