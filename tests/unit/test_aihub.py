import json

import pytest

from scalp_core.aihub import read_source
from scalp_core.errors import UserError
from scalp_core.grades import SYMPTOMS
from tests.conftest import jpeg

KERATIN = SYMPTOMS[0]


def name(device: int, shot: int) -> str:
    return f"0013_A2LEBJJDE{device:05d}O_1602578303{shot:03d}_2_TH"


def put(root, folder, stem, data, values=None):
    images = root / folder
    images.mkdir(parents=True, exist_ok=True)
    (images / f"{stem}.jpg").write_bytes(data)
    if values is not None:
        labels = root / folder.replace("원천", "라벨")
        labels.mkdir(parents=True, exist_ok=True)
        content = {f"value_{index}": value for index, value in enumerate(values, 1)}
        (labels / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8-sig")


@pytest.fixture
def delivered(tmp_path):
    put(tmp_path, "Training/[원천]미세각질_0.양호", name(1, 0), jpeg(0), "000000")
    put(tmp_path, "Training/[원천]미세각질_2.중등도", name(1, 1), jpeg(1), ["2", "1", "0", "0", "0", "0"])
    put(
        tmp_path, "Validation/[원천]미세각질_3.중증", name(2, 2), jpeg(2, size=(320, 240)), [3, 0, 0, 0, 1, 0]
    )
    put(tmp_path, "Training/[원천]탈모_1.경증", name(2, 3), jpeg(3), "000001")  # another symptom
    return tmp_path


def test_the_delivered_layout_becomes_rows(delivered):
    reading = read_source(str(delivered), KERATIN)
    assert (reading.layout, reading.grouped_by) == ("aihub", "site_device")
    rows = sorted(reading.rows, key=lambda row: row["label"])
    assert [row["label"] for row in rows] == [0, 2, 3]
    assert [row["labels"] for row in rows] == [[0] * 6, [2, 1, 0, 0, 0, 0], [3, 0, 0, 0, 1, 0]]
    assert rows[2]["group"] == "0013_A2LEBJJDE00002O"
    assert (rows[2]["width"], rows[2]["height"], rows[2]["position"]) == (320, 240, "TH")
    assert rows[2]["captured_at"].isoformat() == "2020-10-13T08:38:23.002000+00:00"
    assert [row["source_note"] for row in rows] == ["Training", "Training", "Validation"]
    assert reading.dropped["not_in_a_grade_folder"] == 1


def test_another_symptom_is_read_by_name(delivered):
    assert [row["label"] for row in read_source(str(delivered), "탈모").rows] == [1]


def test_the_same_content_is_kept_once_and_under_two_grades_not_at_all(delivered):
    put(delivered, "Validation/[원천]미세각질_2.중등도", name(3, 4), jpeg(1))  # again, the same grade
    put(delivered, "Training/[원천]미세각질_1.경증", name(3, 5), jpeg(0))  # again, another grade
    reading = read_source(str(delivered), KERATIN)
    assert sorted(row["label"] for row in reading.rows) == [2, 3]
    assert reading.dropped["duplicate_content"] == 1
    assert reading.dropped["conflicting_labels"] == 2


def test_what_is_no_photograph_is_left_out_and_counted(delivered):
    put(delivered, "Training/[원천]미세각질_1.경증", name(3, 6), b"a text")
    put(delivered, "Training/[원천]미세각질_1.경증", name(3, 7), b"")
    reading = read_source(str(delivered), KERATIN)
    assert len(reading.rows) == 3
    assert (reading.dropped["not_an_image"], reading.dropped["empty"]) == (1, 1)


def test_plain_class_folders_become_rows(tmp_path):
    for grade, folder in enumerate(["0", "mild", "2.중등도", "중증"]):
        put(tmp_path, folder, f"holiday{grade}", jpeg(grade))
    reading = read_source(str(tmp_path), KERATIN)
    assert (reading.layout, reading.grouped_by) == ("class_folders", "photograph")
    assert sorted(row["label"] for row in reading.rows) == [0, 1, 2, 3]
    assert len({row["group"] for row in reading.rows}) == 4


def test_a_source_of_neither_layout_is_refused_with_what_was_expected(tmp_path):
    put(tmp_path, "cats", "tom", jpeg())
    with pytest.raises(UserError, match="neither AI Hub folders .* nor class folders"):
        read_source(str(tmp_path), KERATIN)
    with pytest.raises(UserError, match="does not exist"):
        read_source(str(tmp_path / "missing"), KERATIN)
