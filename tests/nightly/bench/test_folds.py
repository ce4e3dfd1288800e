"""Wrong labels are planted outside of the test split, and each is counted as what it is."""

import json

from scalp_core.datasets import manifest
from scalp_core.synthetic.plan import SynthOptions, plan_dataset
from tests.benchmarks.folds import FoldsOptions, bench_folds

SMALL = ("size=64", "batch_size=8", "epochs=2")


def test_planted_labels_are_counted_and_the_student_is_compared(tmp_path):
    options = FoldsOptions(photographs=150, folds=2, planted=0.1, settings=SMALL)
    bench_folds(str(tmp_path), options)
    result = json.loads((tmp_path / "summary.json").read_text())
    truth = {plan.stem: plan.grade for plan in plan_dataset(SynthOptions(images=150))}
    rows = manifest.read_manifest(str(tmp_path / "data")).to_pylist()
    changed = [row for row in rows if row["label"] != truth[row["uri"].rsplit("/")[-1].removesuffix(".jpg")]]
    assert len(changed) == result["audit"]["planted"] > 5
    assert {row["split"] for row in changed} == {"train", "val"}
    first, everything = (result["audit"]["precision"][name] for name in ("as many as planted", "all"))
    assert first["suspects"] <= result["audit"]["planted"]
    assert first["planted_found"] <= everything["planted_found"]
    assert first["planted"] <= first["wrong"]
    assert set(result["test"]["differences"]) and set(result["student_minus_ordinary"])
