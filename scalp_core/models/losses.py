"""Training losses of logits (N, 4) of one symptom, whose softmax gives the probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from scalp_core.grades import NUM_GRADES
from scalp_core.models.recipe import LossName


@dataclass(frozen=True)
class Loss:
    """A loss as a sum over images, and the weight that divides the sum.

    Both are added over micro-batches and workers. The loss of a global batch is the sum of the sums divided
    by the sum of the weights, for any division of the batch.

    Labels are int64 (N,), or soft labels float (N, 4): a distribution over the grades per image. The loss of
    a soft label is its mean over the distribution.

    Args:
        each: Function of logits (N, 4) and grades int64 (N,) to the losses (N,).
        weights: Function of grades int64 (N,) to the weights (N,).
    """

    each: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weights: Callable[[torch.Tensor], torch.Tensor]

    def total(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum the losses of images: a scalar."""
        return _expected_sum(lambda grades: self.each(logits, grades), labels)

    def weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Sum the weights of images: a scalar."""
        return _expected_sum(self.weights, labels)


@dataclass(frozen=True)
class SymptomLosses:
    """The losses of all symptoms of a model, added up as one `Loss` is.

    An image counts once per symptom of which it has a label, so that a symptom with few labels does not
    dominate the gradient.

    Args:
        graded: Loss of the symptom of `grade`.
        others: Losses of the other symptoms, in the order of the model's outputs.
    """

    graded: Loss
    others: tuple[Loss, ...] = ()

    def total(
        self, logits: torch.Tensor, labels: torch.Tensor, other_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Sum the losses of images: a scalar.

        Args:
            logits: float (N, 4 S), of S symptoms.
            labels: Labels of the first symptom, as `Loss` takes them.
            other_labels: int64 (N, S - 1), -1 without a label; None if S is 1.
        """
        total = self.graded.total(logits[:, :NUM_GRADES], labels)
        for place, loss in enumerate(self.others):
            grades, known = _known_labels(other_labels, place)
            start = NUM_GRADES * (place + 1)
            # All losses times 0 or 1: a selection of rows would make a GPU wait.
            total = total + (loss.each(logits[:, start : start + NUM_GRADES], grades) * known).sum()
        return total

    def weight(self, labels: torch.Tensor, other_labels: torch.Tensor | None) -> torch.Tensor:
        """Sum the weights of images: a scalar."""
        weight = self.graded.weight(labels)
        for place, loss in enumerate(self.others):
            grades, known = _known_labels(other_labels, place)
            weight = weight + (loss.weights(grades) * known).sum()
        return weight


def _known_labels(other_labels: torch.Tensor | None, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the grades (N,) of one symptom, 0 without a label, and whether each image has a label (N,)."""
    if other_labels is None:
        raise ValueError("the model grades other symptoms, and the images have no labels of them")
    labels = other_labels[:, place]
    return labels.clamp(min=0), labels >= 0


def make_losses(
    name: LossName,
    label_smoothing: float,
    grade_counts: Sequence[int],
    softness: float = 1.0,
    other_counts: Sequence[Sequence[int]] = (),
) -> SymptomLosses:
    """Make the losses of a recipe, as `make_loss` does.

    Args:
        name: As in `make_loss`; the other arguments too.
        other_counts: Training images per grade of each other symptom that the model grades.
    """
    graded = make_loss(name, label_smoothing, grade_counts, softness)
    others = (make_loss(name, label_smoothing, counts, softness) for counts in other_counts)
    return SymptomLosses(graded, tuple(others))


def _expected_sum(function: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Sum a function of grades (N,) over labels (N,), or its mean over each of the soft labels (N, 4)."""
    if not labels.is_floating_point():
        return function(labels).sum()
    shape, device = labels.shape[:1], labels.device
    by_grade = [
        function(torch.full(shape, grade, dtype=torch.long, device=device)) for grade in range(NUM_GRADES)
    ]
    return (labels * torch.stack(by_grade, dim=1)).sum()


def make_loss(
    name: LossName, label_smoothing: float, grade_counts: Sequence[int], softness: float = 1.0
) -> Loss:
    """Make the loss of a recipe.

    Args:
        name: `cross_entropy`; `weighted_cross_entropy`, with the weight 1 / sqrt(count of the grade); `corn`
            (Shi et al. 2023), for a model with the head `corn`; `soft_ordinal` (Diaz and Marathe 2019),
            cross-entropy with labels that decrease with the squared distance in grades.
        label_smoothing: Label smoothing of the two cross-entropies.
        grade_counts: Training images per grade.
        softness: Width of the labels of `soft_ordinal`, which are proportional to exp(-distance² / softness).
    """
    if name == "corn":
        return Loss(_corn_losses, _corn_weights)
    if name == "soft_ordinal":
        targets = _soft_labels(softness)

        def soft_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(logits, targets.to(logits.device)[labels], reduction="none")

        return Loss(soft_losses, _ones)
    weights = _weights(grade_counts) if name == "weighted_cross_entropy" else None

    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = None if weights is None else weights.to(logits.device)
        return functional.cross_entropy(
            logits, labels, weight=weight, label_smoothing=label_smoothing, reduction="none"
        )

    def weights_of(labels: torch.Tensor) -> torch.Tensor:
        return _ones(labels) if weights is None else weights.to(labels.device)[labels]

    return Loss(losses, weights_of)


def _ones(labels: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(labels), device=labels.device)


def _weights(grade_counts: Sequence[int]) -> torch.Tensor:
    """Compute weights with the mean 1 over the training images; 0 for a grade that does not occur."""
    counts = torch.tensor(grade_counts, dtype=torch.float32)
    weights = torch.where(counts > 0, counts.clamp(min=1).rsqrt(), 0.0)
    return weights * counts.sum() / (weights * counts).sum().clamp(min=1)  # without an image: zeros


def _soft_labels(softness: float) -> torch.Tensor:
    """Return labels (4, 4): per true grade, a distribution over grades."""
    grades = torch.arange(NUM_GRADES, dtype=torch.float32)
    return functional.softmax(-((grades[:, None] - grades[None, :]) ** 2) / softness, dim=1)


def _corn_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the conditional binary cross-entropies, summed per image.

    The head `corn` computes P(grade) as the product of the conditional probabilities P(y > k | y >= k), so
    the negative log-likelihood of an image is the sum of its binary cross-entropies.
    """
    return functional.nll_loss(logits, labels, reduction="none")


def _corn_weights(labels: torch.Tensor) -> torch.Tensor:
    """Count the binary cross-entropies: an image has one per threshold up to its grade."""
    return (labels + 1).clamp(max=NUM_GRADES - 1).float()
