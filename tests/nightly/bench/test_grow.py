"""A cluster that grows, simulated by Ray: work brings nodes, and what can never be had is told."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time

import pytest
from PIL import Image

from jobs.bench import inputs
from tests.benchmarks.grade.grow import PICTURE_FILE, GrowOptions, bench_grow
from tests.support.images import jpeg
from tests.support.nodes import BIN
from tests.support.simulated_cluster import simulated_cluster, working_nodes

pytestmark = pytest.mark.slow


@pytest.mark.timeout(400)
def test_a_grading_brings_nodes_that_go_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "_MAX_IMAGES", 16)
    bench_grow(str(tmp_path), GrowOptions(size=64, photographs=64, nodes=1, idle_seconds=3))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["rows"][0]["nodes"] == 0
    assert summary["ratios"]["most_nodes"] >= 1
    assert (summary["ratios"]["nodes_at_end"], summary["ratios"]["rows_unaccounted"]) == (0, 0)
    assert Image.open(io.BytesIO((tmp_path / PICTURE_FILE).read_bytes())).size[0] > 800


def test_what_no_node_can_hold_is_told_soon_and_starts_none(bundle, tmp_path):
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "a.jpg").write_bytes(jpeg())
    with simulated_cluster({"CPU": 3}, most=2, idle_seconds=60) as address:
        words = [str(BIN / "scalp"), "grade", bundle, tmp_path / "photographs", tmp_path / "out"]
        started = time.monotonic()
        done = subprocess.run(
            [*words, "--device", "cpu", "--replicas", "3", "--cpus-per-replica", "8"],
            capture_output=True,
            text=True,
            env=os.environ | {"RAY_ADDRESS": address},
            timeout=60,
        )
        assert done.returncode == 2, done
        (line,) = done.stderr.strip().splitlines()
        assert "3 models: no nodes that this cluster may start hold 27 CPUs" in line
        assert time.monotonic() - started < 20
        assert working_nodes(address) == 0
