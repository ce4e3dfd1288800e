"""The bench compares what does the same work, and says what it measured; how fast it is here is no test."""

import json

import pytest

from tests.benchmarks.agreement import check_agreement
from tests.benchmarks.grade import bulk
from tests.benchmarks.grade.bulk import BulkOptions, bench_bulk, ratios


def row(what, source, steady, whole):
    return {"what": what, "source": source, "photographs_per_second": steady, "whole_seconds": whole}


ROWS = [
    row("engine alone", "memory", 100, 30),
    row("scalp grade", "local", 95, 20),
    row("scalp grade", "local, 10 % bad files", 93.1, 21),
    row("scalp grade", "s3", 90, 22),
    row("scalp grade", "s3 zip", 81, 23),
    row("plain PyTorch fp32", "local", 10, 120),
    row("tuned PyTorch", "local", 40, 50),
    row("Daft, PyTorch", "local", 50, 30),
]


def test_ratios_are_of_the_rows_they_name():
    found = ratios(ROWS)
    assert found["vs_engine"] == pytest.approx(0.95)
    assert found["vs_plain"] == pytest.approx(6)
    assert found["vs_tuned"] == pytest.approx(2.5)
    assert found["vs_daft"] == pytest.approx(1.5)
    assert found["steady_vs_daft"] == pytest.approx(1.9)
    assert found["s3_vs_local"] == pytest.approx(90 / 95)
    assert found["zip_vs_prefix"] == pytest.approx(0.9)
    assert found["with_bad_files"] == pytest.approx(0.98)
    assert found["vs_daft_with_our_engine"] is None  # it was not run


def test_a_candidate_with_fewer_than_98_percent_equal_grades_is_an_error():
    grades = {f"{index}.jpg": index % 4 for index in range(100)}
    assert check_agreement("other", grades | {"1.jpg": 0, "2.jpg": 0}, grades) == 0.98
    with pytest.raises(RuntimeError, match=r"other: 97\.0% of grades equal those of scalp, below 98%"):
        check_agreement("other", grades | {"1.jpg": 0, "2.jpg": 0, "3.jpg": 0}, grades)
    with pytest.raises(RuntimeError, match="its images differ"):
        check_agreement("other", {"0.jpg": 0}, grades)


@pytest.mark.slow
def test_ways_grade_all_photographs_and_come_to_the_same_grades(tmp_path, monkeypatch):
    every, chosen = bulk._cases, []

    def some(*arguments):
        """One of each kind: each takes seconds to start."""
        chosen.extend(every(*arguments))
        return [case for case in chosen if case.source in ("memory", "s3") and "PyTorch" not in case.what]

    monkeypatch.setattr(bulk, "_cases", some)
    bench_bulk(str(tmp_path), BulkOptions("cpu", photographs=300, size=32, rounds=1))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["kind"], summary["settings"]["bad_files"]) == ("bulk", 33)
    assert [(case.what, case.source) for case in chosen][:8] == [
        (each["what"], each["source"]) for each in ROWS
    ]
    assert [each["source"] for each in summary["rows"]] == ["memory", "s3"]
    assert all(each["photographs_per_second"] > 0 for each in summary["rows"])
    assert [each["same_grades"] for each in summary["rows"]] == [None, 1]
    assert summary["ratios"] == {}  # both rows of each are missing
