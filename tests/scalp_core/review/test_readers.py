"""Reviews of several readers at the same time: whose images are open, and what one sees of another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from scalp_core.labels.log import Answer, read_labels
from scalp_core.review.readers import Reader
from tests.support.reviewing import ids, open_readers, open_review, write_run

KIM, LEE, PARK = Reader("kim"), Reader("lee"), Reader("park", decides=True)
IMAGES = 6


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), IMAGES)


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


def test_readers_are_blind_to_each_other_and_one_decides(graded, labels):
    readers = open_readers(graded, labels)
    kim, lee = readers.open(KIM), readers.open(LEE)
    first, second, *_ = ids(kim)
    for session, grade in ((kim, 1), (lee, 2)):
        assert session.image(first)["answer"] is None and session.image(first)["answers"] is None
        session.answer(first, Answer(grade=grade))
        session.answer(second, Answer(grade=3))
    park = readers.open(PARK)
    assert ids(park) == [first]
    shown = park.image(first)
    assert [answer["grade"] for answer in shown["answers"]] == [1, 2]
    assert "kim" not in str(shown) and "lee" not in str(shown)
    park.answer(first, Answer(grade=2))
    assert [(label.reader, label.deciding) for label in read_labels(labels)][-1] == ("park", True)


def test_an_answered_image_is_not_open_again_after_a_restart(graded, labels):
    session = open_readers(graded, labels).open(KIM)
    first, *rest = ids(session)
    session.answer(first, Answer(grade=1))
    again = open_readers(graded, labels)
    assert ids(again.session(KIM)) == rest
    assert first in ids(again.session(LEE))
    assert first in ids(open_readers(graded, labels, answered_too=True).open(KIM))


def test_opening_a_session_reads_the_answers_of_other_programs(graded, labels):
    readers = open_readers(graded, labels)
    before = readers.open(KIM)
    first, *rest = ids(before)
    other = open_review(graded, labels, "kim", answered_too=True)
    other.answer(first, Answer(grade=1))
    assert ids(readers.session(KIM)) == [first, *rest]  # the same session
    assert ids(readers.open(KIM)) == rest
    before.answer(first, Answer(grade=2))  # a page that was open: the newest answer counts
    assert open_review(graded, labels, "kim", answered_too=True).image(first)["answer"]["grade"] == 2


def test_an_answer_can_be_corrected_after_the_page_is_opened_again(graded, labels):
    readers = open_readers(graded, labels)
    before = readers.open(KIM)
    first, *rest = ids(before)
    before.answer(first, Answer(grade=1))
    again = readers.open(KIM)
    assert ids(again) == [first, *rest] and again.describe()["first_open"] == rest[0]
    again.answer(first, Answer(grade=2))
    assert [label.grade for label in read_labels(labels)] == [1, 2]
    assert ids(readers.open(LEE)) == [first, *rest] and readers.open(LEE).left == IMAGES


def test_an_answer_is_marked_if_another_program_showed_the_view_of_the_model(graded, labels):
    here, elsewhere = open_readers(graded, labels).open(KIM), open_readers(graded, labels).open(KIM)
    first, second, *_ = ids(here)
    elsewhere.reveal(first)
    for image in (first, second):
        here.answer(image, Answer(grade=1))
    assert [label.saw_model for label in read_labels(labels)] == [True, False]


def test_readers_answer_at_the_same_time(graded, labels):
    readers = open_readers(graded, labels)
    names = [Reader(f"reader-{number}") for number in range(8)]

    def answer(reader: Reader) -> None:
        session = readers.open(reader)
        for number, image in enumerate(ids(session)):
            session.answer(image, Answer(grade=number % 4))
            session.image(image)
            readers.open(PARK)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(answer, names))
    assert len(read_labels(labels)) == len(names) * IMAGES
    assert all(readers.open(reader).left == 0 for reader in names)
