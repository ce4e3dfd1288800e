"""Batch normalization in data-parallel training: per worker, over all workers, or frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from scalp_core.models.timm_import import timm


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the model has batch normalization, so that an output depends on the rest of its batch."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def synchronize(model: nn.Module) -> nn.Module:
    """Convert a model on GPUs to batch statistics over all workers; call it once per model.

    By timm: PyTorch's converter drops the activations inside timm's layers, and so would a second call.
    """
    return timm.layers.convert_sync_batchnorm(model)


def freeze(model: nn.Module) -> None:
    """Freeze batch normalization at its running statistics, until the next `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


class SyncOnCpu(TorchFunctionMode):
    """Context in which `batch_norm` takes its training statistics over all workers.

    It is the counterpart of `synchronize` on CPUs, which PyTorch's SyncBatchNorm does not support.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    images: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Replace `functional.batch_norm`, with the same arguments."""
    if not training:
        return functional.batch_norm(images, running_mean, running_var, weight, bias, False, momentum, eps)
    return _OverAllWorkers.apply(images, running_mean, running_var, weight, bias, momentum, eps)


class _OverAllWorkers(torch.autograd.Function):
    """Batch normalization over all workers in training, with one all-reduce forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        # The kernel of batch_norm; torch.var_mean takes 15 times as long on channels_last.
        no_statistics = torch.zeros_like(weight), torch.zeros_like(weight)
        statistics = torch.batch_norm_update_stats(images, *no_statistics, 0.0)
        mean, var = (values.double() for values in statistics)
        count = images.numel() // images.shape[1]
        sums = torch.cat([mean * count, (var + mean**2) * count, mean.new_tensor([count])])
        dist.all_reduce(sums)
        total = sums[-1]
        mean, square = (sums[:-1] / total).chunk(2)
        var = square - mean**2
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var), momentum)
        mean, var = mean.to(weight), var.clamp(min=0).to(weight)
        ctx.save_for_backward(images, weight, mean, var)
        ctx.total, ctx.eps = total, eps
        return functional.batch_norm(images, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight, mean, var = ctx.saved_tensors
        # First as if the statistics were constants; then the gradient through them, from all workers.
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, images, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([of_weight, of_bias]).double()
        dist.all_reduce(sums)
        mean_of_weight, mean_of_bias = (sums / ctx.total).to(weight)
        scale = weight * torch.rsqrt(var + ctx.eps)
        # scale * (mean_of_bias + normalized * mean_of_weight)
        through = functional.batch_norm(
            images, mean, var, scale * mean_of_weight, scale * mean_of_bias, False, 0.0, ctx.eps
        )
        return direct - through, None, None, of_weight, of_bias, None, None
