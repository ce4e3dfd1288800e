"""Import timm without TorchDynamo, which takes two thirds of the time and serves `torch.compile` alone.

torchvision imports TorchDynamo for a function, one model of timm for a decorator. Both get a stand-in that
imports it when called.

Nothing that timm makes when it is imported is garbage: without collections that takes 0.3 s less.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

_PACKAGE, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def _is_compile_supported(device: Any) -> Any:
    from torch._dynamo.utils import is_compile_supported

    return is_compile_supported(device)


def _disable(function: Any = None, recursive: bool = True, **_: Any) -> Callable[..., Any]:
    return torch._disable_dynamo(function, recursive)


@contextmanager
def _deferred_dynamo() -> Iterator[None]:
    if _PACKAGE in sys.modules:
        yield
        return
    package, utils = ModuleType(_PACKAGE), ModuleType(_UTILS)
    vars(package)["disable"] = _disable
    vars(utils)["is_compile_supported"] = _is_compile_supported
    sys.modules |= {_PACKAGE: package, _UTILS: utils}
    try:
        yield
    finally:
        del sys.modules[_PACKAGE], sys.modules[_UTILS]
        vars(torch).pop("_dynamo", None)  # PyTorch caches it there on first use


@contextmanager
def _without_collections() -> Iterator[None]:
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


with _deferred_dynamo(), _without_collections():
    import timm
    from timm.utils import ModelEmaV3

__all__ = ["ModelEmaV3", "timm"]
