"""The bench grades what it says, without a model; how fast it is on this machine is no test."""

import json

import pytest

from tests.benchmarks.grade.scale_grade import GradeScaleOptions, bench_grade_scale, overhead, ratios


@pytest.mark.slow
def test_sources_of_two_sizes_are_graded_whole(tmp_path):
    bench_grade_scale(str(tmp_path), GradeScaleOptions((600, 900)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["kind"] == "scale-grade"
    assert [row["rows"] for row in summary["rows"]] == [600, 900]
    for row in summary["rows"]:
        assert row["driver_peak_mib"] > 100
        assert row["whole_seconds"] >= sum(row["seconds_of_stages"].values())
    assert summary["ratios"] == {name: round(value, 3) for name, value in ratios(summary["rows"]).items()}


def test_overhead_is_what_one_photograph_more_costs():
    rows = [
        {"rows": 1000, "whole_seconds": 10.0, "rows_per_second": 500.0, "driver_peak_mib": 200.0},
        {"rows": 3000, "whole_seconds": 12.0, "rows_per_second": 400.0, "driver_peak_mib": 220.0},
    ]
    assert overhead(rows) == {"1,000 to 3,000": 1000.0}
    assert ratios(rows) == pytest.approx(
        {"rate_last_vs_first": 0.8, "rate_most_vs_least": 1.25, "driver_memory_last_vs_first": 1.1}
    )
