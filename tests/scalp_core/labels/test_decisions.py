"""Which answer counts: the deciding one, else the one on which readers agree."""

import pytest

from scalp_core.labels.decisions import READERS_DIFFER, SAW_MODEL, Answers
from tests.support.labels import label

DECIDED = {"deciding": True, "reader": "lead"}


@pytest.mark.parametrize(
    ("answers", "grade", "code"),
    [
        ([label("a", "kim", 2)], 2, None),
        ([label("a", "kim", 2), label("a", "lee", 2)], 2, None),
        ([label("a", "kim", 2), label("a", "lee", 3)], None, READERS_DIFFER),
        ([label("a", "kim", 2), label("a", "lee", None, reason="not_a_scalp")], None, READERS_DIFFER),
        ([label("a", "kim", None, reason="not_a_scalp")], None, "not_a_scalp"),
        ([label("a", "kim", 2), label("a", "lee", 3), label("a", grade=1, **DECIDED)], 1, None),
        (
            [label("a", "kim", 2), label("a", grade=None, reason="cannot_be_graded", **DECIDED)],
            None,
            "cannot_be_graded",
        ),
        # A corrected answer resolves the conflict; the order of the rows does not matter.
        ([label("a", "kim", 3, at=2), label("a", "kim", 2, at=1), label("a", "lee", 3)], 3, None),
        ([label("a", grade=1, at=1, **DECIDED), label("a", grade=0, at=0, **DECIDED)], 1, None),
    ],
)
def test_the_decision_of_an_image(answers, grade, code):
    (decision,) = Answers(answers).decisions()
    assert decision.code == code
    if code is None:
        assert decision.label.grade == grade


def test_a_conflict_names_its_answers_and_not_its_readers():
    answers = [label("a", "kim", 2), label("a", "lee", None, reason="not_a_scalp")]
    (decision,) = Answers(answers).decisions()
    assert decision.detail == "answers 2, not_a_scalp"


@pytest.mark.parametrize(
    ("answers", "soft", "code"),
    [
        ([label("a", "kim", 1), label("a", "lee", 2)], (0, 0.5, 0.5, 0), None),
        ([label("a", "kim", 0), label("a", "lee", 3), label("a", "park", 3)], (1 / 3, 0, 0, 2 / 3), None),
        ([label("a", "kim", 2), label("a", "lee", 2)], None, None),
        ([label("a", "kim", 1), label("a", "lee", 2), label("a", grade=1, **DECIDED)], None, None),
        # An answer without a grade is no share of one.
        ([label("a", "kim", 2), label("a", "lee", None, reason="not_a_scalp")], None, READERS_DIFFER),
    ],
)
def test_a_conflict_becomes_the_share_of_the_readers_per_grade(answers, soft, code):
    read = Answers(answers, conflicts="soft")
    (decision,) = read.decisions()
    assert decision.soft == pytest.approx(soft) and decision.code == code
    assert read.count()["soft"] == (soft is not None)


def test_answers_given_with_the_model_in_view_can_be_left_out():
    answers = [
        label("both", "kim", 2, at=0),
        label("both", "kim", 1, at=1, saw_model=True),
        label("seen", "kim", 3, saw_model=True),
        label("conflict", "kim", 1),
        label("conflict", "lee", 2),
        label("conflict", grade=2, saw_model=True, **DECIDED),
    ]
    all_of_them = {d.label.uri: (d.label.grade, d.code) for d in Answers(answers).decisions()}
    assert all_of_them == {"/data/both": (1, None), "/data/seen": (3, None), "/data/conflict": (2, None)}
    blind = {d.label.uri: d.code for d in Answers(answers, blind_only=True).decisions()}
    assert blind == {"/data/both": None, "/data/seen": SAW_MODEL, "/data/conflict": READERS_DIFFER}
    assert Answers(answers, blind_only=True).find(answers[0].sha256, "kim").grade == 2


def test_each_image_and_answer_is_counted():
    answers = [
        label("a", "kim", 2),
        label("a", "lee", 2, saw_model=True),
        label("b", "kim", 2),
        label("b", "lee", 3),
        label("c", "lee", None, reason="cannot_be_graded"),
        label("d", "kim", 0),
        label("d", "lee", 1),
        label("d", grade=1, **DECIDED),
        label("e", "kim", 1, saw_model=True),
    ]
    counted = Answers(answers).count()
    assert counted == {
        "images": 5,
        "with_grade": 3,
        "soft": 0,
        "decided": 1,
        "left_out": {READERS_DIFFER: 1, "cannot_be_graded": 1},
        "saw_model": 1,
        "readers": {
            "kim": {"answers": 4, "graded": 4, "cannot_be_graded": 0, "not_a_scalp": 0, "saw_model": 1},
            "lee": {"answers": 4, "graded": 3, "cannot_be_graded": 1, "not_a_scalp": 0, "saw_model": 1},
        },
    }
