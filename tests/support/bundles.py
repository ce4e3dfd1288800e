"""Bundles of untrained models."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import torch

from jobs.common import provenance
from jobs.common.graphs import with_float_graph
from scalp_core.bundles.bundle import Bundle, save_bundle, serialize_weights, sha256
from scalp_core.bundles.contract import (
    WEIGHTS_FILE,
    BundleSpec,
    Conformal,
    Head,
    InitialWeights,
    OtherSymptom,
    Training,
)
from scalp_core.grades import SYMPTOM_IDS
from scalp_core.images.preprocess import decode
from scalp_core.models.architecture import build_model, head_names, normalize, preprocess_for
from tests.support.images import jpeg
from tests.support.sizes import SMALL


def _settle_statistics(model: torch.nn.Module) -> None:
    """Set the statistics of batch normalization from images; without them all outputs are equal."""
    spec = preprocess_for(model, SMALL)
    images = torch.from_numpy(np.stack([decode(jpeg(seed), spec).pixels for seed in range(16)]))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average
    with torch.no_grad():
        model.train()(normalize(images, spec))


def _with_graph(bundle: Bundle) -> Bundle:
    images = np.stack([decode(jpeg(seed), bundle.spec.preprocess).pixels for seed in range(4)])
    return with_float_graph(bundle, iter([(images, np.arange(4))]))


def make_bundle(
    folder: Path,
    seed: int = 7,
    architecture: str = "test_resnet",
    head: Head = "softmax",
    symptoms: int = 1,
    symptom: str = SYMPTOM_IDS[0],
) -> Path:
    """Write an untrained bundle whose answers differ from image to image; the last symptom has no grade."""
    bundle = _untrained(seed, architecture, head, symptoms)
    save_bundle(str(folder), bundle.spec.model_copy(update={"symptom": symptom}), bundle.files)
    return folder


@cache
def _untrained(seed: int, architecture: str, head: Head, symptoms: int) -> Bundle:
    torch.manual_seed(seed)
    model = build_model(architecture, head, symptoms=symptoms)
    torch.nn.init.normal_(model.get_submodule(head_names(model)[0]).weight, std=0.2)
    others = SYMPTOM_IDS[1:symptoms]
    _settle_statistics(model)
    weights = serialize_weights(model.state_dict())
    spec = BundleSpec(
        name="untrained",
        created_at=datetime.now(UTC),
        architecture=architecture,
        head=head,
        other_symptoms=tuple(
            OtherSymptom(name=name, images=9, temperature=None if name == others[-1] else 2.0)
            for name in others
        ),
        preprocess=preprocess_for(model, SMALL),
        temperature=1.5,
        conformal=Conformal(coverage=0.9, quantile=0.8),
        training=Training(
            recipe={"epochs": 1},
            initial_weights=InitialWeights(source="none"),
            workers=1,
            best_epoch=1,
            data_sha256="0" * 64,
            grade_counts=[1, 5, 7, 3],
        ),
        metrics={},
        versions=provenance.versions(),
        git_revision=None,
        weights_sha256=sha256(weights),
    )
    return _with_graph(Bundle(spec, files={WEIGHTS_FILE: weights}))
