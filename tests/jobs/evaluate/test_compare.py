"""`scalp compare`: answers of two bundles in an audit log."""

import json
import re

import pytest

from jobs.evaluate.compare import compare
from scalp_core.errors import UserError
from serving.replicas.rollout import is_chosen
from tests.support.command import run_scalp


def answered(model, grade, ms, refer=False, sha256="a"):
    return {
        "time": "2026-11-29T00:00:00.000",
        "sha256": sha256,
        "model_version": model,
        "grade": grade,
        "refer": refer,
        "ms": ms,
    }


def said(model, grade, severity, refer=False):
    values = (model, grade, severity, refer, 1.0)
    return dict(
        zip(("model_version", "grade", "expected_severity", "refer", "forward_ms"), values, strict=True)
    )


LINES = [
    answered("one", 0, 10),
    answered("one", 1, 20, refer=True, sha256="b"),
    answered("two", 3, 30),
    {"time": "2026-11-29T00:00:00.000", "sha256": None, "route": "/v1/model", "status": 200},
    {"sha256": "a", "first": said("one", 0, 0.2), "candidate": said("two", 0, 0.4)},
    {"sha256": "b", "first": said("one", 1, 1.0), "candidate": said("two", 2, 1.8, refer=True)},
    {"sha256": "c", "first": said("one", 1, 1.0), "candidate": said("two", 3, 2.8)},
    {"sha256": "d", "first": said("one", 2, 2.0), "candidate": said("two", 2, 2.0)},
    {"sha256": "e", "candidate_error": "it fell over"},
]


def test_models_are_compared_by_all_answers_and_by_pairs(tmp_path):
    for number, part in enumerate((LINES[:5], LINES[5:])):  # two replicas
        (tmp_path / f"audit-{number}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    found = compare(str(tmp_path))
    one, two = found["models"]
    assert (one["model_version"], one["photographs"], one["referred"], one["p50_ms"]) == ("one", 2, 0.5, 15)
    assert (one["good"], one["mild"], two["severe"]) == (0.5, 0.5, 1.0)
    (pair,) = found["pairs"]
    assert (pair["first"], pair["candidate"], pair["photographs"]) == ("one", "two", 4)
    assert (pair["same_grade"], pair["within_one"], pair["referred_otherwise"]) == (0.5, 0.75, 0.25)
    assert pair["severity_change"] == pytest.approx((0.2 + 0.8 + 1.8 + 0) / 4)
    assert 0 < pair["kappa"] < 1
    assert found["failed"] == 1


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    line = json.dumps(LINES[0]) + "\n"
    (tmp_path / "audit-1.jsonl").write_text(line + line[:40])  # as a kill leaves it
    (tmp_path / "audit-2.jsonl").write_bytes(bytes(30) + b"\n\xff\n" + json.dumps(LINES[1]).encode())
    found = compare(str(tmp_path))
    assert (found["models"][0]["photographs"], found["damaged"]) == (2, 3)


def cells(out: str) -> list[list[str]]:
    """Cells of the rows of printed tables."""
    rows = [re.split("[│┃]", line) for line in out.splitlines() if re.match("[│┃]", line)]
    return [[cell.strip() for cell in row[1:-1]] for row in rows]


def test_command_prints_both_tables_and_counts_damaged_lines(tmp_path):
    log = tmp_path / "audit-1.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    done = run_scalp("compare", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert "damaged" not in done.stdout
    names, one, two, pair_names, pair, failed = cells(done.stdout)
    assert names[:4] == ["model version", "photographs", "referred", "p50 ms"]
    assert [row[:4] for row in (one, two)] == [["one", "2", "50.0 %", "15"], ["two", "1", "0.0 %", "30"]]
    printed = json.loads(run_scalp("compare", str(tmp_path), "--json").stdout)
    assert printed == json.loads(json.dumps(compare(str(tmp_path))))
    found = dict(zip(pair_names, pair, strict=True))
    assert (found["first"], found["candidate"], found["photographs"]) == ("one", "two", "4")
    assert (found["same grade"], found["referred otherwise"]) == ("50.0 %", "25.0 %")
    assert failed == ["failed", "1"]

    with log.open("a") as file:
        file.write(json.dumps(LINES[0])[:40])  # as a kill leaves it
    done = run_scalp("compare", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert cells(done.stdout) == [names, one, two, pair_names, pair, failed, ["damaged lines skipped", "1"]]


def test_command_names_a_folder_without_a_log(tmp_path):
    done = run_scalp("compare", str(tmp_path / "nowhere"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere has no audit log")


def test_an_image_that_was_sent_again_counts_once(tmp_path):
    (tmp_path / "audit-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES * 3))
    found = compare(str(tmp_path))
    assert [row["photographs"] for row in found["models"]] == [2, 1]
    assert found["pairs"][0]["photographs"] == 4


def test_kappa_has_an_interval_and_is_undefined_where_all_grades_are_equal(tmp_path, capsys):
    def pair(number, first, second):
        return {
            "sha256": str(number),
            "first": said("one", first, first),
            "candidate": said("two", second, second),
        }

    def compared(grades):
        pairs = [json.dumps(pair(number, *both)) + "\n" for number, both in enumerate(grades)]
        (tmp_path / "audit-1.jsonl").write_text("".join(pairs))
        return compare(str(tmp_path))["pairs"][0]

    equal = compared([(1, 1)] * 20)
    assert (equal["same_grade"], equal["kappa"], equal["kappa_95"]) == (1.0, None, None)
    assert "nan" not in capsys.readouterr().out
    few, many = (compared([(0, 0), (1, 1), (2, 3), (3, 3), (0, 1)] * times) for times in (4, 40))
    assert few["kappa"] == pytest.approx(many["kappa"])
    (low, high), (above, below) = few["kappa_95"], many["kappa_95"]
    assert low < above < few["kappa"] < below < high


def test_folder_without_a_log_is_reported(tmp_path):
    with pytest.raises(UserError, match="has no audit log"):
        compare(str(tmp_path))


def test_canary_share_selects_the_same_images():
    hashes = [f"{number * 2654435761 % 2**32:08x}" + "0" * 56 for number in range(2000)]
    chosen = {each for each in hashes if is_chosen(each, 0.2)}
    assert 0.17 < len(chosen) / len(hashes) < 0.23
    assert chosen <= {each for each in hashes if is_chosen(each, 0.5)}
    assert all(is_chosen(each, 1) for each in hashes)
