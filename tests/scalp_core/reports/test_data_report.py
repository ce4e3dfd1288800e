"""The report of `scalp prepare` in both languages."""

import pytest

from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.reports.data import render_report
from tests.support.korean_view import untranslated
from tests.support.sources import audited_jpegs

LOG = {
    "images": 9,
    "with_grade": 8,
    "decided": 1,
    "soft": 2,
    "saw_model": 3,
    "readers": {"kim": dict.fromkeys(("answers", "graded", "not_gradable", "not_a_scalp", "saw_model"), 4)},
    "agreement": [
        {
            "readers": ["kim", "lee"],
            "images": 9,
            "graded": 8,
            "equal": 7,
            "qwk": 0.8,
            "low": 0.6,
            "high": 0.9,
        },
        {"readers": ["kim", "cho"], "images": 9, "graded": 8, "equal": 7, "qwk": 0.8, "low": None},
        {"readers": ["lee", "cho"], "images": 9, "graded": 0, "equal": 0, "qwk": None},
    ],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return audited_jpegs(tmp_path_factory.mktemp("prepared"))


@pytest.mark.parametrize("layout", ["aihub", "class_folders", "table", "unlabelled"])
@pytest.mark.parametrize("method", ["group", "official", "random"])
def test_each_text_has_a_korean_one(prepared, layout, method):
    """With all sections and warnings."""
    split = SplitSpec(
        method=method,
        ratio="7:2:1",
        seed=0,
        keys=("content", "device", "session", "near_duplicate"),
        leaking_pairs={"device": 3, "session": 2, "near_duplicate": 1},
    )
    task = {"aihub": "folder", "class_folders": "json"}.get(layout, layout)
    changes = {"layout": layout, "task": task, "split": split, "synthetic": True}
    changes["symptoms"] = dict.fromkeys(SYMPTOM_IDS, (4321, 3, 2, 0))
    spec = manifest.read_spec(prepared.data).model_copy(update=changes)
    slices = {
        "position": ["TH", "LH", "RH", "BH", None],
        "sex": ["female", "male", None],
        "age": ["10s", "40s"],
        "site": ["0013", None],
        "device": ["A2LEBJJDE00060O"],
    }
    by_grade = {"photographs": 9, "by_grade": [4, 3, 2, 0]}
    parts = {
        name: {"photographs": photographs, "groups": 1, "devices": 1, "by_grade": part["by_grade"]}
        for (name, part), photographs in zip(prepared.summary["parts"].items(), (40, 2, 2), strict=True)
    }
    parts["test"]["by_grade"] = {"good": 0, "mild": 1, "moderate": 1, "severe": 0}
    summary = prepared.summary | {
        "date": "2026-11-25T20:00:00+00:00",
        "seconds": 1.0,
        "parts": parts,
        "objects": dict.fromkeys(("photograph", "label", "meta", "archive", "other"), 3),
        "by": {name: [{"value": value} | by_grade for value in values] for name, values in slices.items()},
        "folds": [{"fold": 0, "by_grade": dict.fromkeys(("good", "mild", "moderate", "severe"), 3)}],
        "label_log": LOG,
        "dropped": {"no_label": 1, "truncated": 2, "other_symptom": 3},
        "findings": dict.fromkeys(prepared.summary["findings"], 1),
        "could_not_be_fetched": 1,
        "grouped_by": {"photograph": 5},
    }
    rows = prepared.table.to_pylist()[:3]
    examples = {
        "sheets": {0: rows, 1: rows[:1], 2: [], 3: []},
        "near_pairs": [rows[:2], [{**rows[0], "label": None}, {**rows[1], "label": None}]],
        "dropped_examples": [
            {"reason": "truncated", "uri": "/data/cut.jpg", "member": None, "detail": "the file ends early"}
        ],
    }
    html = render_report(spec, summary, examples).decode()
    assert untranslated(html) == []
    assert "검증" in html
    assert html.count("4,321") == len(SYMPTOM_IDS) and "모낭홍반농포" in html
