"""What training minimises. Every loss takes logits (N, 4), of which softmax makes the probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from scalp_core.grades import NUM_GRADES
from scalp_core.recipe import LossName

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_loss(
    name: LossName, label_smoothing: float, grade_counts: Sequence[int], softness: float = 1.0
) -> Loss:
    """A loss: logits (N, 4) and labels int64 (N,) to a scalar, the mean over the photographs.

    Args:
        name: `cross_entropy`; `weighted_cross_entropy`, with weights of one over the root of a grade's
            count; `corn` (Shi et al. 2023), whose model has the head `corn`; `soft_ordinal` (Diaz and Marathe
            2019), cross-entropy with labels that fall off with the squared distance in grades.
        label_smoothing: of the first two.
        grade_counts: photographs of each grade in the training part.
        softness: of `soft_ordinal`; the label's odds fall by exp(-distance² / softness).
    """
    if name == "corn":
        return _corn
    if name == "soft_ordinal":
        targets = _soft_labels(softness)
        return lambda logits, labels: functional.cross_entropy(logits, targets.to(logits.device)[labels])
    weights = _weights(grade_counts) if name == "weighted_cross_entropy" else None

    def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = None if weights is None else weights.to(logits.device)
        return functional.cross_entropy(logits, labels, weight=weight, label_smoothing=label_smoothing)

    return cross_entropy


def _weights(grade_counts: Sequence[int]) -> torch.Tensor:
    """Weights whose mean over the training photographs is 1; a grade that does not occur has none."""
    counts = torch.tensor(grade_counts, dtype=torch.float32)
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    return weights * counts.sum() / (weights * counts).sum()


def _soft_labels(softness: float) -> torch.Tensor:
    """(4, 4): row by true grade, a distribution over grades."""
    grades = torch.arange(NUM_GRADES, dtype=torch.float32)
    return functional.softmax(-((grades[:, None] - grades[None, :]) ** 2) / softness, dim=1)


def _corn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The conditional binary cross-entropies, averaged over all of them.

    The head `corn` gives log P(grade) as the product of the conditional probabilities P(y > k | y >= k), so
    the negative log-likelihood of a photograph is the sum of its binary cross-entropies: there is one for
    each threshold up to its grade.
    """
    tasks = (labels + 1).clamp(max=NUM_GRADES - 1).sum()
    return functional.nll_loss(logits, labels, reduction="sum") / tasks
