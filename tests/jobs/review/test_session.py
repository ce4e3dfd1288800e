"""A reader's review: what is shown to whom, what is saved, and where it resumes."""

from __future__ import annotations

import pytest

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.labels.log import Answer, read_labels
from scalp_core.review.pictures import read_jpeg
from tests.support.command import run_scalp
from tests.support.result_rows import row, write
from tests.support.reviewing import ids, open_review, write_run


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), 6)


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


def test_a_blind_review_says_nothing_of_the_model_and_of_the_place(graded, labels):
    session = open_review(graded, labels)
    image = session.image(ids(session)[0])
    assert (image["model"], image["answers"], image["answer"]) == (None, None, None)
    assert graded.rpartition("/")[0] not in str(image) + str(session.describe())
    shown = open_review(graded, labels, show_model=True).image(ids(session)[0])["model"]
    assert shown["grade"] == 0 and shown["refer_reasons"] == ["ambiguous_grade"]


@pytest.mark.parametrize("show_model", [False, True])
def test_a_label_records_what_the_reader_saw(graded, labels, show_model):
    session = open_review(graded, labels, show_model=show_model)
    second = ids(session)[1]
    session.answer(second, Answer(grade=3, comment="wet"))
    (label,) = read_labels(labels)
    assert (label.reader, label.grade, label.comment) == ("kim", 3, "wet")
    assert (label.saw_model, label.model_grade, label.model_version) == (show_model, 1, "made")
    assert (label.image_id, label.uri.rpartition("/")[2]) == (second, "01.jpg")


def test_the_same_reader_resumes_and_another_begins(graded, labels, capsys):
    session = open_review(graded, labels)
    first, second, *rest = ids(session)
    session.answer(first, Answer(grade=1))
    assert session.describe()["first_open"] == second and session.left == len(rest) + 1
    assert ids(open_review(graded, labels)) == [second, *rest]
    again = open_review(graded, labels, answered_too=True)
    assert ids(again) == [first, second, *rest]
    assert again.image(first)["answer"]["grade"] == 1
    capsys.readouterr()
    other = open_review(graded, labels, "lee")
    assert "reader lee is new in this log; readers so far: kim" in capsys.readouterr().out
    assert ids(other)[0] == first and other.image(first)["answer"] is None


def test_a_corrected_answer_counts(graded, labels):
    session = open_review(graded, labels)
    first = ids(session)[0]
    session.answer(first, Answer(grade=1))
    session.answer(first, Answer(reason="not_a_scalp"))
    assert session.image(first)["answer"]["reason"] == "not_a_scalp"
    assert session.left == 5
    again = open_review(graded, labels, answered_too=True)
    assert again.image(first)["answer"]["reason"] == "not_a_scalp"
    assert len(read_labels(labels)) == 2


@pytest.mark.medium
def test_adjudication_decides_where_readers_disagree_without_their_names(graded, labels, capsys):
    kim, lee = open_review(graded, labels, "kim"), open_review(graded, labels, "lee")
    first, second, third, *_ = ids(kim)
    for image, one, other in ((first, 1, 2), (second, 3, 3), (third, 0, 1)):
        kim.answer(image, Answer(grade=one, comment=f"{one}"))
        lee.answer(image, Answer(grade=other))
    deciding = open_review(graded, labels, "lead", adjudicate=True)
    assert ids(deciding) == [first, third]
    shown = deciding.image(first)
    assert [answer["grade"] for answer in shown["answers"]] == [1, 2]
    assert "kim" not in str(shown) and "lee" not in str(shown)
    deciding.answer(first, Answer(grade=2))
    assert read_labels(labels)[-1].deciding
    assert ids(open_review(graded, labels, "lead", adjudicate=True)) == [third]
    # The readers' own answers are as before.
    assert open_review(graded, labels, "kim", answered_too=True).image(first)["answer"]["grade"] == 1
    open_review(graded, labels, "lead", adjudicate=True).answer(third, Answer(grade=0))
    capsys.readouterr()
    assert open_review(graded, labels, "lead", adjudicate=True).is_finished
    assert "2 of 2 images on which readers disagree are decided" in capsys.readouterr().out


def test_informative_order_begins_with_the_least_certain(graded, labels):
    stored = ids(open_review(graded, labels))
    assert ids(open_review(graded, labels, order="informative")) == stored[::-1]


def test_a_label_has_the_group_of_a_table(tmp_path, graded, labels):
    session = open_review(graded, labels)
    uri = session.location(ids(session)[0]).uri
    storage.write(f"{tmp_path}/cases.csv", f"uri,group\n{uri},p1\n".encode())
    storage.write(f"{tmp_path}/plain.csv", f"uri\n{uri}\n".encode())
    sources = f'{{"sources": ["{tmp_path}/plain.csv", "{tmp_path}/cases.csv", "{tmp_path}/gone.csv"]}}'
    storage.write(f"{graded}/run.json", sources.encode())
    session = open_review(graded, labels)
    session.answer(ids(session)[0], Answer(grade=0))
    session.answer(ids(session)[1], Answer(grade=0))
    assert [label.group for label in read_labels(labels)] == ["p1", None]
    storage.remove_file(f"{graded}/run.json")


def test_a_run_and_a_log_in_s3(s3):
    folder = f"s3://{s3.bucket}/review"
    graded, labels = write_run(folder, 4), f"{folder}/labels"
    session = open_review(graded, labels)
    first, *_, in_zip = ids(session)
    session.answer(first, Answer(grade=2))
    assert read_jpeg(session.location(in_zip)).startswith(b"\xff\xd8")
    assert [label.grade for label in read_labels(labels)] == [2]
    assert first not in ids(open_review(graded, labels))
    assert first in ids(open_review(graded, labels, "lee"))


def refused(*words):
    done = run_scalp("review", *words)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    error, _hint = done.stderr.splitlines()
    return error


def test_mistakes_of_a_command_are_one_sentence(tmp_path, graded, labels):
    assert "missing option" in refused(graded, labels)
    assert "--reader '  ' is not a name" in refused(graded, labels, "--reader", "  ")
    assert "has no results/*.parquet" in refused(tmp_path / "none", labels, "--reader", "kim")
    assert "is in the source" in refused(graded, f"{graded}/labels", "--reader", "kim")
    storage.write(f"{tmp_path}/thesis/a.tex", b"mine")
    assert "was not made by scalp review" in refused(graded, tmp_path / "thesis", "--reader", "kim")
    write(f"{tmp_path}/sure/results", [row("/data/a.jpg")])
    storage.write(f"{tmp_path}/sure/summary.json", b"{}")
    assert "has no referred image" in refused(tmp_path / "sure", labels, "--reader", "kim")
    write(f"{tmp_path}/dandruff/results", [row("/data/a.jpg", refer=True)])
    storage.write(f"{tmp_path}/dandruff/run.json", b'{"symptom": "dandruff"}')
    assert "are of dandruff (비듬), and readers grade micro-keratin" in refused(
        tmp_path / "dandruff", labels, "--reader", "kim"
    )
    assert not storage.exists(labels)


def test_a_port_in_use_is_named(graded, labels):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused(
            graded, labels, "--reader", "kim", "--port", port
        )


def test_an_answered_queue_ends_the_command(graded, labels):
    session = open_review(graded, labels)
    for image in ids(session):
        session.answer(image, Answer(grade=1))
    done = run_scalp("review", graded, labels, "--reader", "kim")
    assert done.returncode == 0
    assert "6 of 6 referred images are answered by kim" in done.stdout
    assert "--all opens them again" in done.stdout


def test_a_reader_is_the_same_in_both_unicode_forms(graded, labels):
    import unicodedata

    session = open_review(graded, labels, unicodedata.normalize("NFD", "김"))
    session.answer(ids(session)[0], Answer(grade=1))
    assert open_review(graded, labels, unicodedata.normalize("NFC", " 김 ")).left == 5


def test_a_failed_write_is_an_error_and_no_answer(graded, labels, monkeypatch):
    session = open_review(graded, labels)
    first = ids(session)[0]

    def full(*_):
        raise UserError("the disk is full; free some")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "create", full)
        with pytest.raises(UserError, match="disk is full"):
            session.answer(first, Answer(grade=1))
    assert session.image(first)["answer"] is None and session.saved == 0
    session.answer(first, Answer(grade=1))
    assert session.saved == 1 == len(read_labels(labels))
