"""`scalp bench decisions` on a few draws; its promises are tested in `tests/scalp_core/inference`."""

import pytest

from jobs.bench import decisions
from jobs.common.console import read_json


@pytest.mark.medium
def test_each_grader_has_a_row_with_coverage_per_grade_and_kept_targets(tmp_path, monkeypatch, capsys):
    graders = decisions.GRADERS[2:4]
    monkeypatch.setattr(decisions, "GRADERS", graders)
    result = decisions.bench_decisions(str(tmp_path / "out"), draws=2)
    assert read_json(f"{tmp_path}/out/summary.json")["rows"] == result["rows"]
    for grader, row in zip(graders, result["rows"], strict=True):
        assert (row["microscopes"], row["targets"]) == (grader.microscopes, grader.targets)
        assert len(row["coverage_by_grade"]) == 4
        assert row["promise"] == pytest.approx(0.9)
        assert 0 <= row["found_kept"] <= 1
        assert "wrong_kept" not in row  # without this target
        assert row["probability_by_grade"] == pytest.approx(row["share_by_grade"], abs=0.05)
    assert "coverage of grade sets" in capsys.readouterr().out
