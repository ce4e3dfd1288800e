"""`scalp evaluate A B … DATA OUT`: the paired differences, in JSON, report and console table."""

import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.cli.main import app
from jobs.common.local_executor import LocalExecutor
from jobs.data.prepare import prepare
from jobs.evaluate.comparison import evaluate_models
from scalp_core.curation.audit import Options
from scalp_core.errors import UserError
from scalp_core.evaluation.paired import METRICS
from scalp_core.grades import SYMPTOMS
from tests.support.bundles import make_bundle
from tests.support.korean_view import untranslated
from tests.support.plots import leave_undrawn
from tests.support.sources import write_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    write_set(folder / "images", every_symptom=False)
    options = Options(ratio="1:1:2")
    prepare(str(folder / "images"), str(folder / "data"), options, executor=LocalExecutor())
    return folder / "data"


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("second") / "bundle", seed=8)


@pytest.mark.medium
def test_two_models_are_compared_image_by_image(bundle, second, data, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["evaluate", bundle, second, data, out, "--local", "--device", "cpu"]
    app(list(map(str, words)), standalone_mode=False)
    summary = json.loads((out / "summary.json").read_text())
    differences = summary["comparison"]["differences"][0]
    tables = [pq.read_table(out / f"model-{number}/predictions.parquet").to_pydict() for number in (1, 2)]
    assert tables[0]["image_id"] == tables[1]["image_id"]
    right = [np.equal(table["grade"], table["label"]).mean() for table in tables]
    assert differences["top1"]["difference"] == pytest.approx(right[1] - right[0])
    assert differences["referred"]["second"] == pytest.approx(np.mean(tables[1]["refer"]))
    for number, model in enumerate(summary["models"], 1):
        alone = json.loads((out / model["folder"] / "summary.json").read_text())
        assert alone["model_version"] == model["model_version"]
        assert alone["metrics"]["qwk"] == differences["qwk"]["first" if number == 1 else "second"]
        assert (out / model["folder"] / "confusion.png").exists()

    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    for label in METRICS.values():
        assert label in printed and label in page
    bounded = [value for value in differences.values() if value["low"] is not None]
    decided = sum(not value["contains_zero"] for value in bounded)
    assert len(re.findall("<b>[+-][0-9.]+ … [+-][0-9.]+</b>", page)) == decided < len(bounded)
    assert page.count('<path class="interval"') == len(bounded)
    assert untranslated(page) == []
    assert "Not shown to differ (the interval contains 0): " in printed
    assert all(model["model_version"] in page for model in summary["models"])
    assert "SYNTHETIC IMAGES" in page and "SYNTHETIC IMAGES" in printed
    assert not re.search("https?://", page)


@pytest.mark.medium
def test_a_model_does_not_differ_from_itself(bundle, data, tmp_path, capsys, monkeypatch):
    leave_undrawn(monkeypatch)
    summary = evaluate_models([str(bundle)] * 3, str(data), str(tmp_path), executor=LocalExecutor())
    assert len(summary["comparison"]["differences"]) == 2
    for differences in summary["comparison"]["differences"]:
        assert all(value["difference"] in (0, None) for value in differences.values())
    assert "Different (" not in capsys.readouterr().out


@pytest.mark.medium
def test_labels_of_another_symptom_are_refused(bundle, data, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    contract = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps(contract | {"symptom": SYMPTOMS[4]}))
    with pytest.raises(UserError, match=r"has labels of dandruff \(비듬\), .* --symptom 미세각질"):
        evaluate_models([str(bundle)] * 2, str(other), str(tmp_path / "out"), executor=LocalExecutor())


@pytest.mark.medium
def test_splits_of_two_folds_are_not_compared(bundle, data, tmp_path, monkeypatch):
    from jobs.evaluate import comparison

    tables = comparison.read_table
    first = iter([0, 20])  # rows that are left out
    monkeypatch.setattr(comparison, "read_table", lambda *given: tables(*given).slice(next(first)))
    with pytest.raises(UserError, match="of different folds.*--split test"):
        evaluate_models([str(bundle)] * 2, str(data), str(tmp_path), executor=LocalExecutor())
