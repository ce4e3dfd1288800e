import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from scalp_core.inference import calibration


def sample(seed: int, count: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose true temperature is known."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(0, 2, (count, 4))
    labels = np.array([rng.choice(4, p=row) for row in softmax(honest, axis=1)])
    return honest * temperature, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_overconfident_logits_is_found(temperature):
    logits, labels = sample(0, 4000, temperature)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
def test_grade_sets_of_new_photographs_hold_the_true_grade_as_often_as_promised(coverage):
    logits, labels = sample(1, 8000, 1.0)
    probs = calibration.probabilities(logits, 1.0)
    quantile = calibration.conformal_quantile(probs[:4000], labels[:4000], coverage)
    sets = [calibration.grade_set(row, quantile) for row in probs[4000:]]
    held = np.mean([label in grades for label, grades in zip(labels[4000:], sets, strict=True)])
    assert held == pytest.approx(coverage, abs=0.02)


@given(
    st.lists(st.floats(0.001, 1), min_size=4, max_size=4),
    st.floats(0, 1),
)
def test_a_grade_set_is_contiguous_never_empty_and_holds_the_likeliest(weights, quantile):
    probs = np.array(weights) / sum(weights)
    grades = calibration.grade_set(probs, quantile)
    assert grades == list(range(grades[0], grades[-1] + 1))
    assert int(np.argmax(probs)) in grades


def test_too_few_photographs_to_promise_anything_give_the_whole_range():
    probs = np.array([[0.7, 0.1, 0.1, 0.1]])
    quantile = calibration.conformal_quantile(probs, np.array([0]), 0.9)
    assert calibration.grade_set(probs[0], quantile) == [0, 1, 2, 3]
