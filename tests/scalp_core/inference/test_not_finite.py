"""Logits that are NaN or infinite: referred on all paths, without NaN in outputs."""

import json
import math
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs.common.graphs import logits_of_both
from jobs.evaluate.driver import _compute_metrics, make_answers
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.statistics import STATISTICS
from scalp_core.inference import calibration
from scalp_core.inference.decision import make_gradings
from scalp_core.inference.explainer import make_explainer
from scalp_core.reports.grading import list_warnings
from scalp_core.results import drift
from scalp_core.results.schema import Signature, result_table
from serving.schemas.grading import GradeResponse
from tests.scalp_core.inference.test_gradcam import random_bundle, with_state
from tests.support.sizes import SMALL

SIGNATURE = Signature("m", "cpu")

SURE = [0.0, 20.0, 0.0, 0.0]
ODD = [[math.nan] * 4, [0.0, math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, 0.0]]
LOGITS = np.array([*ODD, SURE], np.float32)


@pytest.fixture(scope="module")
def spec(bundle):
    return load_bundle(str(bundle)).spec


def statistics(count: int) -> np.ndarray:
    return np.zeros((count, len(STATISTICS)), np.float32)


def test_they_are_referred_with_their_reason_and_all_grades(spec):
    *odd, sure = make_gradings(LOGITS, statistics(5), spec)
    for answer in odd:
        assert (answer.refer, answer.refer_reasons) == (True, ["not_finite"])
        assert (answer.grade, answer.grade_name, answer.grade_set) == (3, "severe", [0, 1, 2, 3])
        assert (answer.probabilities, answer.expected_severity) == ([0.25] * 4, 1.5)
    assert (sure.grade, sure.refer) == (1, False)


def test_online_answers_and_bulk_rows_hold_no_nan(spec):
    for answer in make_gradings(LOGITS, statistics(5), spec):
        json.dumps(asdict(answer), allow_nan=False)
        sent = GradeResponse.of("0" * 64, [], answer, SIGNATURE).model_dump_json()
        assert json.loads(sent)["refer_reasons"] == answer.refer_reasons
    text = np.array(["a"] * 5, object)
    rows = dict.fromkeys(("location_id", "uri", "member", "sha256", "error", "notes"), text)
    rows |= {"error_code": np.array([""] * 5, object), "statistics": statistics(5)}
    table = result_table(rows, LOGITS, spec, SIGNATURE)
    assert table["refer_reasons"].to_pylist() == [["not_finite"]] * 4 + [[]]
    json.dumps(table.select(["probabilities", "expected_severity"]).to_pylist(), allow_nan=False)


def test_an_evaluation_counts_each_as_the_largest_error(spec):
    labels = [0, 3, 2, 1, 1]
    rows = pa.table(
        {"label": labels, "group": list("abcde")}
        | {name: pa.nulls(5, pa.string()) for name in ("device", "position", "sex", "age")}
    )
    found = {"logits": LOGITS, "plain_logits": LOGITS, "seconds": np.ones(5), "plain_seconds": np.ones(5)}
    found["statistics"] = statistics(5)
    made = make_answers(found, np.array(labels), spec)
    for columns in (found, {"logits": LOGITS}):
        summary = _compute_metrics(rows, columns, *made, spec)
        assert summary["not_finite"] == 4
        assert summary["metrics"]["top1"] == 0.2
        assert summary["metrics"]["mae"] == pytest.approx((3 + 3 + 2 + 2) / 5)
        assert summary["referred"] == 0.8
        assert summary["risk_coverage"]["referral"]["error"] == 0
        json.dumps({key: summary[key] for key in ("metrics", "calibration", "tta")}, allow_nan=False)
    assert _compute_metrics(rows, found, *made, spec)["tta"]["metrics_without"]["top1"] == 0.2


def test_a_mean_over_passes_of_which_one_is_not_finite_is_not_finite(spec):
    passes = np.stack([np.array([SURE, SURE]), np.array([SURE, ODD[1]])])
    assert calibration.finite_rows(calibration.mean_logits(passes, spec)).tolist() == [True, False]


def test_weights_that_are_nan_give_no_heat_and_a_referral():
    bundle = random_bundle("test_resnet", SMALL)
    state = {name: value.clone() for name, value in bundle.state.items()}
    state["fc.weight"][:] = torch.nan
    images = np.zeros((2, SMALL, SMALL, 3), np.uint8)
    assert not make_explainer(with_state(bundle, state), "cpu").heatmaps(images, [3, 3]).any()


def test_a_graph_whose_scores_are_not_finite_is_refused():
    batches = iter([(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]))])
    with pytest.raises(UserError, match="scores of validation images are not finite"):
        logits_of_both(lambda _: LOGITS[3:], lambda _: LOGITS[3:], batches)


def test_a_bulk_report_warns_of_them(spec):
    summary = {
        "rows": 9, "failed": 0, "rows_unaccounted": 0, "by_reason": {"not_finite": 4},
        "by_grade": {"severe": 9},
    }  # fmt: skip
    (line,) = list_warnings(spec, summary, drift.measure_drift(None, summary["by_grade"], spec))
    assert str(line).startswith("the scores of 4 images are not finite numbers")
