"""Depthwise convolutions under `FastGradients` equal PyTorch's, in values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from scalp_core.models.architecture import build_model, to_channels_last
from scalp_core.models.depthwise import FastGradients

# Norm of the difference to float64, relative; where PyTorch's is larger (bf16 without AVX-512), that counts.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}
CASES: dict[str, dict[str, Any]] = {
    "3 wide": {"kernel": (3, 3), "padding": 1},
    "3 wide, stride": {"kernel": (3, 3), "padding": 1, "stride": 2},
    "5 wide": {"kernel": (5, 5), "padding": 2},
    "5 wide, stride, even input": {"kernel": (5, 5), "padding": 2, "stride": 2},
    "5 wide, stride, odd input": {"kernel": (5, 5), "stride": 2, "size": (13, 11)},
    "7 wide": {"kernel": (7, 7), "padding": 3, "bias": True},
    "4 wide, stride of 3 rows": {"kernel": (4, 4), "stride": (3, 1)},
    "flat": {"kernel": (1, 5), "padding": (0, 2)},
}


def convolve(case: dict[str, Any], dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
    """Output, and gradients of images, weight and bias, of the same random numbers in `dtype`."""
    draws = torch.Generator().manual_seed(0)
    high, wide = case["kernel"]
    shapes = [(3, 16, *case.get("size", (12, 10))), (16, 1, high, wide)] + [(16,)] * ("bias" in case)
    inputs = [torch.randn(shape, generator=draws).bfloat16().to(dtype) for shape in shapes]
    inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    for values in inputs:
        values.requires_grad_()
    images, weight, bias = inputs if "bias" in case else (*inputs, None)
    stride, padding = case.get("stride", 1), case.get("padding", 0)
    if fast:
        with FastGradients():
            output = functional.conv2d(images, weight, bias, stride, padding, groups=16)
    else:
        output = functional.conv2d(images, weight, bias, stride, padding, groups=16)
    gradient = torch.randn(output.shape, generator=draws).bfloat16().to(dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_pytorch(case: dict[str, Any], dtype: torch.dtype) -> None:
    expected, usual = convolve(case, torch.float64, fast=False), convolve(case, dtype, fast=False)
    for value, other, exact in zip(convolve(case, dtype, fast=True), usual, expected, strict=True):
        assert value.dtype == dtype and value.shape == exact.shape
        error, error_of_pytorch = (value.double() - exact).norm(), (other.double() - exact).norm()
        assert error <= max(TOLERANCES[dtype] * exact.norm(), 1.01 * error_of_pytorch)


@pytest.mark.parametrize(
    ("width", "stride", "dtype", "replaced"),
    [(3, 1, torch.bfloat16, False), (3, 2, torch.bfloat16, True), (3, 2, torch.float32, False),
     (5, 1, torch.float32, True), (5, 1, torch.bfloat16, True)],
)  # fmt: skip
def test_only_slow_gradients_are_replaced(
    width: int, stride: int, dtype: torch.dtype, replaced: bool
) -> None:
    weight = torch.ones(16, 1, width, width, dtype=dtype, requires_grad=True)
    with FastGradients():
        output = functional.conv2d(torch.ones(1, 16, 8, 8, dtype=dtype), weight, None, stride, groups=16)
    assert output.grad_fn is not None
    assert ("Depthwise" in output.grad_fn.name()) == replaced


def gradients(model: torch.nn.Module, images: torch.Tensor, fast: bool) -> torch.Tensor:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        if fast:
            with FastGradients():
                logits = model(images)
        else:
            logits = model(images)
    functional.cross_entropy(logits.float(), torch.arange(len(images)) % 4).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def test_a_model_learns_the_same_in_bf16() -> None:
    torch.manual_seed(0)
    model = to_channels_last(build_model("tf_efficientnet_lite0")).train()
    images = torch.randn(8, 3, 64, 64)
    usual, fast = (gradients(model, images, fast) for fast in (False, True))
    assert functional.cosine_similarity(usual, fast, dim=0) > 0.999
