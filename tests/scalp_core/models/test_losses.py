"""Losses compared with explicit definitions."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from scalp_core.models.architecture import CornToLogits, build_model
from scalp_core.models.losses import make_loss, make_losses
from scalp_core.models.recipe import CONDITIONS

COUNTS = [5, 40, 50, 20]
LOGITS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(64) % 4


def mean(loss, logits, labels):
    return loss.total(logits, labels) / loss.weight(labels)


def corn_written_out(conditional, labels):
    """The loss of Shi, Cao and Raschka (2023), as in the authors' coral-pytorch."""
    total, examples = 0.0, 0
    for task in range(3):
        chosen = labels > task - 1
        wanted = (labels[chosen] > task).float()
        examples += int(chosen.sum())
        total -= float(
            (
                functional.logsigmoid(conditional[chosen, task]) * wanted
                + functional.logsigmoid(-conditional[chosen, task]) * (1 - wanted)
            ).sum()
        )
    return total / examples


def test_corn_is_the_loss_of_its_authors():
    conditional = LOGITS[:, :3]
    loss = mean(make_loss("corn", 0.0, COUNTS), CornToLogits()(conditional), LABELS)
    assert float(loss) == pytest.approx(corn_written_out(conditional, LABELS), rel=1e-6)


def test_the_corn_head_gives_probabilities_that_fall_as_thresholds_are_passed():
    conditional = LOGITS[:, :3]
    logits = CornToLogits()(conditional)
    probabilities = logits.softmax(1)
    assert torch.allclose(logits.exp(), probabilities, atol=1e-6)  # they add up to 1 by themselves
    above = torch.sigmoid(conditional).cumprod(1)
    assert torch.allclose(1 - probabilities.cumsum(1)[:, :3], above, atol=1e-6)


def test_corn_stays_finite_for_extreme_logits():
    logits = CornToLogits()(torch.tensor([[200.0, -200.0, 200.0]], requires_grad=True))
    assert torch.isfinite(mean(make_loss("corn", 0.0, COUNTS), logits, torch.tensor([2])))


def test_weights_favor_rare_grades_and_leave_the_mean_at_one():
    loss = make_loss("weighted_cross_entropy", 0.0, COUNTS)
    labels = torch.tensor(np.repeat(range(4), COUNTS))
    logits = LOGITS[torch.arange(len(labels)) % 64]
    each = functional.cross_entropy(logits, labels, reduction="none")
    weights = torch.tensor([n**-0.5 for n in COUNTS])[labels]
    assert float(mean(loss, logits, labels)) == pytest.approx(
        float((each * weights).sum() / weights.sum()), rel=1e-5
    )


def test_soft_labels_cost_a_near_miss_less_than_a_far_one():
    loss = make_loss("soft_ordinal", 0.0, COUNTS)
    costs = [float(mean(loss, 5 * functional.one_hot(torch.tensor([said]), 4).float(), torch.tensor([0])))
             for said in range(4)]  # fmt: skip
    assert costs == sorted(costs)
    plain = make_loss("cross_entropy", 0.0, COUNTS)
    assert float(
        mean(make_loss("soft_ordinal", 0.0, COUNTS, softness=1e-3), LOGITS, LABELS)
    ) == pytest.approx(float(mean(plain, LOGITS, LABELS)), rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"])
def test_a_recipe_s_conditions_say_which_settings_change_a_loss(name):
    changed = {"label_smoothing": 0.3, "softness": 0.5}
    neutral = {condition.setting: condition.neutral for condition in CONDITIONS}
    assert changed.keys() == neutral.keys()
    plain = float(mean(make_loss(name, grade_counts=COUNTS, **neutral), LOGITS, LABELS))
    for condition in CONDITIONS:
        setting = {condition.setting: changed[condition.setting]}
        loss = float(mean(make_loss(name, grade_counts=COUNTS, **neutral | setting), LOGITS, LABELS))
        assert (loss != plain) == condition.is_met({"loss": name})


@pytest.mark.medium
@pytest.mark.parametrize("architecture", ["legacy_xception", "resnet18", "efficientnet_b0", "convnext_atto"])
def test_any_architecture_takes_the_corn_head(architecture):
    model = build_model(architecture, "corn").eval()
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 4)
    assert torch.allclose(logits.exp().sum(1), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"])
def test_the_loss_of_soft_labels_is_the_mean_over_their_grades(name):
    """Certain ones are those of their grades."""
    loss = make_loss(name, 0.0, COUNTS)
    certain = functional.one_hot(LABELS, 4).float()
    for function in (lambda labels: loss.total(LOGITS, labels), loss.weight):
        assert float(function(certain)) == pytest.approx(float(function(LABELS)), rel=1e-5)
        others = [(LABELS + step) % 4 for step in range(3)]
        soft = sum(functional.one_hot(labels, 4).float() for labels in others) / 3
        expected = np.mean([float(function(labels)) for labels in others])
        assert float(function(soft)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal"])
def test_each_labeled_symptom_of_an_image_counts_once(name):
    """The loss is that of all pairs of an image and a label; a missing label moves no output."""
    others = torch.stack([(LABELS + 1) % 4, torch.full_like(LABELS, -1), (LABELS + 3) % 4], dim=1)
    others[::3, 2] = -1
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    counts = [[1, 2, 3, 4], [0, 0, 0, 0], [4, 3, 2, 1]]
    losses = make_losses(name, 0.0, COUNTS, other_counts=counts)
    total, weight = losses.total(logits, LABELS, others), losses.weight(LABELS, others)

    expected = make_loss(name, 0.0, COUNTS).total(logits[:, :4], LABELS)
    expected_weight = make_loss(name, 0.0, COUNTS).weight(LABELS)
    for place in (0, 2):
        known, loss = others[:, place] >= 0, make_loss(name, 0.0, counts[place])
        own = logits[known][:, 4 * place + 4 : 4 * place + 8]
        expected = expected + loss.total(own, others[known, place])
        expected_weight = expected_weight + loss.weight(others[known, place])
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(weight) == pytest.approx(float(expected_weight), rel=1e-5)
    (gradient,) = torch.autograd.grad(total / weight, logits)
    assert torch.isfinite(gradient).all() and gradient[:, :4].any(1).all()
    assert not gradient[:, 8:12].any() and not gradient[::3, 12:].any() and gradient[1::3, 12:].any(1).all()


def test_the_corn_head_of_several_symptoms_is_that_of_each():
    conditional = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    parts = [CornToLogits()(part) for part in conditional.split(3, dim=1)]
    assert torch.equal(CornToLogits()(conditional), torch.cat(parts, dim=1))
