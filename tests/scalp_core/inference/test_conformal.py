import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.bench.decisions import Grader, draw_images
from scalp_core.bundles.contract import Conformal
from scalp_core.inference import calibration, conformal

ROWS = st.lists(st.floats(0.001, 1), min_size=4, max_size=4)


def drawn(grader: Grader, images: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    microscopes = max(grader.microscopes, images // 50)
    logits, labels, groups = draw_images(grader, microscopes, images, np.random.default_rng(seed))
    return calibration.probabilities(logits, 1.0), labels, groups


def coverage(sets: list[list[int]], labels: np.ndarray) -> np.ndarray:
    held = np.array([label in grades for label, grades in zip(labels, sets, strict=True)])
    return np.array([held[labels == grade].mean() for grade in range(4)])


def test_sets_for_unseen_microscopes_hold_each_true_grade_as_often_as_promised():
    grader, found = Grader(noise=0.5, offset=0.5, microscopes=40), []
    for seed in range(20):
        fitted = conformal.fit_conformal(*drawn(grader, 1272, seed), 0.9)
        assert fitted.coverage == 0.9
        assert (fitted.groups, len(fitted.grade_groups)) == (40, 4)
        probs, labels, _ = drawn(grader, 10_000, 100 + seed)
        found.append(coverage(conformal.grade_sets(probs, fitted), labels))
    assert np.mean(found, axis=0) == pytest.approx(0.9, abs=0.02)


def test_sets_of_a_model_that_is_right_more_often_than_promised_still_have_two_grades():
    """The score of the likeliest grade was 0, so that all sets of such a model had one grade."""
    grader = Grader(noise=0.12, offset=0.0, microscopes=40)
    probs, labels, groups = drawn(grader, 1272, 0)
    top1 = (probs.argmax(axis=1) == labels).mean()
    fitted = conformal.fit_conformal(probs, labels, groups, 0.9)
    assert top1 > 0.9
    assert fitted.coverage == pytest.approx((1 + top1) / 2)
    probs, labels, _ = drawn(grader, 10_000, 1)
    sizes = np.array([len(grades) for grades in conformal.grade_sets(probs, fitted)])
    assert 0.03 < (sizes == 2).mean() < 0.3
    wrong = probs.argmax(axis=1) != labels
    assert (sizes[wrong] == 2).mean() > 3 * (sizes[~wrong] == 2).mean()


def test_a_grade_of_too_few_images_has_no_promise_of_its_own():
    probs, labels, groups = drawn(Grader(noise=0.5, offset=0.3, microscopes=12), 300, 3)
    keep = (labels > 0) | (np.cumsum(labels == 0) <= 3)
    fitted = conformal.fit_conformal(probs[keep], labels[keep], groups[keep], 0.9)
    assert fitted.grade_groups[0] == 0
    assert min(fitted.grade_groups[1:]) > 0


def test_images_of_a_single_group_count_as_groups():
    probs, labels, _ = drawn(Grader(noise=0.5, offset=0.0, microscopes=1), 500, 4)
    fitted = conformal.fit_conformal(probs, labels, ["microscope"] * 500, 0.9)
    assert fitted.groups == 1
    probs, labels, _ = drawn(Grader(noise=0.5, offset=0.0, microscopes=1), 5000, 5)
    held = [
        label in grades for label, grades in zip(labels, conformal.grade_sets(probs, fitted), strict=True)
    ]
    assert np.mean(held) == pytest.approx(0.9, abs=0.03)


def test_too_few_photographs_to_promise_anything_give_the_whole_range():
    probs = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]])
    for count in (1, 2):
        fitted = conformal.fit_conformal(probs[:count], np.array([0, 1])[:count], ["a", "b"][:count], 0.9)
        assert conformal.grade_sets(probs, fitted) == [[0, 1, 2, 3]] * 2
        assert fitted.grade_groups == (0, 0, 0, 0)


@given(ROWS, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_grade_set_is_contiguous_never_empty_and_holds_the_likeliest(weights, thresholds):
    probs = np.array([weights]) / sum(weights)
    (grades,) = conformal.grade_sets(probs, Conformal(coverage=0.9, thresholds=tuple(thresholds)))
    assert grades == list(range(grades[0], grades[-1] + 1))
    assert int(np.argmax(probs)) in grades


@given(ROWS, st.floats(0, 1))
def test_a_bundle_without_thresholds_keeps_its_sets(weights, quantile):
    """Its set grows around the likeliest grade while the mass before a grade is at most the quantile."""
    probs = np.array(weights) / sum(weights)
    (grades,) = conformal.grade_sets(probs[None], Conformal(coverage=0.9, quantile=quantile))
    assert grades == list(range(grades[0], grades[-1] + 1))
    assert int(np.argmax(probs)) in grades
    assert len(grades) == 4 or probs[grades].sum() > quantile
    ends = {grades[0], grades[-1]} - {int(np.argmax(probs))}
    inner = [sum(probs[grade] for grade in grades if grade != end) for end in ends]
    assert not ends or min(inner) <= quantile + 1e-6  # the last grade was needed


def test_sets_of_an_older_bundle_by_hand():
    probs = np.array([[0.6, 0.3, 0.1, 0.0], [0.05, 0.3, 0.4, 0.25]])
    sets = [conformal.grade_sets(probs, Conformal(coverage=0.9, quantile=q)) for q in (0.5, 0.6, 0.7, 0.95)]
    assert [row[0] for row in sets] == [[0], [0, 1], [0, 1], [0, 1, 2, 3][:3]]
    assert [row[1] for row in sets] == [[1, 2], [1, 2], [1, 2, 3], [0, 1, 2, 3]]
