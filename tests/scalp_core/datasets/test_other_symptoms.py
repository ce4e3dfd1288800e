"""Grades of the other symptoms: columns of a table, label files, copies, and their fingerprint."""

import json
from hashlib import sha256

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalp_core.datasets import manifest
from scalp_core.datasets.fingerprints import describe_symptoms, fingerprint, fingerprint_labels
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES, NUM_GRADES, SYMPTOM_IDS, SYMPTOMS
from scalp_core.synthetic.dataset import write_image
from tests.support.images import jpeg
from tests.support.sources import PLANS, audited


def write_table(tmp_path, header, cells):
    """Write 24 small images and a CSV; `cells`: function of the number, or of its row to other text."""
    lines = [f"uri,{header}"]
    for number in range(24):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (96, 72)))
        lines.append(f"{number}.jpg,{cells(number)}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    return tmp_path / "t.csv"


def labels_by_name(found):
    rows = found.table.to_pylist()
    return {row["uri"].rsplit("/", 1)[-1].removesuffix(".jpg"): row["labels"] for row in rows}


@pytest.mark.medium
@pytest.mark.parametrize("names", [("dandruff", "hair_loss"), ("VALUE_5", "Hair_loss")])
def test_a_table_gives_the_grades_of_other_symptoms(names, tmp_path):
    cells = {0: "1,2,severe", 1: "1,,3.0", 2: "1,,NA"}
    table = write_table(tmp_path, ",".join(("label", *names)), lambda n: cells.get(n, f"{n % 4},0,1"))
    found = audited(table, tmp_path / "out", ratio="1:1:1")
    labels = labels_by_name(found)
    assert labels["0"] == [1, None, None, None, 2, 3]
    assert labels["1"] == [1, None, None, None, None, 3]
    assert labels["2"] is None  # as in a table without these columns
    spec = manifest.read_spec(found.data)
    assert spec.symptoms["dandruff"] == (21, 0, 1, 0) and spec.symptoms["hair_loss"] == (0, 21, 0, 2)
    assert sum(spec.symptoms["micro_keratin"]) == 23 and not any(spec.symptoms["excess_sebum"])
    assert spec.symptom == SYMPTOMS[0]


def test_a_grade_that_is_none_drops_the_image_and_names_its_column(tmp_path):
    table = write_table(tmp_path, "label,dandruff", lambda n: f"{n % 4},{'much' if n == 5 else n % 4}")
    found = audited(table, tmp_path / "out", ratio="1:1:1")
    (dropped,) = found.dropped
    assert dropped["reason"] == "bad_label" and dropped["uri"].endswith("/5.jpg")
    assert dropped["detail"] == "dandruff 'much' is not a grade: 0 to 3, or a grade's name"


@pytest.mark.medium
def test_the_label_is_the_grade_of_the_symptom(tmp_path):
    """Without a column `label`, that of the symptom is the label; a row must not contradict itself."""
    table = write_table(tmp_path, "micro_keratin,dandruff", lambda n: f"{n % 4},{(n + 1) % 4}")
    for symptom, place in ((SYMPTOMS[0], 0), (SYMPTOMS[4], 4)):
        found = audited(table, tmp_path / f"out{place}", symptom=symptom, ratio="1:1:1")
        assert all(row["label"] == row["labels"][place] for row in found.table.to_pylist())
        assert manifest.read_spec(found.data).symptom == symptom
    table = write_table(tmp_path, "label,value_1", lambda n: f"{n % 4},{3 if n == 4 else n % 4}")
    (dropped,) = audited(table, tmp_path / "differ", ratio="1:1:1").dropped
    assert (dropped["reason"], dropped["detail"]) == ("conflicting_labels", "label 0, micro_keratin 3")


def test_labels_of_a_plain_table_are_of_the_given_symptom(tmp_path):
    table = write_table(tmp_path, "label", lambda n: n % 4)
    found = audited(table, tmp_path / "out", symptom=SYMPTOMS[4], ratio="1:1:1")
    assert manifest.read_spec(found.data).symptom == SYMPTOMS[4]


def test_a_table_of_another_symptom_says_which(tmp_path):
    table = write_table(tmp_path, "dandruff", lambda n: n % 4)
    with pytest.raises(UserError, match=r"no grade for any of them \(24 no_label\); use --symptom 비듬, or"):
        audited(table, tmp_path / "out")


def test_two_columns_of_one_symptom_are_refused(tmp_path):
    table = write_table(tmp_path, "label,dandruff,value_5", lambda _: "1,1,1")
    with pytest.raises(UserError, match="two columns of one symptom, dandruff and value_5; keep one"):
        audited(table, tmp_path / "out")


def test_copies_complete_each_other_and_a_grade_on_which_they_differ_is_unknown(tmp_path):
    table = write_table(tmp_path, "label,dandruff,hair_loss", lambda n: f"{n % 4},{'' if n == 4 else 2},1")
    with table.open("a") as file:
        file.write("\n4.jpg,0,3,0\n5.jpg,1,2,1")
    found = audited(table, tmp_path / "out", ratio="1:1:1")
    assert found.summary["dropped"] == {"duplicate_content": 2}
    labels = labels_by_name(found)
    assert labels["4"] == [0, None, None, None, 3, None]
    assert labels["5"] == [1, None, None, None, 2, 1]
    assert found.summary["findings"]["grades_of_copies_differ"] == 1
    assert {row["uri"].rsplit("/", 1)[-1] for row in found.findings} == {"4.jpg"}


def test_a_parquet_table_may_have_numbers(tmp_path):
    for number in range(24):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, (96, 72)))
    grades = [number % NUM_GRADES for number in range(24)]
    columns = {"uri": [f"{number}.jpg" for number in range(24)], "label": grades}
    columns["value_2"] = pa.array([1.0, None, *grades[2:]], pa.float64())
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    labels = labels_by_name(audited(tmp_path / "t.parquet", tmp_path / "out", ratio="1:1:1"))
    assert labels["0"] == [0, 1, None, None, None, None] and labels["1"] is None


def test_of_a_label_file_all_six_values_count_or_none(tmp_path):
    plans = PLANS
    for plan in plans:
        write_image(plan, tmp_path / "set", picture=jpeg(plan.index, (96, 72)))
    first, second = [plan for plan in plans if plan.grade == 2][:2]
    (file,) = (tmp_path / "set").rglob(f"{first.stem}.json")
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"value_5": ""}))
    (file,) = (tmp_path / "set").rglob(f"{second.stem}.json")
    file.write_text(json.dumps({"value_1": "2"}))
    found = audited(tmp_path / "set", tmp_path / "out", ratio="2:1:1")
    labels = labels_by_name(found)
    assert labels[first.stem] is labels[second.stem] is None and len(labels) == len(plans)
    assert found.summary["findings"]["bad_label_file"] == 2
    spec = manifest.read_spec(found.data)
    for number, symptom in enumerate(SYMPTOM_IDS):
        assert sum(spec.symptoms[symptom]) == len(plans) - 2
        kept = [plan.symptoms[number] for plan in plans if plan not in (first, second)]
        assert spec.symptoms[symptom] == tuple(kept.count(grade) for grade in range(len(GRADE_NAMES)))


# --- the fingerprint ---------------------------------------------------------------------------------------


@pytest.mark.medium
@pytest.mark.parametrize("edited", [[0, None, None, None, 3, None], [0, 9], [], None])
def test_edited_grades_are_refused_and_earlier_data_are_read(edited, tmp_path):
    table = write_table(tmp_path, "label,dandruff", lambda n: f"{n % 4},{n % 3}")
    found = audited(table, tmp_path / "out", ratio="1:1:1")
    spec, rows = manifest.read_spec(found.data), found.table
    labels = rows["labels"].to_pylist()
    labels[3] = edited
    place = rows.column_names.index("labels")
    changed = rows.set_column(place, "labels", pa.array(labels, manifest.SCHEMA.field("labels").type))
    assert fingerprint(changed) == spec.sha256 == fingerprint(rows)
    manifest.write_manifest(found.data, changed)
    with pytest.raises(UserError, match="was changed since it was prepared"):
        manifest.read_manifest(found.data)
    manifest.write_spec(found.data, spec.model_copy(update={"labels_sha256": None, "symptoms": {}}))
    assert manifest.read_manifest(found.data).num_rows == 24


def test_the_fingerprint_of_grades_is_independent_of_the_order_and_of_rows_without_any():
    schema = pa.schema([manifest.SCHEMA.field("sha256"), manifest.SCHEMA.field("labels")])
    rows = [{"sha256": "a", "labels": [2, 0, None, 1, 0, 0]}, {"sha256": "b", "labels": [0] * 6}]
    table = pa.Table.from_pylist([*rows, {"sha256": "c"}], schema=schema)
    whole = describe_symptoms(table)
    digests = [sha256(line).digest() for line in (b"a,2;0;;1;0;0", b"b,0;0;0;0;0;0")]
    total = sum(int.from_bytes(digest, "little") for digest in digests) % 2**256
    assert whole["labels_sha256"] == fingerprint_labels(table) == f"{total:064x}"
    assert whole["symptoms"]["micro_keratin"] == (1, 0, 1, 0)
    assert whole["symptoms"]["erythema_between_follicles"] == (1, 0, 0, 0)
    for other in (table.take([2, 1, 0]), table.slice(0, 2), table.to_reader(1)):
        assert describe_symptoms(other) == whole
    others = [
        [{**rows[0], "labels": [2, 0, 0, 1, 0, 0]}, rows[1]],
        [{**rows[0], "sha256": "x"}, rows[1]],
        rows[:1],
    ]
    tables = [pa.Table.from_pylist(changed, schema=schema) for changed in others]
    assert len({whole["labels_sha256"], *(describe_symptoms(t)["labels_sha256"] for t in tables)}) == 4
    nothing = describe_symptoms(table.slice(2))
    assert nothing == {"labels_sha256": None, "symptoms": {}}
