"""The training step: one optimizer step, equal for any number of workers and micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess
from scalp_core.models import batch_norm, depthwise
from scalp_core.models.architecture import head_names, normalize
from scalp_core.models.losses import SymptomLosses
from scalp_core.models.recipe import BatchNorm, Recipe
from scalp_core.models.timm_import import ModelEmaV3


class TrainingStep:
    """A model with optimizer, schedule and moving average, on the processes of the default group.

    Args:
        model: Model on its device, with the same weights on all workers.
        recipe: Training recipe.
        losses: Losses from `losses.make_losses`.
        spec: Preprocessing of the model.
        steps: Number of steps in the whole run.
        norm: Batch normalization from `Recipe.resolve_batch_norm`.
        bf16: Whether to use autocast to bf16.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        losses: SymptomLosses,
        spec: Preprocess,
        steps: int,
        norm: BatchNorm,
        bf16: bool,
    ) -> None:
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device = next(model.parameters()).device
        self._sync = norm == "sync" and self.world > 1
        self.model = batch_norm.synchronize(model) if self._sync and self.device.type == "cuda" else model
        self.optimizer = _make_optimizer(self.model, recipe)
        self.schedule = LambdaLR(self.optimizer, lambda step: recipe.learning_rate_factor(step, steps))
        self.ema: ModelEmaV3 | None = None
        self._recipe, self._losses, self._spec, self._norm, self._bf16 = recipe, losses, spec, norm, bf16
        self._parallel: nn.Module = self.model
        self._frozen = False

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to validate and save: the moving average, if the recipe has one."""
        return self.ema.module if self.ema else self.model

    def start_average(self) -> None:
        """Start the moving average at the current weights, if the recipe has one."""
        if self._recipe.ema_decay:
            # Without warm-up, the initial weights would dominate the average of a short run.
            self.ema = ModelEmaV3(self.model, decay=self._recipe.ema_decay, use_warmup=True)

    def wrap(self, frozen: bool) -> None:
        """Freeze all but the last layer, or nothing, and distribute the weights of rank 0 to all workers."""
        self._frozen = frozen
        self.model.requires_grad_(not frozen)
        if frozen:
            for name in head_names(self.model):
                self.model.get_submodule(name).requires_grad_(True)
        if self.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            # Statistics of batch normalization are sent once per epoch, before the validation.
            self._parallel = DistributedDataParallel(self.model, device_ids=devices, broadcast_buffers=False)

    def train_mode(self) -> None:
        """Switch from validation to training; call it before each epoch."""
        self.model.train(not self._frozen)  # frozen layers keep their statistics too, as in Keras
        if self._frozen:
            for name in head_names(self.model):
                self.model.get_submodule(name).train()
        elif self._norm == "frozen":
            batch_norm.freeze(self.model)

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        soft_labels: torch.Tensor | None = None,
        other_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one optimizer step.

        Args:
            images: uint8 (N, size, size, 3), this worker's slice of the global batch.
            labels: int64 (N,), grades of the images.
            soft_labels: float32 (N, 4), distributions over the grades to learn instead of the labels.
            other_labels: int64 (N, S - 1), grades of the other symptoms of a model of S symptoms; -1 without
                a label.

        Returns:
            float64 (2,), to be summed over workers: the loss of the global batch, and correct predictions of
            the labels.
        """
        learned = labels if soft_labels is None else soft_labels
        weight = self._losses.weight(learned, other_labels)
        if self.world > 1:
            dist.all_reduce(weight)
        count = self._recipe.accumulate
        parts = (values.tensor_split(count) for values in (images, learned, labels))
        others = [None] * count if other_labels is None else other_labels.tensor_split(count)
        micro_batches = list(zip(*parts, others, strict=True))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, (pixels, target, truth, other) in enumerate(micro_batches, 1):
            with self._reducing(number == len(micro_batches)):
                with self.autocast(), self._cpu_kernels():
                    logits = self._parallel(normalize(pixels, self._spec))
                loss = self._losses.total(logits.float(), target, other) / weight
                (loss * self.world).backward()  # workers take the mean of their gradients
            correct = (logits[:, :NUM_GRADES].argmax(1) == truth).sum()
            sums += torch.stack([loss.detach().double(), correct])
        if self._recipe.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._recipe.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.ema:
            self.ema.update(self.model, step=self.schedule.last_epoch)
        return sums

    def autocast(self) -> torch.autocast:
        """Context of the forward pass, in bf16 or fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)

    def _reducing(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Context of a micro-batch: workers exchange gradients once per step, at the last one."""
        if is_last or self.world == 1:
            return contextlib.nullcontext()
        return cast(DistributedDataParallel, self._parallel).no_sync()

    @contextlib.contextmanager
    def _cpu_kernels(self) -> Iterator[None]:
        """Context of a forward pass that replaces what PyTorch lacks or does slowly on CPUs."""
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(depthwise.FastGradients())
                if self._sync:
                    stack.enter_context(batch_norm.SyncOnCpu())
            yield


def _make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Create the optimizer by timm: no decay of biases and normalization, and a learning rate per layer."""
    from timm.optim import create_optimizer_v2  # imports TorchDynamo, which takes seconds

    optimizer = create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        fused=True,  # one pass over the weights instead of one per operation
    )
    for group in optimizer.param_groups:  # which otherwise only timm's schedulers do
        group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer
