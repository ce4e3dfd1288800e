"""Inputs of the benchmarks: JPEG files, and a bundle in a local folder."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.common import provenance
from jobs.common.graphs import with_float_graph
from scalp_core.bundles.bundle import Bundle, save_bundle, serialize_weights, sha256
from scalp_core.bundles.contract import WEIGHTS_FILE, BundleSpec, Conformal, InitialWeights, Training
from scalp_core.bundles.loading import load_bundle
from scalp_core.datasets import locations as datasets_locations
from scalp_core.errors import UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.synthetic.dataset import write_dataset
from scalp_core.synthetic.plan import SynthOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

MIN_IMAGES = 16
_MAX_IMAGES = 96


def read_images(source: str | None, count: int | None = None) -> list[bytes]:
    """Read JPEG files, at most `count` (default 96).

    Args:
        source: Folder or prefix; None: generate synthetic images.
        count: Number of images.

    Raises:
        UserError: There are too few.
    """
    count = count or _MAX_IMAGES
    if source is None:
        with tempfile.TemporaryDirectory() as folder:
            drawn = Path(folder, "photographs")
            write_dataset(drawn, SynthOptions(images=count))
            return read_images(str(drawn), count)
    locations = datasets_locations.list_images(source).images[:count]
    read = datasets_locations.read_images(locations, MAX_BYTES)
    files = [data for data in read if isinstance(data, bytes) and data.startswith(b"\xff\xd8\xff")]
    if len(files) < MIN_IMAGES:
        raise UserError(f"{source} has {len(files)} JPEG files; choose a source with {MIN_IMAGES} or more")
    return files


def write_bundle(folder: str, uri: str | None, size: int, files: list[bytes]) -> Bundle:
    """Write a trained bundle with all its graphs into a local folder; without `uri`, one of random weights.

    Random weights are as fast. Their input has `size` pixels, and their graph is compared on `files`.
    """
    bundle = load_bundle(uri) if uri else _untrained(size, files)
    bundle.fetch("weights")
    for kind in bundle.spec.graphs:
        bundle.fetch(kind)
    save_bundle(folder, bundle.spec, bundle.files)
    return load_bundle(folder)


def decoded(files: list[bytes], spec: Preprocess) -> np.ndarray:
    """Decode files to uint8 (N, size, size, 3)."""
    return np.stack([decode(data, spec).pixels for data in files])


def _untrained(size: int, files: list[bytes]) -> Bundle:
    import torch

    from scalp_core.models.architecture import build_model, normalize, preprocess_for
    from scalp_core.models.recipe import DEFAULT_ARCHITECTURE

    torch.manual_seed(0)
    model = build_model(DEFAULT_ARCHITECTURE)
    preprocess = preprocess_for(model, size)
    # Across all files: those of one grade are neighbors.
    images = decoded(files[:: max(1, len(files) // MIN_IMAGES)][:MIN_IMAGES], preprocess)
    _spread_answers(model, normalize(torch.from_numpy(images), preprocess))
    weights = serialize_weights(model.state_dict())
    spec = BundleSpec(
        name="untrained",
        created_at=datetime.now(UTC),
        architecture=DEFAULT_ARCHITECTURE,
        preprocess=preprocess,
        temperature=1.0,
        conformal=Conformal(coverage=0.9, quantile=0.9),
        training=Training(
            recipe={},
            initial_weights=InitialWeights(source="none"),
            workers=0,
            best_epoch=0,
            data_sha256="",
            grade_counts=[1, 1, 1, 1],
        ),
        metrics={},
        versions=provenance.versions(),
        git_revision=None,
        weights_sha256=sha256(weights),
    )
    return with_float_graph(
        Bundle(spec, files={WEIGHTS_FILE: weights}), iter([(images[:4], np.arange(len(images[:4])))])
    )


def _spread_answers(model: nn.Module, images: torch.Tensor) -> None:
    """Make answers of random weights differ between images, so that runtimes can be compared by them.

    The four outputs are the two main directions of the features, in both senses. Of 96 images, bf16 and other
    decoders change 9 % of these grades, and none of the half with the clearest grades.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(images)
        model.eval()
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        mean = features.mean(0)
        _, scales, directions = torch.linalg.svd(features - mean, full_matrices=False)
        main = directions[:2] * (2 * len(features) ** 0.5 / scales[:2, None])  # standard deviation 2
        classifier = model.get_classifier()  # type: ignore[operator]
        classifier.weight.copy_(torch.cat([main, -main]))
        classifier.bias.copy_(-classifier.weight @ mean)
