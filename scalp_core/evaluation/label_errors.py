"""Find likely wrong labels by confident learning.

Northcutt, Jiang and Chuang 2021, J. Artif. Intell. Res. 70, doi:10.1613/jair.1.12125. The probabilities must
be out-of-fold: a model that has seen a wrong label repeats it.
"""

from __future__ import annotations

import numpy as np

from scalp_core.grades import NUM_GRADES

OUT_OF_FOLD_FILE = "out_of_fold.parquet"
"""Answers of `scalp train --folds` to each image, by the bundle that was not trained on it."""

AUDIT_KIND = "audit-labels"
"""Command that lists suspect labels, in the marker of its output directory."""

SUSPECTS_FILE = "suspects.parquet"
"""Images with suspect labels, the likeliest errors first, in the output directory of `scalp audit-labels`."""


def find_label_errors(labels: np.ndarray, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find labels that are likely wrong.

    The threshold of a grade is its mean probability among the images with this label. The suggested grade of
    an image is the likeliest one that reaches its threshold. A label that differs from it is suspect.

    Args:
        labels: int (N,), 0..3.
        probs: float (N, 4), out-of-fold probabilities.

    Returns:
        Indices (K,) of the suspect images, the likeliest errors first; the suggested grade (K,) of each; and
        its margin (K,): the probability of the label minus the largest one of another grade, negative for
        most of them.
    """
    of_label = np.arange(NUM_GRADES) == labels[:, None]
    counts = of_label.sum(axis=0)
    sums = (probs * of_label).sum(axis=0)
    thresholds = np.divide(sums, counts, out=np.full(NUM_GRADES, np.inf), where=counts > 0)
    reached = np.where(probs >= thresholds, probs, -1)
    suggested = reached.argmax(axis=1)
    suspect = np.flatnonzero((reached.max(axis=1) >= 0) & (suggested != labels))
    margins = probs[of_label] - np.where(of_label, -1, probs).max(axis=1)
    order = suspect[np.argsort(margins[suspect], kind="stable")]
    return order, suggested[order], margins[order]
