"""A decision fitted on out-of-fold answers of several models, and its cross-validated figures."""

import numpy as np
import pytest

from jobs.bench.decisions import SPEC, Grader, draw_images
from scalp_core.evaluation.targets import measure_share, parse_targets
from scalp_core.inference.out_of_fold import (
    OutOfFold,
    Promises,
    answer,
    cross_validate,
    fit_decision_out_of_fold,
    list_worse,
    mix_labels,
    with_rules,
)

FOLDS, MICROSCOPES, IMAGES, LIMIT = 5, 40, 1272, 0.1
SAMPLING = 0.005  # of the share of wrong among new images
PROMISES = Promises(0.9, parse_targets(f"wrong<={LIMIT:.0%}"), prior_moved=False)
GRADER = Grader(noise=0.2, offset=0.15, microscopes=MICROSCOPES)


def draw(seed: int, microscopes: int = MICROSCOPES, images: int = IMAGES, scale: float = 2.0) -> OutOfFold:
    """Answers of models that are all as accurate and too sure of themselves; a fold has whole microscopes."""
    logits, labels, groups = draw_images(GRADER, microscopes, images, np.random.default_rng(seed))
    return OutOfFold(scale * logits, np.zeros(images, bool), labels, groups.tolist(), groups % FOLDS)


def test_the_answers_of_a_fold_do_not_depend_on_its_labels():
    images = draw(0)
    inside = images.folds == 0
    labels = np.where(inside, 3 - images.labels, images.labels)
    probs, answers = cross_validate(SPEC, images, PROMISES)
    other_probs, others = cross_validate(SPEC, images._replace(labels=labels), PROMISES)
    assert np.array_equal(probs[inside], other_probs[inside])
    assert np.array_equal(answers.refer[inside], others.refer[inside])
    assert not np.array_equal(probs[~inside], other_probs[~inside])  # which are calibrated with those labels


def test_an_image_that_a_gate_refers_is_referred():
    images = draw(1)
    flagged = np.arange(IMAGES) % 10 == 0
    _, answers = cross_validate(SPEC, images._replace(flagged=flagged), PROMISES)
    assert answers.refer[flagged].all() and not answers.refer.all()


@pytest.mark.medium
def test_promises_are_kept_on_new_microscopes_and_foretold_by_the_left_out_folds():
    """Coverage per grade within 2 points on average over draws, and the target in nine of ten draws."""
    distances, foretold, measured, kept = [], [], [], 0
    for seed in range(20):
        images = draw(seed)
        _, left_out = cross_validate(SPEC, images, PROMISES)
        fitted = fit_decision_out_of_fold(SPEC, images, PROMISES)
        new = draw(1000 + seed, microscopes=200, images=8000)
        _, answers = answer(fitted, new)
        wrong = measure_share("wrong", new.labels, answers.grades, answers.refer)
        kept += wrong is None or wrong <= LIMIT + SAMPLING
        by_grade = np.array([answers.covered[new.labels == grade].mean() for grade in range(4)])
        distances.append(by_grade - fitted.conformal.coverage)
        foretold.append(left_out.covered.mean())
        measured.append(answers.covered.mean())
    assert np.mean(distances, axis=0) == pytest.approx(0, abs=0.02)
    assert np.mean(foretold) == pytest.approx(np.mean(measured), abs=0.02)
    assert kept >= 18


def test_an_equally_good_student_is_rarely_called_worse():
    """Its logits have another scale, and its calibration is of the few groups of the validation split."""
    called = 0
    for seed in range(10):
        pooled = fit_decision_out_of_fold(SPEC, draw(seed), PROMISES)
        validated = draw(500 + seed, microscopes=8, images=280, scale=0.7)
        own = fit_decision_out_of_fold(SPEC, validated, PROMISES)
        student = with_rules(own, pooled)
        assert (student.temperature, student.conformal) == (own.temperature, pooled.conformal)
        of_folds = validated._replace(logits=validated.logits / 0.7 * 2)
        pair = [answer(*each)[1] for each in ((pooled, of_folds), (student, validated))]
        called += bool(list_worse(validated.labels, *pair, validated.groups))
    assert called <= 1


def test_a_student_that_keeps_promises_worse_than_the_folds_is_found_out():
    images = draw(0)
    pooled = fit_decision_out_of_fold(SPEC, images, PROMISES)
    _, by_folds = answer(pooled, images)
    sure = images._replace(logits=10 * images.logits)  # of itself: sets of one grade, none referred
    _, by_student = answer(pooled, sure)
    assert list_worse(images.labels, by_folds, by_student, images.groups) == [
        "coverage",
        "wrong_among_answered",
    ]


def test_soft_labels_are_distributions_that_keep_the_grade_of_the_label():
    probs = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    labels = np.arange(50) % 4
    soft = mix_labels(labels, probs)
    assert soft.sum(axis=1) == pytest.approx(1)
    assert (soft.argmax(axis=1) == labels).all()
