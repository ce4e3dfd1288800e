"""The classifier: a timm architecture with a head of four grades per symptom, with timm's parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.contract import Head
from scalp_core.errors import UserError, suggest
from scalp_core.grades import NUM_GRADES
from scalp_core.images.preprocess import Preprocess, Resize
from scalp_core.models.recipe import DEFAULT_ARCHITECTURE
from scalp_core.models.timm_import import timm

_UNITS: dict[Head, int] = {"softmax": NUM_GRADES, "corn": NUM_GRADES - 1}


class CornToLogits(nn.Module):
    """Convert conditional logits of P(grade > k | grade >= k), (N, 3 S), to log-probabilities (N, 4 S)."""

    def forward(self, conditional: torch.Tensor) -> torch.Tensor:
        of_symptoms = conditional.unflatten(1, (-1, NUM_GRADES - 1))
        above = nn.functional.logsigmoid(of_symptoms).cumsum(2)  # log P(grade > k)
        stays = nn.functional.logsigmoid(-of_symptoms)  # log P(grade = k | grade >= k)
        parts = [stays[..., :1], above[..., :-1] + stays[..., 1:], above[..., -1:]]
        return torch.cat(parts, dim=2).flatten(1)


class GeneralizedMeanPool(nn.Module):
    """Generalized-mean pooling (GeM): (N, C, H, W) to (N, C, 1, 1), between average and maximum.

    Negative features count as zero. Source: Radenović, Tolias and Chum 2018, "Fine-tuning CNN image retrieval
    with no human annotation"; the exponent is their initial one, and is not learned.
    """

    EXPONENT = 3.0

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        powers = features.float().clamp(min=1e-6) ** self.EXPONENT
        return (powers.mean((2, 3), keepdim=True) ** (1 / self.EXPONENT)).to(features.dtype)


def build_model(
    architecture: str,
    head: Head = "softmax",
    size: int | None = None,
    keywords: Mapping[str, Any] | None = None,
    symptoms: int = 1,
) -> nn.Module:
    """Build the architecture with random weights and four output logits per symptom.

    Args:
        architecture: timm name, with or without the tag of its weights.
        head: Head of the model; `corn` has three units per symptom, converted to four log-probabilities.
        size: Side of the square input in pixels, for architectures with a fixed input size; None: timm's.
        keywords: Further keywords of `timm.create_model`; `global_pool` may also be `gem`.
        symptoms: Number of symptoms, S; the logits are (N, 4 S).

    Raises:
        UserError: timm lacks the architecture, or it does not support this size, head or keyword.
    """
    return with_head(timm_model(architecture, head, size, keywords, symptoms), head)


def load_model(bundle: Bundle) -> nn.Module:
    """Build the model of a bundle with its weights, on the CPU, in evaluation mode."""
    spec = bundle.spec
    model = build_model(spec.architecture, spec.head, spec.preprocess.size, spec.model, spec.symptoms)
    model.load_state_dict(bundle.state)
    return model.eval()


def timm_model(
    architecture: str,
    head: Head,
    size: int | None,
    keywords: Mapping[str, Any] | None = None,
    symptoms: int = 1,
    pretrained: bool = False,
) -> nn.Module:
    """Create timm's model with the units that `head` needs for `symptoms`; `with_head` completes it."""
    if not timm.is_model(architecture):
        fix = suggest(
            architecture,
            timm.list_models(),
            f"use {DEFAULT_ARCHITECTURE}, or a name that timm.list_models() of Python returns",
        )
        raise UserError(f"timm has no architecture {architecture!r}; {fix}")
    try:
        # None for a deprecated name, which timm resolves when it builds the model.
        config: Any = timm.get_pretrained_cfg(architecture)
        config = config or timm.get_pretrained_cfg(_current_name(architecture))
    except RuntimeError:
        name, _, tag = architecture.partition(".")
        known = ", ".join(timm.list_pretrained(f"{name}.*"))
        raise UserError(
            f"timm has no weights tagged {tag!r} of {name}; choose one of {known or name}"
        ) from None
    # `fixed_input_size` marks the architectures that take `img_size`; the others accept any input.
    built_for_size: dict[str, Any] = {"img_size": size} if size and config.fixed_input_size else {}
    arguments = built_for_size | dict(keywords or {})
    has_gem = arguments.get("global_pool") == "gem"
    if has_gem:
        arguments["global_pool"] = "avg"
    outputs = symptoms * _UNITS[head]
    try:
        model = timm.create_model(architecture, num_classes=outputs, pretrained=pretrained, **arguments)
    except Exception as error:
        if keywords:
            raise UserError(
                f"timm cannot build {architecture} with model: {dict(keywords)} ({first_line(error)}); "
                "remove or change a keyword"
            ) from error
        if not built_for_size:
            raise
        raise UserError(
            f"{architecture} does not support {size} px ({first_line(error)}); "
            f"use --set size={config.input_size[-1]}, or an architecture for any size, such as "
            f"{DEFAULT_ARCHITECTURE}"
        ) from error
    if has_gem:
        _replace_pool(model, architecture)
    return model


def _replace_pool(model: nn.Module, architecture: str) -> None:
    """Put `GeneralizedMeanPool` in the place of the average pool after the last feature map."""
    pools = [layer for layer in model.modules() if isinstance(layer, timm.layers.SelectAdaptivePool2d)]
    if not pools or not isinstance(pools[-1].pool, nn.AdaptiveAvgPool2d):
        raise UserError(
            f"{architecture} has no average pool over a feature map, which global_pool: gem replaces; "
            "remove the keyword, or use a convolutional architecture"
        )
    pools[-1].pool = GeneralizedMeanPool()


def _current_name(architecture: str) -> str:
    config: Any = timm.create_model(architecture).pretrained_cfg
    return f"{config['architecture']}.{config['tag']}" if config["tag"] else config["architecture"]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def head_names(model: nn.Module) -> list[str]:
    """Return the names of the classifier layers: one, or two in distilled architectures."""
    configuration: Any = model.pretrained_cfg
    classifier = configuration["classifier"]
    if not classifier:
        raise UserError(
            f"timm does not name the last layer of {configuration['architecture']}; "
            f"choose another architecture, such as {DEFAULT_ARCHITECTURE}"
        )
    names = [classifier] if isinstance(classifier, str) else classifier
    return [_without_corn(model, name) for name in names]


def _without_corn(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name)
    return f"{name}.0" if isinstance(layer, nn.Sequential) and isinstance(layer[-1], CornToLogits) else name


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """Complete a model from `timm_model` in place, so that it returns four logits per symptom.

    Raises:
        UserError: `corn` with an architecture of two heads, whose conditional logits timm would average.
    """
    names = head_names(model)
    if head == "corn":
        if len(names) > 1:
            architecture: Any = model.pretrained_cfg
            raise UserError(
                f"loss corn needs one head, {architecture['architecture']} has {len(names)}; "
                "use --set loss=soft_ordinal, or another architecture"
            )
        # In the place of the layer, so that it has the same position in all architectures.
        model.set_submodule(names[0], nn.Sequential(model.get_submodule(names[0]), CornToLogits()))
    return model


def to_channels_last(model: nn.Module) -> nn.Module:
    """Convert all four-dimensional weights in place; `nn.Module.to` fails on those of five dimensions."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def preprocess_for(model: nn.Module, size: int, resize: Resize = "squash") -> Preprocess:
    """Return timm's preprocessing for the architecture's weights, at the given size and resize mode."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return Preprocess(size=size, resize=resize, mean=config["mean"], std=config["std"])


def normalize(images: torch.Tensor, spec: Preprocess) -> torch.Tensor:
    """Normalize uint8 (N, size, size, 3) to float32 (N, 3, size, size), channels_last, on the same device."""
    mean, scale = _constants(spec, images.device)
    # A permuted NHWC tensor is already channels_last, so the layout needs no copy.
    return ((images.float() - mean) * scale).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _constants(spec: Preprocess, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached: a copy to the GPU per call would be slow, and is forbidden during the capture of a CUDA graph.
    with torch.inference_mode(False):
        mean = torch.tensor(spec.mean, device=device) * 255
        return mean, 1 / (torch.tensor(spec.std, device=device) * 255)
