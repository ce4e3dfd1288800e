"""Reviews of several readers at the same time: whose images are open, and what one sees of another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from scalp_core.labels.log import Answer, read_labels
from scalp_core.review.readers import Reader, Readers
from tests.support.reviewing import ids, open_review, write_run

KIM, LEE, PARK = Reader("kim"), Reader("lee"), Reader("park", decides=True)
IMAGES = 6


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), IMAGES)


@pytest.fixture
def labels(tmp_path):
    return str(tmp_path / "labels")


def test_readers_are_blind_to_each_other_and_one_decides(graded, labels):
    readers = Readers(graded, labels)
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
    session = Readers(graded, labels).open(KIM)
    first, *rest = ids(session)
    session.answer(first, Answer(grade=1))
    again = Readers(graded, labels)
    assert ids(again.session(KIM)) == rest
    assert first in ids(again.session(LEE))
    assert first in ids(Readers(graded, labels, answered_too=True).open(KIM))


def test_opening_a_session_reads_the_answers_of_other_programs(graded, labels):
    readers = Readers(graded, labels)
    before = readers.open(KIM)
    first, *rest = ids(before)
    other = open_review(graded, labels, "kim", answered_too=True)
    other.answer(first, Answer(grade=1))
    assert ids(readers.session(KIM)) == [first, *rest]  # the same session
    assert ids(readers.open(KIM)) == rest
    before.answer(first, Answer(grade=2))  # a page that was open: the newest answer counts
    assert open_review(graded, labels, "kim", answered_too=True).image(first)["answer"]["grade"] == 2


def test_readers_answer_at_the_same_time(graded, labels):
    readers = Readers(graded, labels)
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
    assert all(readers.open(reader).is_finished for reader in names)
