"""Training losses. Every loss takes logits (N, 4), of which softmax makes the probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from scalp_core.grades import NUM_GRADES
from scalp_core.models.recipe import LossName


@dataclass(frozen=True)
class Loss:
    """A loss as a sum over images and the weight that the sum is divided by.

    Both add up over micro-batches and workers. The loss of a global batch is the sum of all sums by the sum
    of all weights, however the batch is cut.

    Args:
        total: logits (N, 4) and labels int64 (N,) to a scalar.
        weight: labels int64 (N,) to a scalar.
    """

    total: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor], torch.Tensor]

    def mean(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of a whole batch."""
        return self.total(logits, labels) / self.weight(labels)


def make_loss(
    name: LossName, label_smoothing: float, grade_counts: Sequence[int], softness: float = 1.0
) -> Loss:
    """The loss of a recipe.

    Args:
        name: `cross_entropy`; `weighted_cross_entropy`, with weights of one over the root of a grade's
            count; `corn` (Shi et al. 2023), whose model has the head `corn`; `soft_ordinal` (Diaz and Marathe
            2019), cross-entropy with labels that fall off with the squared distance in grades.
        label_smoothing: of the first two.
        grade_counts: images of each grade in the training split.
        softness: of `soft_ordinal`; the label's odds fall by exp(-distance² / softness).
    """
    if name == "corn":
        return Loss(_corn_total, _corn_weight)
    if name == "soft_ordinal":
        targets = _soft_labels(softness)

        def soft_total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(logits, targets.to(logits.device)[labels], reduction="sum")

        return Loss(soft_total, _count)
    weights = _weights(grade_counts) if name == "weighted_cross_entropy" else None

    def total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = None if weights is None else weights.to(logits.device)
        return functional.cross_entropy(
            logits, labels, weight=weight, label_smoothing=label_smoothing, reduction="sum"
        )

    def weight(labels: torch.Tensor) -> torch.Tensor:
        return _count(labels) if weights is None else weights.to(labels.device)[labels].sum()

    return Loss(total, weight)


def _count(labels: torch.Tensor) -> torch.Tensor:
    return torch.full((), float(len(labels)), device=labels.device)


def _weights(grade_counts: Sequence[int]) -> torch.Tensor:
    """Weights whose mean over the training images is 1; a grade that does not occur has none."""
    counts = torch.tensor(grade_counts, dtype=torch.float32)
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    return weights * counts.sum() / (weights * counts).sum()


def _soft_labels(softness: float) -> torch.Tensor:
    """(4, 4): row by true grade, a distribution over grades."""
    grades = torch.arange(NUM_GRADES, dtype=torch.float32)
    return functional.softmax(-((grades[:, None] - grades[None, :]) ** 2) / softness, dim=1)


def _corn_total(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the conditional binary cross-entropies.

    The head `corn` gives log P(grade) as the product of the conditional probabilities P(y > k | y >= k), so
    the negative log-likelihood of an image is the sum of its binary cross-entropies.
    """
    return functional.nll_loss(logits, labels, reduction="sum")


def _corn_weight(labels: torch.Tensor) -> torch.Tensor:
    """The number of binary cross-entropies: an image has one per threshold up to its grade."""
    return (labels + 1).clamp(max=NUM_GRADES - 1).sum().float()
