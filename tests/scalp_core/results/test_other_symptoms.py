"""The column of other symptoms: written, queried, exported, and null in the files of earlier versions."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from scalp_core.bundles.loading import load_bundle
from scalp_core.images.statistics import STATISTICS
from scalp_core.results.formats import flat_batch, json_lines
from scalp_core.results.query import ResultRows
from scalp_core.results.schema import Signature, result_table

STRINGS = ("location_id", "uri", "member", "sha256", "notes", "error_code", "error")


def table_of(make_bundle, folder, symptoms):
    spec = load_bundle(str(make_bundle(folder, symptoms=symptoms))).spec
    rows = {name: np.array([""] * 4, dtype=object) for name in STRINGS}
    rows |= {
        "location_id": np.array(list("abcd"), dtype=object),
        "statistics": np.zeros((4, len(STATISTICS))),
    }
    rows["error_code"] = np.array(["", "", "", "empty"], dtype=object)
    logits = np.zeros((4, 4 * symptoms), np.float32)
    if symptoms > 1:
        logits[[0, 1, 2], [19, 19, 16]] = 5  # dandruff is the fourth of the others
    return result_table(rows, logits, spec, Signature("m", "cpu"))


def stored(table, out):
    (out / "results").mkdir(parents=True)
    pq.write_table(table, out / "results" / "part-0.parquet")
    (out / "summary.json").write_text("{}")
    return str(out)


@pytest.mark.medium
def test_a_symptom_is_a_field_in_sql_and_in_exports(make_bundle, tmp_path):
    table = table_of(make_bundle, tmp_path / "six", 6)
    with ResultRows(stored(table, tmp_path / "out")) as results:
        query = (
            "select other_symptoms.dandruff.grade as grade, count(*) as n from results group by 1 order by 1"
        )
        counts = {row["grade"]: row["n"] for row in results.rows(query)}
    assert counts == {3: 2, 0: 1, None: 1}
    first, *_, failed = [json.loads(line) for line in json_lines(table.to_batches()[0]).splitlines()]
    assert first["other_symptoms"]["dandruff"]["grade_name"] == "severe"
    assert first["other_symptoms"]["hair_loss"] is first["other_symptoms"]["micro_keratin"] is None
    assert failed["other_symptoms"] is None
    flat = flat_batch(table.to_batches()[0]).to_pylist()
    assert (
        json.loads(flat[0]["other_symptoms"]) == first["other_symptoms"] and flat[3]["other_symptoms"] is None
    )


def test_rows_of_a_model_of_one_symptom_and_of_earlier_versions_have_null(make_bundle, tmp_path):
    table = table_of(make_bundle, tmp_path / "one", 1)
    assert table["other_symptoms"].null_count == 4
    out = stored(table.drop_columns(["other_symptoms"]), tmp_path / "out")
    with ResultRows(out) as results:
        assert {row["other_symptoms"] for row in results.rows("select * from results")} == {None}
