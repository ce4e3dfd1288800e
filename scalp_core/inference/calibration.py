"""Calibration: temperature scaling of logits, and conformal grade sets with a promised coverage."""

from __future__ import annotations

import numpy as np


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Fit the temperature that minimizes log loss on validation data (Guo et al. 2017).

    Args:
        logits: float (N, 4).
        labels: int (N,), true grades.
    """
    from scipy.optimize import minimize_scalar  # takes 0.5 s to import, and grading does not need it
    from scipy.special import log_softmax

    def log_loss(log_t: float) -> float:
        return -float(log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    # Bounded: with a few images, all graded right, the temperature would go to zero.
    return float(np.exp(minimize_scalar(log_loss, bounds=(np.log(0.25), np.log(8)), method="bounded").x))


def finite_rows(logits: np.ndarray) -> np.ndarray:
    """Check per row whether all logits are finite: bool (N,)."""
    return np.isfinite(logits).all(axis=1)


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Compute calibrated probabilities, float64 (N, 4); uniform where a logit is not finite."""
    scaled = np.where(finite_rows(logits)[:, None], logits, 0).astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _growth(probs: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Order the grades in which a contiguous set grows around the likeliest grade.

    Returns:
        The grades in that order, and their scores: the probability mass of the set before each grade.
    """
    low = high = int(np.argmax(probs))
    order = [low]
    while len(order) < len(probs):
        below = probs[low - 1] if low > 0 else -1.0
        above = probs[high + 1] if high + 1 < len(probs) else -1.0
        if below > above:
            low -= 1
            order.append(low)
        else:
            high += 1
            order.append(high)
    return order, np.concatenate([[0.0], np.cumsum(probs[order])[:-1]])


def conformal_quantile(probs: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """Compute the conformal quantile, the largest score in sets with at least this coverage.

    Split conformal prediction with contiguous sets (ordinal APS). The likeliest grade has score 0 and is
    always in the set, so if top-1 accuracy is above `coverage`, so is the coverage of the sets.

    Args:
        probs: float (N, 4), calibrated.
        labels: int (N,), true grades.
        coverage: Promised share of sets that contain the true grade.
    """
    scores = np.empty(len(labels))
    for row, label in enumerate(labels):
        order, score = _growth(probs[row])
        scores[row] = score[order.index(int(label))]
    rank = int(np.ceil((len(labels) + 1) * coverage))
    return 1.0 if rank > len(labels) else float(np.sort(scores)[rank - 1])


def grade_set(probs: np.ndarray, quantile: float) -> list[int]:
    """Return the conformal grade set: contiguous grades around the likeliest one; at least that one.

    Args:
        probs: float (4,), calibrated.
        quantile: Largest score in the set, from `conformal_quantile`.
    """
    order, score = _growth(probs)
    # The tolerance includes a score that equals the quantile except for rounding.
    count = int(np.searchsorted(score, quantile + 1e-9, side="right"))
    return sorted(order[:count])


def mean_logits(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Average passes: return logits whose calibrated probabilities are the mean of those of all passes.

    Args:
        logits: float (K, N, 4), from K passes over the same images.
        temperature: Temperature of the bundle, which will divide the result again.

    Returns:
        float32 (N, 4).
    """
    from scipy.special import log_softmax, logsumexp

    log_probs = log_softmax(logits.astype(np.float64) / temperature, axis=2)
    return (temperature * (logsumexp(log_probs, axis=0) - np.log(len(logits)))).astype(np.float32)
