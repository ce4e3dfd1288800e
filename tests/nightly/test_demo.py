"""`scalp demo` with 40 images: all steps succeed, and the table has the numbers of the summaries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

IMAGES = 40
WIDE = {"COLUMNS": "200"}
STEPS = [
    "synthetic images",
    "prepare",
    "train",
    "evaluate",
    "upload to S3",
    "grade a zip in S3",
    "grade an S3 prefix",
    "serve and ask",
]


def run_demo(out: Path) -> str:
    # Not by the command: its least number of images takes minutes more.
    command = [sys.executable, "-c", f"from jobs.demo import demo; demo({str(out)!r}, {IMAGES})"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | WIDE)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def summary_in(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def table(printed: str) -> dict[str, str]:
    """Rows of the last table, by name."""
    rows = (line.split("│") for line in printed.rsplit("results", 1)[1].splitlines())
    return {row[1].strip(): row[2].strip() for row in rows if len(row) == 4}


@pytest.mark.timeout(600)
def test_a_small_demo_succeeds_and_prints_the_numbers_of_its_summaries(tmp_path):
    out = tmp_path / "demo"
    shown = table(run_demo(out))
    demo, evaluation = summary_in(out), summary_in(out / "evaluation")
    graded = [summary_in(out / folder) for folder in ("graded_zip", "graded_prefix")]

    assert [row["step"] for row in demo["rows"]] == STEPS
    metrics = evaluation["metrics"]
    assert shown["test images"].startswith(f"{metrics['n']}, from {evaluation['groups']} microscopes")
    for row, value in (
        ("quadratic weighted kappa", metrics["qwk"]),
        ("top-1 accuracy", metrics["top1"]),
        ("always the majority grade", evaluation["majority"]["top1"]),
    ):
        assert float(shown[row]) == pytest.approx(value, abs=5e-4), row
    total = [sum(summary[name] for summary in graded) for name in ("graded", "rows", "rows_unaccounted")]
    assert shown["graded in S3"] == f"{total[0]} of {total[1]} files"
    assert total[1] == 2 * (metrics["n"] + 3) and total[1] - total[0] == 2 * 3
    assert graded[0]["by_error"] == graded[1]["by_error"] == {"empty": 1, "not_an_image": 1, "truncated": 1}
    assert (shown["unaccounted"], total[2]) == ("0", 0)
    assert (shown["online equals bulk"], demo["ratios"]["online_equals_bulk"]) == ("yes", True)
    for page in (out / "data" / "report.html", out / "run" / "curves.png"):
        assert page.is_file()
