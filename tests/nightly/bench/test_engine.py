"""The bench measures what it says; how fast it is on this machine is no test."""

from __future__ import annotations

import json
import time

import pytest

from jobs.bench.engine import bench_engine
from jobs.bench.measure import Candidate, repeat, time_in_turns
from scalp_core.errors import UserError
from tests.benchmarks.engine import bench_engine as compare
from tests.support.images import jpeg

FILES = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(FILES):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return str(folder)


@pytest.mark.slow
def test_the_engine_is_measured_and_the_figures_say_where_they_come_from(bundle, folder, tmp_path):
    bench_engine(str(tmp_path), "cpu", bundle=str(bundle), photographs=folder, rounds=2, seconds=0.05)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["kind"] == "engine"
    assert {"cpu", "cores", "memory_gib", "gpu", "bf16"} <= set(summary["machine"])
    assert {"openvino", "torch", "simplejpeg"} <= set(summary["versions"])
    assert summary["settings"]["photographs"] == FILES
    rates = {}
    for row in summary["rows"]:
        assert row["photographs_per_second"] > 0
        rates.setdefault(row["what"], []).append(row["photographs_per_second"])
    assert set(rates) == {"scalp", "bare", "one image", "bulk"}
    ratios = summary["ratios"]
    assert ratios["end_to_end_vs_bare"] == pytest.approx(rates["bulk"][0] / max(rates["bare"]), rel=0.01)
    latency = rates["bare"][0] / rates["one image"][0]
    assert ratios["batch1_latency_vs_bare"] == pytest.approx(latency, rel=0.01)


@pytest.mark.slow
def test_runtimes_are_compared_and_answer_alike(bundle, folder, tmp_path):
    compare(str(tmp_path), "cpu", str(bundle), folder, rounds=2, seconds=0.05)
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["what"]: row for row in summary["rows"]}
    assert {"PyTorch fp32", "OpenVINO fp32", "OpenVINO int8", "plain", "scalp"} <= set(rows)
    assert rows["PyTorch fp32"]["logit_difference"] == 0
    assert rows["OpenVINO fp32"]["logit_difference"] < 1e-3
    assert rows["OpenVINO int8"]["logit_difference"] > 1e-3  # it is another arithmetic
    ratio = rows["scalp"]["photographs_per_second"] / rows["plain"]["photographs_per_second"]
    assert summary["ratios"]["end_to_end_vs_plain"] == pytest.approx(ratio, rel=0.01)


def test_work_is_timed_as_it_is():
    quick = Candidate("quick", lambda seconds: repeat(lambda: time.sleep(0.01), seconds), 1)
    slow = Candidate("slow", lambda seconds: repeat(lambda: time.sleep(0.05), seconds), 10)
    time_in_turns("sleeping", [quick, slow], rounds=3, seconds=0.06)
    assert quick.median == pytest.approx(0.01, rel=0.5)
    assert slow.rate == pytest.approx(200, rel=0.5)


def test_too_few_photographs_are_refused(bundle, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="has 1 JPEG files"):
        bench_engine(str(tmp_path / "out"), "cpu", bundle=str(bundle), photographs=str(tmp_path))
