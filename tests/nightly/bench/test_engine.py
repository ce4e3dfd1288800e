"""The bench measures what it says; how fast it is on this machine is no test."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from jobs.bench.engine import EngineOptions, bench_engine
from jobs.bench.measure import Candidate, repeat, time_in_turns
from scalp_core.errors import UserError
from tests.support.images import jpeg

FILES = 20


@pytest.fixture(scope="module")
def summary(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(FILES):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    out = tmp_path_factory.mktemp("bench")
    options = EngineOptions("cpu", str(bundle), str(folder), rounds=2, seconds=0.05, compiled=False)
    bench_engine(str(out), options)
    return json.loads((out / "summary.json").read_text())


def part(summary, name):
    return [row for row in summary["rows"] if row["part"] == name]


@pytest.mark.slow
def test_the_figures_say_where_they_come_from(summary):
    assert summary["kind"] == "engine"
    assert {"cpu", "cores", "memory_gib", "gpu", "bf16"} <= set(summary["machine"])
    assert {"openvino", "torch", "simplejpeg"} <= set(summary["versions"])
    assert summary["settings"]["photographs"] == FILES


@pytest.mark.slow
def test_all_is_measured_in_one_run(summary):
    assert {row["part"] for row in summary["rows"]} == {"decode", "bare", "bulk", "one photograph", "memory"}
    bare = {row["what"] for row in part(summary, "bare")}
    assert {"PyTorch fp32", "PyTorch fp32, channels last", "OpenVINO fp32", "OpenVINO int8"} <= bare
    for row in summary["rows"]:
        assert row.get("photographs_per_second", 1) > 0
    assert {"bare_vs_plain", "end_to_end_vs_bare", "batch1_latency_vs_bare", "int8_vs_bf16"} <= set(
        summary["ratios"]
    )


@pytest.mark.slow
def test_a_ratio_is_that_of_its_rows(summary):
    bulk = {row["what"]: row["photographs_per_second"] for row in part(summary, "bulk")}
    ratios = summary["ratios"]
    assert ratios["end_to_end_vs_bare"] == pytest.approx(bulk["scalp"] / bulk["scalp, bare"], rel=0.01)
    assert ratios["end_to_end_vs_plain"] == pytest.approx(bulk["scalp"] / bulk["plain"], rel=0.01)
    alone = {row["what"]: row["photographs_per_second"] for row in part(summary, "one photograph")}
    # The bare pass leaves out decoding, so it cannot be the slower one by much.
    assert ratios["batch1_latency_vs_bare"] == pytest.approx(alone["scalp, bare"] / alone["scalp"], rel=0.01)


@pytest.mark.slow
def test_what_must_answer_alike_does(summary):
    rows = {row["what"]: row for row in part(summary, "bare")}
    assert rows["PyTorch fp32"]["logit_difference"] == 0
    assert rows["OpenVINO fp32"]["logit_difference"] < 1e-3
    assert rows["OpenVINO int8"]["logit_difference"] > 1e-3  # it is another arithmetic
    ours = [row for row in part(summary, "decode") if row["what"] == "scalp"]
    assert [row["threads"] for row in ours] == [1, summary["machine"]["cores"]]
    assert ours[0]["difference_of_255"] < 3


@pytest.mark.slow
def test_memory_is_that_of_each_way_alone(summary):
    peaks = {row["what"]: row["peak_mib"] for row in part(summary, "memory")}
    assert peaks["PyTorch fp32"] > peaks["OpenVINO fp32"] + 200  # PyTorch itself
    assert peaks["OpenVINO fp32"] > 100


@pytest.mark.slow
def test_the_plan_counts_cores(summary):
    plan = summary["plan"]
    needed = plan["gpu_photographs_per_second"] / plan["decoded_per_core_and_second"]
    assert plan["cores_for_one_gpu"] == int(np.ceil(needed))


def test_work_is_timed_as_it_is():
    quick = Candidate("quick", lambda seconds: repeat(lambda: time.sleep(0.01), seconds), 1)
    slow = Candidate("slow", lambda seconds: repeat(lambda: time.sleep(0.05), seconds), 10)
    time_in_turns("sleeping", [quick, slow], rounds=3, seconds=0.06)
    assert quick.median == pytest.approx(0.01, rel=0.5)
    assert slow.rate == pytest.approx(200, rel=0.5)


def test_too_few_photographs_are_refused(bundle, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="has 1 JPEG files"):
        bench_engine(str(tmp_path / "out"), EngineOptions("cpu", str(bundle), str(tmp_path)))
