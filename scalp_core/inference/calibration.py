"""From logits to probabilities that mean what they say, and to grade sets with a promised coverage."""

from __future__ import annotations

import numpy as np


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimizes log loss on validation data (Guo et al. 2017).

    Args:
        logits: float (N, 4).
        labels: int (N,).
    """
    from scipy.optimize import minimize_scalar  # half a second to import, and not for whoever only grades
    from scipy.special import log_softmax

    def log_loss(log_t: float) -> float:
        return -float(log_softmax(logits / np.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    # Bounded: a handful of photographs that are all graded right would send the temperature to zero.
    return float(np.exp(minimize_scalar(log_loss, bounds=(np.log(0.25), np.log(8)), method="bounded").x))


def finite_rows(logits: np.ndarray) -> np.ndarray:
    """bool (N,): whether all logits of a row are finite; the others say nothing about their image."""
    return np.isfinite(logits).all(axis=1)


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Calibrated probabilities, float64 (N, 4), of logits (N, 4); equal ones where a logit is not finite."""
    scaled = np.where(finite_rows(logits)[:, None], logits, 0).astype(np.float64) / temperature
    grown = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def _growth(probs: np.ndarray) -> tuple[list[int], np.ndarray]:
    """The order in which a contiguous set around the likeliest grade takes in the grades.

    Returns:
        the grades in that order, and the score of each: the mass that was in the set before it.
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
    """The score within which grade sets hold the true grade in at least `coverage` of all cases.

    Split conformal prediction with contiguous sets (ordinal APS). The likeliest grade has score 0 and is
    always in the set, so where top-1 accuracy is above `coverage`, sets hold the truth that much oftener.

    Args:
        probs: float (N, 4), calibrated.
        labels: int (N,).
    """
    scores = np.empty(len(labels))
    for row, label in enumerate(labels):
        order, score = _growth(probs[row])
        scores[row] = score[order.index(int(label))]
    rank = int(np.ceil((len(labels) + 1) * coverage))
    return 1.0 if rank > len(labels) else float(np.sort(scores)[rank - 1])


def grade_set(probs: np.ndarray, quantile: float) -> list[int]:
    """The contiguous grades around the likeliest one whose score is within `quantile`; never empty.

    Args:
        probs: float (4,), calibrated.
    """
    order, score = _growth(probs)
    # The tolerance keeps a score that equals the quantile inside, whatever the last bit of the sum says.
    count = int(np.searchsorted(score, quantile + 1e-9, side="right"))
    return sorted(order[:count])


def mean_logits(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The logits whose calibrated probabilities are the mean of those of several passes.

    Args:
        logits: float (K, N, 4), of K passes over the same photographs.
        temperature: that the result will be divided by again.

    Returns:
        float32 (N, 4).
    """
    from scipy.special import log_softmax, logsumexp

    each = log_softmax(logits.astype(np.float64) / temperature, axis=2)
    return (temperature * (logsumexp(each, axis=0) - np.log(len(logits)))).astype(np.float32)
