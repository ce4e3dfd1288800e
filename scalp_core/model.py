"""The classifier: a timm architecture with a four-unit head, and where its first weights come from."""

from __future__ import annotations

import difflib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from scalp_core import storage
from scalp_core.bundle import Head
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.preprocess import Preprocess, Resize
from scalp_core.recipe import DEFAULT_ARCHITECTURE

_OUTPUTS: dict[Head, int] = {"softmax": NUM_GRADES, "corn": NUM_GRADES - 1}


class CornToLogits(nn.Module):
    """Conditional logits of P(grade > k | grade >= k), (N, 3), to log-probabilities of the grades, (N, 4)."""

    def forward(self, conditional: torch.Tensor) -> torch.Tensor:
        above = nn.functional.logsigmoid(conditional).cumsum(1)  # log P(grade > k)
        stays = nn.functional.logsigmoid(-conditional)  # log P(grade = k | grade >= k)
        return torch.cat([stays[:, :1], above[:, :-1] + stays[:, 1:], above[:, -1:]], dim=1)


def build_model(architecture: str, head: Head = "softmax") -> nn.Module:
    """The architecture with random weights, to four logits.

    Args:
        architecture: timm name, with or without the tag of its weights.
        head: `corn` has three units, and makes of them the logarithms of four probabilities.

    Raises:
        UserError: timm knows no such architecture.
    """
    return _with_head(_timm_model(architecture, head), head)


def _timm_model(architecture: str, head: Head, **options: Any) -> nn.Module:
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.0)[0]
        raise UserError(
            f"timm has no architecture {architecture!r}; did you mean {near!r}? Try {DEFAULT_ARCHITECTURE}"
        )
    return timm.create_model(architecture, num_classes=_OUTPUTS[head], **options)


def classifier_name(model: nn.Module) -> str:
    """The name of the last layer with weights."""
    configuration: Any = model.pretrained_cfg
    classifier = configuration["classifier"]
    name = classifier if isinstance(classifier, str) else classifier[0]
    layer = model.get_submodule(name)
    return f"{name}.0" if isinstance(layer, nn.Sequential) and isinstance(layer[-1], CornToLogits) else name


def _with_head(model: nn.Module, head: Head) -> nn.Module:
    if head == "corn":
        name = classifier_name(model)
        # Beside the layer and not inside the model, so that every architecture has it in the same place.
        model.set_submodule(name, nn.Sequential(model.get_submodule(name), CornToLogits()))
    return model


def preprocess_for(model: nn.Module, size: int, resize: Resize = "squash") -> Preprocess:
    """The preprocessing that belongs to the architecture's weights (timm), at the chosen size and fit."""
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return Preprocess(size=size, resize=resize, mean=config["mean"], std=config["std"])


def normalise(images: torch.Tensor, spec: Preprocess) -> torch.Tensor:
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


def initial_model(architecture: str, weights: str, seed: int, head: Head = "softmax") -> nn.Module:
    """The model that training starts from.

    Args:
        architecture: a timm name.
        weights: `imagenet` (from timm's hub), `none` (random, by `seed`), a local `.safetensors` or `.pth`
            file, or `s3://…` of one. A head of another size in the file is replaced by a new one.
        seed: of what is random.
        head: see `build_model`.

    Raises:
        UserError: the weights cannot be had or do not fit. Training never starts from scratch unasked.
    """
    torch.manual_seed(seed)
    model = build_model(architecture, head)  # also so that a wrong name is reported as such
    if weights == "none":
        return model
    try:
        if weights == "imagenet":
            return _with_head(_timm_model(architecture, head, pretrained=True), head)
        return _with_head(_from_file(architecture, weights, head), head)
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(_no_weights(architecture, weights, reason)) from error


def _from_file(architecture: str, weights: str, head: Head) -> nn.Module:
    suffix = Path(weights).suffix
    if suffix not in (".safetensors", ".pth"):
        raise UserError(f"--weights {weights}: give imagenet, none, or a .safetensors or .pth file")
    data = storage.read(storage.absolute(weights))
    # timm reads from a path; it unpickles with weights_only, and fits the head to four units.
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        overlay = {"file": file.name, "hf_hub_id": None, "url": ""}
        return _timm_model(architecture, head, pretrained=True, pretrained_cfg_overlay=overlay)


def _no_weights(architecture: str, weights: str, reason: str) -> str:
    return (
        f"cannot get {weights} weights for {architecture} ({reason}); three ways: --weights FILE (a local "
        ".safetensors or .pth), --weights s3://BUCKET/FILE, or --weights none to train from scratch"
    )
