"""The referral rule keeps its targets on microscopes that it was not fitted on."""

import numpy as np
import pytest

from jobs.bench.decisions import Grader, draw_images
from scalp_core.evaluation.targets import parse_targets
from scalp_core.inference import calibration
from scalp_core.inference.referral import REFER_ALL, fit_referral, is_possibly_severe


def fit(grader: Grader, seed: int, targets: str, images: int = 1272):
    logits, labels, groups = draw_images(grader, grader.microscopes, images, np.random.default_rng(seed))
    probs = calibration.probabilities(logits, 1.0)
    return fit_referral(probs, labels, groups.tolist(), np.zeros(images, bool), parse_targets(targets))


def answered(referral, seed: int, grader: Grader) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits, labels, _ = draw_images(grader, 300, 20_000, np.random.default_rng(1000 + seed))
    probs = calibration.probabilities(logits, 1.0)
    refer = (probs.max(axis=1) < referral.min_confidence) | is_possibly_severe(probs, referral.max_tail)
    return labels, probs.argmax(axis=1), ~refer


@pytest.mark.medium
@pytest.mark.parametrize("limit", [0.05, 0.1])
def test_wrong_grades_among_answered_images_stay_below_the_target_in_nine_of_ten_draws(limit):
    grader, kept, share = Grader(noise=0.2, offset=0.15, microscopes=30), [], []
    for seed in range(40):
        referral = fit(grader, seed, f"wrong<={limit:.0%}")
        labels, grades, inside = answered(referral, seed, grader)
        kept.append(not inside.any() or (grades != labels)[inside].mean() <= limit)
        share.append(inside.mean())
        (target,) = referral.targets
        assert referral.min_confidence == REFER_ALL if target.bound is None else target.bound <= limit
    assert np.mean(kept) >= 0.9
    assert np.mean(share) > 0.3  # and it answers


@pytest.mark.medium
def test_moderate_or_worse_are_found_as_often_as_stated_in_nine_of_ten_draws():
    grader, kept = Grader(noise=0.5, offset=0.3, microscopes=30), []
    for seed in range(40):
        referral = fit(grader, seed, "found>=95%")
        labels, grades, inside = answered(referral, seed, grader)
        kept.append(((~inside | (grades >= 2))[labels >= 2]).mean() >= 0.95)
        assert 0 < referral.max_tail < 0.5
        assert inside.mean() > 0.5
    assert np.mean(kept) >= 0.9


def test_a_target_that_the_images_cannot_prove_refers_each_image():
    referral = fit(Grader(noise=0.2, offset=0.1, microscopes=8), 0, "wrong<=1%", images=80)
    assert referral.min_confidence == REFER_ALL
    (target,) = referral.targets
    assert (target.images, target.share, target.answered) == (0, None, 0)
    assert "not proved by the labeled images, so each image is referred" in str(target)


def test_images_that_a_gate_refers_are_not_answered():
    grader = Grader(noise=0.2, offset=0.0, microscopes=30)
    logits, labels, groups = draw_images(grader, 30, 1272, np.random.default_rng(0))
    flagged = np.arange(1272) % 2 == 0
    labels[flagged] = 3 - labels[flagged]  # what the gates flag is graded wrong
    probs = calibration.probabilities(logits, 1.0)
    (target,) = fit_referral(probs, labels, groups.tolist(), flagged, {"wrong": 0.1}).targets
    assert 0.25 < target.answered <= 0.5
    unflagged = np.zeros(1272, bool)
    assert fit_referral(probs, labels, groups.tolist(), unflagged, {"wrong": 0.1}).targets[0].answered < 0.1


def test_without_a_target_the_set_decides():
    referral = fit(Grader(noise=0.2, offset=0.1, microscopes=8), 0, "none")
    assert (referral.max_set_size, referral.targets) == (1, None)
