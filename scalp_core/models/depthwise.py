"""Depthwise convolutions with fast gradients on CPUs.

With AVX-512, oneDNN has depthwise kernels for most gradients. Two gradients use general kernels, which take
ten times as long or more: of weights wider than three, and in bf16 of the input of a convolution with a
stride. They took half of a training step of EfficientNet-lite0. Measure it again by `python -m
tests.benchmarks train --architecture tf_efficientnet_lite0`. With AVX2 only, a step takes as long with
PyTorch's gradients (0.47 and 0.48 s, 40 steps each in turns).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_FAST_WIDTH = 3  # of the weights whose gradient oneDNN computes fast, for any height
_CHANNELS_LAST = torch.channels_last


class FastGradients(TorchFunctionMode):
    """Context in which depthwise `conv2d` on CPUs has the same values, and gradients by fast kernels only."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.conv2d:
            return _conv2d(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _conv2d(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Replace `functional.conv2d`, with the same arguments."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
    is_depthwise = groups == len(weight) == images.shape[1] and weight.shape[1] == 1
    is_plain = not isinstance(padding, str) and _pair(dilation) == (1, 1)
    is_slow = weight.shape[3] > _FAST_WIDTH or _is_slow_with_stride(dtype, _pair(stride))
    if not (is_depthwise and is_plain and is_slow):
        return functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.to(dtype)
    return _Depthwise.apply(images.to(dtype), weight.to(dtype), bias, _pair(stride), _pair(padding))


def _is_slow_with_stride(dtype: torch.dtype, stride: tuple[int, int]) -> bool:
    return dtype == torch.bfloat16 and stride != (1, 1)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of (N, C, H, W) by (C, 1, height, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(images, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, *_ = ctx.needs_input_grad
        gradient = gradient.contiguous(memory_format=_CHANNELS_LAST)
        return (
            _images_gradient(gradient, images, weight, ctx.stride, ctx.padding) if of_images else None,
            _weight_gradient(gradient, images, weight, ctx.stride, ctx.padding) if of_weight else None,
            gradient.sum((0, 2, 3)) if of_bias else None,
            None,
            None,
        )


def _images_gradient(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Convolve the output's gradient, with zeros between its pixels for a stride, by the flipped weight."""
    if not _is_slow_with_stride(images.dtype, stride):
        return _backward(gradient, images, weight, stride, padding, (True, False, False))[0]
    (high, wide), (rows, columns), (top, left) = weight.shape[2:], images.shape[2:], padding
    positions = rows + 2 * top - high + 1, columns + 2 * left - wide + 1
    shape = (*images.shape[:2], *positions)
    spread = torch.empty(shape, dtype=images.dtype, memory_format=_CHANNELS_LAST).zero_()
    spread[:, :, :: stride[0], :: stride[1]] = gradient
    around = high - 1 - top, wide - 1 - left
    return functional.conv2d(spread, weight.flip(2, 3), None, 1, around, 1, len(weight))


def _weight_gradient(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """Compute the gradient of a wide weight in strips of the fast width; the last two may overlap."""
    wide = weight.shape[3]
    if wide <= _FAST_WIDTH:
        return _backward(gradient, images, weight, stride, padding, (False, True, False))[1]
    padded = functional.pad(images, (padding[1], padding[1])) if padding[1] else images
    columns = (gradient.shape[3] - 1) * stride[1] + _FAST_WIDTH
    result = torch.empty_like(weight)
    for left in {*range(0, wide - _FAST_WIDTH, _FAST_WIDTH), wide - _FAST_WIDTH}:
        seen = padded[..., left : left + columns].contiguous(memory_format=_CHANNELS_LAST)
        strip = slice(left, left + _FAST_WIDTH)
        narrow = weight[..., strip]
        result[..., strip] = _backward(gradient, seen, narrow, stride, (padding[0], 0), (False, True, False))[
            1
        ]
    return result


def _backward(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.aten.convolution_backward(
        gradient, images, weight, None, stride, padding, (1, 1), False, (0, 0), len(weight), wanted
    )
