"""Both models have the same images, and each symptom has its kappa."""

import json

from scalp_core.grades import SYMPTOM_IDS
from tests.benchmarks.symptoms import SymptomsOptions, bench_symptoms


def test_each_symptom_is_scored_and_both_models_are_compared(tmp_path):
    settings = ("size=64", "batch_size=8", "epochs=2")
    bench_symptoms(str(tmp_path), SymptomsOptions(photographs=240, settings=settings))
    result = json.loads((tmp_path / "summary.json").read_text())
    assert {row["symptom"] for row in result["rows"]} <= set(SYMPTOM_IDS)
    assert result["rows"][0]["symptom"] == SYMPTOM_IDS[0] and len(result["rows"]) > 1
    for row in result["rows"]:
        assert sum(row["grades"]) == row["images"]
        low, high = row["qwk_interval"]
        assert low <= row["qwk"] <= high
    assert "qwk" in result["six_minus_one"]
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "six")]
    assert runs[0]["data_sha256"] == runs[1]["data_sha256"]
