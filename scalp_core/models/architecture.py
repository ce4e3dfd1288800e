"""The classifier: a timm architecture with a four-unit head, in timm's own names."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import Any

import timm
import torch
from torch import nn

from scalp_core.bundles.bundle import Head
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess, Resize
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE

_OUTPUTS: dict[Head, int] = {"softmax": NUM_GRADES, "corn": NUM_GRADES - 1}


class CornToLogits(nn.Module):
    """Conditional logits of P(grade > k | grade >= k), (N, 3), to log-probabilities of the grades, (N, 4)."""

    def forward(self, conditional: torch.Tensor) -> torch.Tensor:
        above = nn.functional.logsigmoid(conditional).cumsum(1)  # log P(grade > k)
        stays = nn.functional.logsigmoid(-conditional)  # log P(grade = k | grade >= k)
        return torch.cat([stays[:, :1], above[:, :-1] + stays[:, 1:], above[:, -1:]], dim=1)


def build_model(architecture: str, head: Head = "softmax", size: int | None = None) -> nn.Module:
    """The architecture with random weights, to four logits.

    Args:
        architecture: timm name, with or without the tag of its weights.
        head: `corn` has three units, and makes of them the logarithms of four probabilities.
        size: side of its square input, pixels, for architectures that are built for one; None is timm's.

    Raises:
        UserError: timm knows no such architecture, or it does not exist at this size or with this head.
    """
    return with_head(timm_model(architecture, head, size), head)


def timm_model(architecture: str, head: Head, size: int | None, pretrained: bool = False) -> nn.Module:
    """timm's model with as many units as `head` needs; `with_head` completes it."""
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.0)[0]
        raise UserError(
            f"timm has no architecture {architecture!r}; did you mean {near!r}? Try {DEFAULT_ARCHITECTURE}"
        )
    try:
        # None for a former name, which timm resolves when it builds the model.
        config: Any = timm.get_pretrained_cfg(architecture)
        config = config or timm.get_pretrained_cfg(_present_name(architecture))
    except RuntimeError:
        name, _, tag = architecture.partition(".")
        known = ", ".join(timm.list_pretrained(f"{name}.*"))
        raise UserError(
            f"timm has no weights tagged {tag!r} of {name}; choose one of {known or name}"
        ) from None
    # timm's mark of the architectures that take `img_size`: the others accept any input.
    built_for_size: dict[str, Any] = {"img_size": size} if size and config.fixed_input_size else {}
    try:
        return timm.create_model(
            architecture, num_classes=_OUTPUTS[head], pretrained=pretrained, **built_for_size
        )
    except Exception as error:
        if not built_for_size:
            raise
        raise UserError(
            f"{architecture} does not exist at {size} px ({first_line(error)}); "
            f"use --set size={config.input_size[-1]}, or an architecture for any size, such as "
            f"{DEFAULT_ARCHITECTURE}"
        ) from error


def _present_name(architecture: str) -> str:
    config: Any = timm.create_model(architecture).pretrained_cfg
    return f"{config['architecture']}.{config['tag']}" if config["tag"] else config["architecture"]


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def head_names(model: nn.Module) -> list[str]:
    """Names of the last layers with weights: one, or two in distilled architectures."""
    configuration: Any = model.pretrained_cfg
    named = configuration["classifier"]
    if not named:
        raise UserError(
            f"timm does not name the last layer of {configuration['architecture']}; "
            f"choose another architecture, such as {DEFAULT_ARCHITECTURE}"
        )
    return [_without_corn(model, name) for name in ([named] if isinstance(named, str) else named)]


def _without_corn(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name)
    return f"{name}.0" if isinstance(layer, nn.Sequential) and isinstance(layer[-1], CornToLogits) else name


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """Complete a model of `timm_model` in place, so that it answers four logits.

    Raises:
        UserError: `corn` on an architecture with two heads, whose conditional logits timm averages.
    """
    names = head_names(model)
    if head == "corn":
        if len(names) > 1:
            architecture: Any = model.pretrained_cfg
            raise UserError(
                f"loss corn needs one head, {architecture['architecture']} has {len(names)}; "
                "use --set loss=soft_ordinal, or another architecture"
            )
        # Beside the layer and not inside the model, so that every architecture has it in the same place.
        model.set_submodule(names[0], nn.Sequential(model.get_submodule(names[0]), CornToLogits()))
    return model


def to_channels_last(model: nn.Module) -> nn.Module:
    """Reorder all four-dimensional weights in place; `nn.Module.to` fails on those of five dimensions."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def preprocess_for(model: nn.Module, size: int, resize: Resize = "squash") -> Preprocess:
    """The preprocessing that belongs to the architecture's weights (timm), at the chosen size and fit."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return Preprocess(size=size, resize=resize, mean=config["mean"], std=config["std"])


def normalize(images: torch.Tensor, spec: Preprocess) -> torch.Tensor:
    """uint8 (N, size, size, 3) to float32 (N, 3, size, size) in channels_last memory, on the same device."""
    mean, scale = _constants(spec, images.device)
    # Permuting an NHWC tensor is channels_last already: no copy is made for the layout.
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _constants(spec: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Kept: a copy to the GPU at each call would be slow, and is not allowed while a CUDA graph is captured.
    with torch.inference_mode(False):
        mean = torch.tensor(spec.mean, device=device) * 255
        return mean, 1 / (torch.tensor(spec.std, device=device) * 255)
