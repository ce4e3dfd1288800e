"""Agreement of readers: the kappa of the evaluation, per pair, over the images that both graded."""

import numpy as np
import pytest

from scalp_core.evaluation.metrics import confusion, quadratic_weighted_kappa
from scalp_core.labels.agreement import measure_agreement
from scalp_core.labels.decisions import Answers
from tests.support.labels import label


def test_the_kappa_of_a_pair_is_that_of_the_evaluation():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, 60)
    second = np.clip(first + rng.integers(-1, 2, 60), 0, 3)
    answers = [label(f"{i}", "kim", int(grade)) for i, grade in enumerate(first)]
    answers += [label(f"{i}", "lee", int(grade)) for i, grade in enumerate(second)]
    answers += [label("60", "kim", 1), label("60", "lee", None, reason="not_a_scalp")]
    answers += [label("0", "park", 1), label("0", "lead", 3, deciding=True)]
    pairs = {tuple(pair["readers"]): pair for pair in measure_agreement(Answers(answers))}
    assert set(pairs) == {("kim", "lee"), ("kim", "park"), ("lee", "park")}
    pair = pairs["kim", "lee"]
    assert (pair["images"], pair["graded"], pair["equal"]) == (61, 60, int((first == second).sum()))
    assert pair["qwk"] == pytest.approx(quadratic_weighted_kappa(confusion(first, second)))
    assert pair["low"] < pair["qwk"] < pair["high"]
    assert pairs["kim", "park"]["low"] is None  # a single image


def test_the_interval_is_wider_if_images_of_a_group_stay_together():
    grades = np.random.default_rng(1).integers(0, 4, 12)

    def width(groups):
        answers = []
        for i in range(120):
            grade = int(grades[i % 12])
            group = f"{i % 12}" if groups else None
            answers.append(label(f"{i}", "kim", grade, group=group))
            answers.append(label(f"{i}", "lee", min(3, grade + (i % 12 < 4)), group=group))
        (pair,) = measure_agreement(Answers(answers))
        return pair["high"] - pair["low"]

    assert width(groups=True) > 2 * width(groups=False)


def test_readers_without_a_common_image_have_no_agreement():
    assert measure_agreement(Answers([label("a", "kim"), label("b", "lee")])) == []
    both = [label("a", reader, None, reason="not_a_scalp") for reader in ("kim", "lee")]
    (pair,) = measure_agreement(Answers(both))
    assert (pair["images"], pair["graded"], pair["qwk"]) == (1, 0, None)
