"""Training is equal for any number of workers and micro-batches: real processes, gloo, tiny models."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from scalp_core.images.preprocess import Preprocess
from scalp_core.models.architecture import build_model
from scalp_core.models.batch_norm import freeze, has_batch_norm, synchronize
from scalp_core.models.initial_weights import initial_model
from scalp_core.models.losses import make_loss, make_losses
from scalp_core.models.recipe import Recipe
from scalp_core.models.training_step import TrainingStep

LOSSES = ("cross_entropy", "weighted_cross_entropy", "corn", "soft_ordinal")
COUNTS = [5, 40, 50, 20]
STEPS, BATCH, SIZE, WORKERS = 3, 14, 32, 3  # unequal shares
# This loss with six heads, whose labels some images lack.
OF_ALL_SYMPTOMS = "soft_ordinal of all symptoms"
# A model whose batch normalization holds activations, and one without it in two micro-batches.
MODELS = {"test_efficientnet": 1, "test_convnext": 2}
CASES = [(loss, "test_efficientnet") for loss in LOSSES]
CASES += [(loss, "test_convnext") for loss in ("weighted_cross_entropy", "corn", OF_ALL_SYMPTOMS)]
# Of the loss of a step; and of the change of all weights over the run, by its norm.
LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 1e-4, 0.01


def recipe_of(loss: str, model: str, **changes: object) -> Recipe:
    settings = {
        "architecture": model, "weights": "none", "size": SIZE, "batch_size": BATCH,
        "loss": loss.partition(" ")[0], "symptoms": "all" if loss == OF_ALL_SYMPTOMS else "one",
        "accumulate": MODELS[model], "learning_rate": 1e-3, "ema_decay": 0.5, "warmup_share": 0.0,
    }  # fmt: skip
    return Recipe.model_validate(settings | changes)


def stepper(recipe: Recipe, workers: int = 1, norm: str | None = None) -> TrainingStep:
    model, _ = initial_model(recipe.architecture, "none", recipe.seed, recipe.head, symptoms=recipe.heads)
    others = [COUNTS] * (recipe.heads - 1)
    losses = make_losses(recipe.loss, recipe.label_smoothing, COUNTS, recipe.softness, others)
    norm = norm or recipe.resolve_batch_norm(workers)
    step = TrainingStep(model, recipe, losses, Preprocess(size=SIZE), STEPS, norm, bf16=False)
    step.start_average()
    step.wrap(frozen=False)
    step.train_mode()
    return step


def trained(case: tuple[str, str], rank: int, workers: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and the state of one worker."""
    recipe = recipe_of(*case)
    step = stepper(recipe, workers)
    draw = np.random.default_rng(1)
    losses = []
    for _ in range(STEPS):
        images = torch.from_numpy(draw.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8))
        labels = torch.from_numpy(draw.choice(4, BATCH, p=np.array(COUNTS) / sum(COUNTS)))
        others = torch.from_numpy(draw.integers(-1, 4, (BATCH, 5))) if recipe.heads > 1 else None
        own = slice(rank * BATCH // workers, (rank + 1) * BATCH // workers)
        sums = step(images[own], labels[own], None, None if others is None else others[own])
        if workers > 1:
            dist.all_reduce(sums)
        losses.append(float(sums[0]))
    return losses, {name: value.clone() for name, value in step.evaluated_model.state_dict().items()}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORKERS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)
    found = [trained(case, rank, WORKERS) for case in CASES]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def fork_workers(folder: Path) -> None:
    """Train in forks of a process without threads, which has imported PyTorch for all of them."""
    import torch._dynamo  # noqa: F401  # which an optimizer imports, in seconds

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORKERS


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory):
    """Results of each worker, per case."""
    folder = tmp_path_factory.mktemp("workers")
    code = f"from pathlib import Path; import {__name__} as steps; steps.fork_workers(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORKERS)]


@pytest.mark.medium
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_workers_with_unequal_shares_train_the_weights_of_one(by_rank, case):
    losses, state = trained(case, 0, 1)
    recipe = recipe_of(*case)
    start = initial_model(case[1], "none", 0, recipe.head, symptoms=recipe.heads)[0].state_dict()
    assert np.ptp(losses) > 0.01  # so that the comparison means something
    for found_losses, found in (each[CASES.index(case)] for each in by_rank):
        assert found_losses == pytest.approx(losses, rel=LOSS_TOLERANCE)
        assert found.keys() == state.keys()
        moved = sum(float((state[name] - start[name]).double().square().sum()) for name in state)
        apart = sum(float((state[name] - found[name]).double().square().sum()) for name in state)
        assert apart**0.5 < WEIGHTS_TOLERANCE * moved**0.5


def test_certain_soft_labels_train_the_weights_of_their_grades():
    draw = np.random.default_rng(2)
    images = torch.from_numpy(draw.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8))
    labels = torch.from_numpy(draw.integers(0, 4, BATCH))
    certain = torch.nn.functional.one_hot(labels, 4).float()
    found = []
    for soft in (None, certain, certain / 2 + 1 / 8):
        step = stepper(recipe_of("corn", "test_convnext"))  # in two micro-batches
        sums = step(images, labels, soft)
        found.append((sums, torch.cat([value.flatten() for value in step.model.state_dict().values()])))
    (hard, weights), (same, same_weights), (other, other_weights) = found
    assert same.tolist() == pytest.approx(hard.tolist(), rel=1e-5)
    assert torch.allclose(same_weights, weights, atol=1e-6)
    assert abs(float(other[0] - hard[0])) > 0.001 and other[1] == hard[1]  # right answers are of the labels
    assert not torch.allclose(other_weights, weights, atol=1e-6)


def test_other_symptoms_are_learned_equally_in_any_number_of_micro_batches():
    draw = np.random.default_rng(3)
    images = torch.from_numpy(draw.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8))
    labels, others = (torch.from_numpy(draw.integers(0, 4, shape)) for shape in (BATCH, (BATCH, 5)))
    others[: BATCH // 2, 0], others[:, 4] = -1, -1  # half of the labels, and none
    found = []
    for accumulate, learned in ((1, others), (4, others), (1, others.clamp(max=-1))):
        recipe = recipe_of("corn", "test_convnext", symptoms="all", accumulate=accumulate)
        step = stepper(recipe)
        before = step.model.get_classifier()[0].weight.detach().clone()
        sums = step(images, labels, None, learned)
        moved = (
            (step.model.get_classifier()[0].weight - before).abs().sum(1).unflatten(0, (6, 3)).sum(1).detach()
        )
        found.append((sums, moved))
    (whole, moved), (pieces, same), (alone, of_alone) = found
    assert pieces.tolist() == pytest.approx(whole.tolist(), rel=1e-4)
    assert torch.allclose(same, moved, atol=1e-4)
    assert (moved[:5] > 0).all() and whole[1] == alone[1]
    assert float(whole[0]) != pytest.approx(float(alone[0]), rel=1e-3)
    decayed = float(of_alone[1:].max())  # by weight decay alone
    assert float(moved[5]) <= decayed * 1.01 < float(moved[1:5].min())


def _loss_and_gradient(loss, logits, labels, cuts):
    """Separate computation, as by micro-batches or workers."""
    logits = logits.clone().requires_grad_()
    weight = sum(loss.weight(labels[cut]) for cut in cuts)
    total = sum(loss.total(logits[cut], labels[cut]) / weight for cut in cuts)
    return float(total.detach()), torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_do_not_depend_on_how_a_batch_is_cut(name):
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(32, 4, generator=draw), torch.randint(4, (32,), generator=draw)
    loss = make_loss(name, 0.05, COUNTS)
    whole, gradient = _loss_and_gradient(loss, logits, labels, [slice(0, 32)])
    assert whole == pytest.approx(float(loss.total(logits, labels) / loss.weight(labels)))
    for size in (4, 5):
        cuts = [slice(start, start + size) for start in range(0, 32, size)]
        found, of_cuts = _loss_and_gradient(loss, logits, labels, cuts)
        assert found == pytest.approx(whole, rel=1e-6)
        assert torch.allclose(of_cuts, gradient, atol=1e-7)


@pytest.mark.parametrize("architecture", ["xception41p", "test_efficientnet", "mobilenetv3_small_050"])
def test_synchronized_batch_norm_keeps_the_activations(architecture):
    """PyTorch's converter dropped all 40 of xception41p, in place."""
    torch.manual_seed(0)
    model = build_model(architecture).eval()
    images = torch.randn(2, 3, 64, 64)
    before = _activations(model)
    with torch.inference_mode():
        logits = model(images)
        synced = synchronize(model)
        assert torch.equal(synced(images), logits)
    assert _activations(synced) == before > 0
    assert all(isinstance(each, torch.nn.SyncBatchNorm) for each in synced.modules() if _is_norm(each))


def _is_norm(module):
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def _activations(model):
    """Layers that normalize and activate."""
    norms = [each for each in model.modules() if _is_norm(each)]
    return sum(not isinstance(getattr(each, "act", torch.nn.Identity()), torch.nn.Identity) for each in norms)


def test_frozen_batch_norm_learns_weights_and_keeps_statistics():
    recipe = recipe_of("cross_entropy", "test_efficientnet", ema_decay=0.0)
    step = stepper(recipe, norm="frozen")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step(torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8), torch.arange(BATCH) % 4)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "tracked" in name)
    step.train_mode()
    norms = [each for each in step.model.modules() if _is_norm(each)]
    assert norms and not any(each.training for each in norms)
    freeze(build_model("test_convnext"))


def test_batch_norm_follows_one_rule():
    few = Recipe(batch_size=32)
    assert [few.resolve_batch_norm(workers) for workers in (1, 2, 3, 8)] == [
        "worker",
        "worker",
        "sync",
        "sync",
    ]
    assert Recipe(batch_size=32, accumulate=2).resolve_batch_norm(2) == "sync"
    assert Recipe(batch_size=32, accumulate=8).resolve_batch_norm(1) == "worker"
    assert Recipe(batch_norm="frozen").resolve_batch_norm(8) == "frozen"
    with pytest.raises(ValueError, match="frozen needs pretrained weights"):
        Recipe(batch_norm="frozen", weights="none")
    assert has_batch_norm(build_model("test_resnet")) and not has_batch_norm(build_model("test_convnext"))


def test_gradients_are_clipped_to_the_norm_of_the_recipe():
    images = torch.randint(0, 256, (BATCH, SIZE, SIZE, 3), dtype=torch.uint8)
    norms = {}
    for clip in (0.0, 1e-3):
        recipe = recipe_of("cross_entropy", "test_convnext", gradient_clip=clip, ema_decay=0.0)
        step = stepper(recipe)
        step.optimizer.zero_grad = lambda **_: None  # keeps the gradients for a look
        step(images, torch.arange(BATCH) % 4)
        parameters = [each for each in step.model.parameters() if each.grad is not None]
        norms[clip] = float(torch.stack([each.grad.norm() for each in parameters]).norm())
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-2)
    assert norms[0.0] > 0.01
