"""Calibration of logits by a temperature, and by a bias per grade if training moved the prior."""

from __future__ import annotations

import numpy as np

from scalp_core.bundles.contract import BundleSpec
from scalp_core.grades import NUM_GRADES

# Bounded: with a few images, all graded right, the temperature would go to zero.
_TEMPERATURES = (0.25, 8.0)
# Standard deviation of the normal prior of a bias: a grade without images keeps a finite one. With a hundred
# images the prior has no visible effect.
_BIAS_STD = 2.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fit the temperature that minimizes log loss on labeled images (Guo et al. 2017).

    Args:
        logits: float (N, 4).
        labels: int (N,), true grades.
    """
    from scipy.optimize import minimize_scalar  # takes 0.5 s to import, and grading does not need it

    bounds = tuple(np.log(_TEMPERATURES))
    found = minimize_scalar(
        lambda log_t: _log_loss(logits / np.exp(log_t), labels), bounds=bounds, method="bounded"
    )
    return float(np.exp(found.x))


def fit_temperature_and_bias(logits: np.ndarray, labels: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """Fit a temperature and one bias per grade, for other shares of the grades than in training.

    Bias-corrected temperature scaling (Alexandari, Kundaje and Shrikumar 2020): a loss or sampling that moves
    the prior adds the logarithm of the ratio of the priors to the logits, and a temperature cannot undo it.

    Args:
        logits: float (N, 4).
        labels: int (N,), true grades.

    Returns:
        The temperature, and biases with the mean 0, to be added to the divided logits.
    """
    from scipy.optimize import minimize

    def loss(values: np.ndarray) -> float:
        prior = (values[1:] ** 2).sum() / (2 * _BIAS_STD**2 * len(labels))
        return _log_loss(logits / np.exp(values[0]) + values[1:], labels) + prior

    bounds = [tuple(np.log(_TEMPERATURES)), *[(None, None)] * logits.shape[1]]
    found = minimize(loss, np.zeros(1 + logits.shape[1]), method="L-BFGS-B", bounds=bounds).x
    return float(np.exp(found[0])), tuple((found[1:] - found[1:].mean()).tolist())


def _log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.special import log_softmax

    return -float(log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def finite_rows(logits: np.ndarray) -> np.ndarray:
    """Check per row whether all logits are finite: bool (N,)."""
    return np.isfinite(logits).all(axis=1)


def calibrated(logits: np.ndarray, spec: BundleSpec) -> np.ndarray:
    """Compute the calibrated probabilities of a bundle, as `probabilities`."""
    return probabilities(logits, spec.temperature, spec.bias)


def probabilities(
    logits: np.ndarray, temperature: float, bias: tuple[float, ...] | None = None
) -> np.ndarray:
    """Compute probabilities, float64 (N, 4); uniform where a logit is not finite."""
    finite = finite_rows(logits)[:, None]
    scaled = np.where(finite, logits, 0).astype(np.float64) / temperature
    if bias is not None:
        scaled += np.where(finite, bias, 0)
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def mean_logits(logits: np.ndarray, spec: BundleSpec) -> np.ndarray:
    """Average passes: return logits whose calibrated probabilities are the mean of those of all passes.

    Args:
        logits: float (K, N, 4 S), from K passes over the same images.
        spec: Contract of the bundle, whose calibration will be applied to the result.

    Returns:
        float32 (N, 4 S).
    """
    calibrations = [
        (spec.temperature, spec.bias),
        *((s.temperature or 1.0, None) for s in spec.other_symptoms),
    ]
    parts = np.split(logits, logits.shape[2] // NUM_GRADES, axis=2)
    means = [_mean_logits(part, *of_part) for part, of_part in zip(parts, calibrations, strict=False)]
    return np.concatenate(means, axis=1).astype(np.float32)


def _mean_logits(logits: np.ndarray, temperature: float, bias: tuple[float, ...] | None) -> np.ndarray:
    from scipy.special import log_softmax, logsumexp

    added = np.zeros(logits.shape[2]) if bias is None else np.array(bias)
    log_probs = log_softmax(logits.astype(np.float64) / temperature + added, axis=2)
    mean = logsumexp(log_probs, axis=0) - np.log(len(logits))
    return temperature * (mean - added)
