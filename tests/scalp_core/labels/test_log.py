"""The label log: durable, only added to, written by many at once, and checked when it is read."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.labels.decisions import Answers
from scalp_core.labels.log import LABELS_FOLDER, SCHEMA, LabelLog, is_label_log, open_log, read_labels
from tests.support import crashes
from tests.support.labels import columns, write_log


def test_an_answer_is_read_as_it_was_given(tmp_path):
    labels = str(tmp_path / "labels")
    assert open_log(labels).read_new() == []
    given = columns("a.zip", member="사진.jpg", group="p1", comment="물기", saw_model=True, model_grade=2)
    written = LabelLog(labels).append(**given)
    (read,) = read_labels(labels)
    assert read == written
    assert {name: value for name, value in read.model_dump().items() if name in given} == given
    (file,) = (tmp_path / "labels" / LABELS_FOLDER).iterdir()
    assert pq.read_schema(file).equals(SCHEMA)


def test_answers_stay_and_the_newest_counts_whatever_the_clock_shows(tmp_path):
    labels = str(tmp_path / "labels")
    write_log(labels, [columns("a", grade=1)])
    (first,) = read_labels(labels)
    log, later = LabelLog(labels), LabelLog(labels)
    log.follow(datetime.now(UTC) + timedelta(days=1))
    ahead = log.append(**columns("a", grade=2))
    later.follow(ahead.time)
    behind = later.append(**columns("a", grade=3))
    assert first.time < ahead.time < behind.time
    assert [label.grade for label in read_labels(labels)] == [1, 2, 3]
    assert Answers(read_labels(labels)).find(first.sha256, "kim").grade == 3


def append_some(labels):
    open_log(labels)
    log = LabelLog(labels)
    for number in range(3):
        log.append(**columns(f"{number}.jpg"))
        Path(f"{labels}.acknowledged").write_text(str(number + 1))


@pytest.mark.medium
def test_an_acknowledged_answer_survives_a_kill_at_each_step(tmp_path):
    for number, point in enumerate(crashes.points()):
        labels = str(tmp_path / f"labels-{number}")
        was_killed = crashes.killed_at(point, append_some, labels)
        acknowledged = Path(f"{labels}.acknowledged")
        known = int(acknowledged.read_text()) if acknowledged.exists() else 0
        before = read_labels(labels)
        assert known <= len(before) <= known + 1
        # The next session begins after what was written.
        write_log(labels, [columns("next.jpg")])
        assert read_labels(labels)[:-1] == before
        if not was_killed:
            assert len(before) == 3
            break


def test_two_readers_write_at_the_same_time(tmp_path):
    labels = str(tmp_path / "labels")

    def review(reader):
        open_log(labels)
        log = LabelLog(labels)
        for number in range(20):
            log.append(**columns(f"{number}.jpg", reader, grade=number % 4))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(review, ("kim", "lee")))
    read = read_labels(labels)
    assert len(read) == 40 == len({(label.session, label.image_id) for label in read})
    assert not any(map(Answers(read).differ, {label.sha256 for label in read}))


def test_threads_of_one_session_share_a_log(tmp_path):
    labels = str(tmp_path / "labels")
    open_log(labels)
    log = LabelLog(labels)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: log.append(**columns(f"{number}.jpg")), range(20)))
    assert len({label.time for label in read_labels(labels)}) == 20


def test_an_answer_has_a_grade_or_a_reason(tmp_path):
    log = LabelLog(str(tmp_path))
    for wrong in (
        {"grade": 4},
        {"grade": None},
        {"grade": 1, "reason": "not_a_scalp"},
        {"grade": None, "reason": "boring"},
        {"comment": "x" * 2001},
    ):
        with pytest.raises(ValueError, match="validation error"):
            log.append(**(columns("a") | wrong))
    assert not storage.exists(str(tmp_path / LABELS_FOLDER))


def test_a_directory_of_others_is_not_made_a_log(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="is not empty .* and was not made by scalp review"):
        open_log(str(tmp_path))
    assert not is_label_log(str(tmp_path)) and not is_label_log(str(tmp_path / "thesis.tex"))
    made = tmp_path / "labels"
    open_log(str(made))
    assert is_label_log(str(made))
    assert json.loads((made / "scalp.json").read_text())["kind"] == "review"


@pytest.mark.parametrize("content", ["other columns", "grade 7", "no parquet"])
def test_a_file_that_is_none_of_a_log_is_named(tmp_path, content):
    labels = str(tmp_path / "labels")
    write_log(labels, [columns("a")])
    (row,) = (label.model_dump() for label in read_labels(labels))
    uri = f"{labels}/{LABELS_FOLDER}/other.parquet"
    if content == "no parquet":
        storage.write(uri, b"text")
    else:
        rows = [{"a": 1}] if content == "other columns" else [row | {"grade": 7}]
        pq.write_table(pa.Table.from_pylist(rows), uri)
    with pytest.raises(UserError, match=r"other\.parquet is not a (file of a label log|valid Parquet file)"):
        read_labels(labels)
