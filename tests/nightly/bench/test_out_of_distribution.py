"""Each kind of image is scored by the gates and by the network, and what is no scalp is flagged."""

import json

from tests.benchmarks.out_of_distribution import bench_out_of_distribution
from tests.support import negatives


def test_negatives_are_detected_by_the_gates(pipeline, tmp_path):
    bench_out_of_distribution(str(tmp_path), str(pipeline.run), str(pipeline.data), count=60)
    result = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["kind"]: row for row in result["rows"]}
    assert negatives.KINDS.keys() < rows.keys()
    for kind in negatives.KINDS:
        assert rows[kind]["images"] == 60 and rows[kind]["auroc"]["gates"] == 1, kind
    methods = set(rows["black"]["auroc"])
    assert {f"mean_auroc_{method}" for method in methods} == result["ratios"].keys()
    for row in rows.values():
        assert all(0 <= share <= 1 for share in (row["auroc"] | row["flagged"]).values())
