import numpy as np
import pytest
from scipy.special import softmax

from jobs.bench.decisions import SHARES, Grader, draw_images
from scalp_core.inference import calibration


def sample(seed: int, count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose true temperature is known."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 2, (count, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(honest, axis=1)])
    return honest * temperature, labels


def log_loss(probs: np.ndarray, labels: np.ndarray) -> float:
    return -float(np.log(probs[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_overconfident_logits_is_found(temperature):
    logits, labels = sample(0, 4000, temperature)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("power", [0.5, 1.0], ids=["weighted_cross_entropy", "balanced sampling"])
def test_probabilities_of_a_moved_prior_have_the_shares_of_the_labels(power):
    """A temperature leaves the probability of a rare grade too large, by up to a factor of 2.6."""
    grader = Grader(noise=0.5, offset=0.0, microscopes=1)
    logits, labels, _ = draw_images(grader, 1, 1272, np.random.default_rng(3))
    new_logits, new_labels, _ = draw_images(grader, 1, 40_000, np.random.default_rng(4))
    honest = calibration.probabilities(new_logits, 1.0)
    moved = -power * np.log(SHARES)
    temperature, bias = calibration.fit_temperature_and_bias(logits + moved, labels)
    alone = calibration.fit_temperature(logits + moved, labels)
    probs = calibration.probabilities(new_logits + moved, temperature, bias)
    of_temperature = calibration.probabilities(new_logits + moved, alone)
    shares = np.bincount(new_labels) / len(new_labels)
    assert of_temperature.mean(axis=0)[0] > 1.5 * shares[0]
    assert probs.mean(axis=0) == pytest.approx(shares, abs=0.015)
    assert log_loss(probs, new_labels) == pytest.approx(log_loss(honest, new_labels), abs=0.005)
    assert log_loss(of_temperature, new_labels) > log_loss(honest, new_labels) + 0.01


def test_a_grade_without_images_keeps_a_finite_bias():
    logits, labels = sample(1, 200, 1.0)
    temperature, bias = calibration.fit_temperature_and_bias(logits[labels > 0], labels[labels > 0])
    assert np.isfinite([temperature, *bias]).all()
    assert max(map(abs, bias)) < 8


def test_scores_that_are_not_finite_stay_uniform_with_a_bias():
    logits = np.array([[np.nan, 0, 0, 0], [0, 0, 0, 0]])
    probs = calibration.probabilities(logits, 1.0, (1.0, 0.0, 0.0, 0.0))
    assert probs[0].tolist() == [0.25] * 4
    assert probs[1, 0] > 0.4
