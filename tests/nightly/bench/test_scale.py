"""The bench measures what it says; how fast it is on this machine is no test."""

import json

import numpy as np
import pytest

from jobs.common.local_executor import LocalExecutor
from tests.benchmarks.grade.scale import ScaleOptions, bench_scale, ratios
from tests.benchmarks.grade.simulated_source import fit_bits, lay_out_roots, prepare_simulated


@pytest.mark.slow
def test_a_source_on_disk_and_a_simulated_one_are_prepared(tmp_path):
    bench_scale(str(tmp_path), ScaleOptions(objects=(120,), simulated=3000))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["kind"] == "scale"
    rows = summary["rows"]
    assert [row["objects"] for row in rows] == [row["photographs"] for row in rows] == [120, 3000]
    for row in rows:
        assert row["objects_per_second"] == pytest.approx(row["objects"] / row["seconds"], rel=0.01)
        assert row["driver_peak_mib"] > 100
        assert sum(row["seconds_of_stages"].values()) == pytest.approx(row["seconds"], abs=0.5)
    assert summary["ratios"] == {name: round(value, 3) for name, value in ratios(rows).items()}


def row(rate, mib, simulated=False):
    return {"objects_per_second": rate, "driver_peak_mib": mib, "simulated": simulated}


def test_ratios_are_of_the_largest_to_the_smallest_on_disk():
    assert ratios([row(100, 200), row(150, 300), row(400, 220), row(9, 500, True)]) == {
        "rate_last_vs_first": 4.0,
        "driver_memory_last_vs_first": 1.1,
        "driver_memory_simulated_vs_first": 2.5,
    }
    assert ratios([row(100, 200)]) == {"rate_last_vs_first": 1.0, "driver_memory_last_vs_first": 1.0}


def test_simulated_objects_are_listed_examined_and_audited(tmp_path):
    source = tmp_path / "source"
    lay_out_roots(source)
    out = str(tmp_path / "out")
    model = fit_bits(np.random.default_rng(0).integers(2**63, size=(200, 2), dtype=np.uint64))
    summary = prepare_simulated(str(source), out, 1000, model, LocalExecutor())
    assert summary["objects_listed"] == summary["photographs"] == 1000
