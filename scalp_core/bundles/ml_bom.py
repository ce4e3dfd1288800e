"""The bill of materials of a bundle: CycloneDX 1.6 with a `machine-learning-model`, from its contract."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid5

from scalp_core.bundles.contract import WEIGHTS_FILE, BundleSpec, InitialWeights
from scalp_core.bundles.model_card import METRICS, list_warnings
from scalp_core.grades import name_symptom

_NAMESPACE = UUID("f3b86a1e-8f0a-5c4e-8d1c-1f3b5a0c9d27")
_MODEL, _DATA = "model", "training-data"

_LIMITS = (
    "Metrics hold for images like those of the validation split; another microscope or clinic can be worse.",
    "Grades of images unlike the training data mean nothing.",
)

Component = dict[str, Any]


def make_ml_bom(spec: BundleSpec) -> dict[str, Any]:
    """Make the bill of materials of a bundle; the same contract makes the same bill.

    It has no path: initial weights of a file are named by their hash alone.
    """
    libraries = [_library(name, version) for name, version in sorted(spec.versions.items())]
    scalp = {"type": "application", "name": "scalp", "version": spec.versions.get("scalp", "unknown")}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(_NAMESPACE, spec.fingerprint)}",
        "version": 1,
        "metadata": {
            "timestamp": spec.created_at.isoformat(),
            "tools": {"components": [scalp]},
            "component": _model(spec),
        },
        "components": [_training_data(spec), *libraries],
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [_DATA, *(library["bom-ref"] for library in libraries)]}
        ],
    }


def _model(spec: BundleSpec) -> Component:
    files = [
        {"type": "file", "bom-ref": name, "name": name, "hashes": _hashes(sha256)}
        for name, sha256 in sorted(spec.file_hashes.items())
    ]
    component: Component = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": spec.name,
        "version": spec.model_version,
        "description": f"Grades the severity of {name_symptom(spec.symptom)} on one image of a scalp.",
        "hashes": _hashes(spec.file_hashes[WEIGHTS_FILE]),
        "components": files,
        "modelCard": _model_card(spec),
        "properties": _properties(
            {
                "bundle_fingerprint": spec.fingerprint,
                "git_revision": spec.git_revision,
                "grade_names": ", ".join(spec.grade_names),
                "symptom": spec.symptom,
                "other_symptoms": ", ".join(other.name for other in spec.other_symptoms) or None,
                "promised_coverage": spec.conformal.coverage,
                "synthetic": spec.training.synthetic,
                "leaky": spec.leaky,
            }
        ),
    }
    if spec.training.initial_weights.taken:
        component["pedigree"] = {"ancestors": [_ancestor(spec.training.initial_weights)]}
    return component


def _ancestor(weights: InitialWeights) -> Component:
    is_file = weights.source not in ("imagenet", "offline")
    component: Component = {
        "type": "machine-learning-model",
        "name": weights.tag or ("weights of a file" if is_file else weights.source),
        "description": f"initial weights: {weights.taken} of {weights.tensors} tensors",
    }
    if weights.sha256:
        component["hashes"] = _hashes(weights.sha256)
    if weights.url and not is_file:
        component["externalReferences"] = [{"type": "distribution", "url": weights.url}]
    return component


def _training_data(spec: BundleSpec) -> Component:
    training = spec.training
    counts = dict(zip(spec.grade_names, training.grade_counts, strict=True))
    split = training.split
    values = {f"images_{name}": count for name, count in counts.items()} | {
        "manifest_sha256": training.data_sha256,
        "split": split and f"{split.ratio} ({split.method}, seed {split.seed})",
        "calibrated_on_sha256": spec.calibrated_on and spec.calibrated_on.data_sha256,
    }
    return {
        "type": "data",
        "bom-ref": _DATA,
        "name": "training data",
        "version": training.data_sha256,
        "data": [
            {
                "type": "dataset",
                "name": "manifest of the training split",
                "description": f"{sum(training.grade_counts):,} images, "
                + ("some of them synthetic" if training.synthetic else "with grades by readers"),
                "contents": {"properties": _properties(values)},
            }
        ],
    }


def _library(name: str, version: str) -> Component:
    library = {"type": "library", "bom-ref": f"library-{name}", "name": name, "version": version}
    if name == "python":
        return library | {"type": "platform"}
    return library | {"purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}"}


def _model_card(spec: BundleSpec) -> Component:
    size = f"uint8 RGB {spec.preprocess.size}x{spec.preprocess.size} ({spec.preprocess.resize})"
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "ordinal classification of images in four grades"
            + f" of each of {spec.symptoms} symptoms" * (spec.symptoms > 1),
            "architectureFamily": "image classifier",
            "modelArchitecture": spec.architecture,
            "datasets": [{"ref": _DATA}],
            "inputs": [{"format": size}],
            "outputs": [{"format": "calibrated probabilities of four grades, grade set, referral"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": _metrics(spec)},
        "considerations": {
            "users": ["trained staff of clinics; a person decides"],
            "useCases": ["research", "screening of scalp images taken through a microscope"],
            "technicalLimitations": [*list_warnings(spec), *_LIMITS],
            "ethicalConsiderations": [
                {
                    "name": "not a diagnosis",
                    "mitigationStrategy": "images with an ambiguous or unlikely grade, and images unlike the "
                    "training data, are referred to a person",
                }
            ],
        },
    }


def _metrics(spec: BundleSpec) -> list[Component]:
    metrics = []
    for split, values in spec.metrics.items():
        for name, label in METRICS.items():
            if (value := values.get(name)) is None:
                continue
            metric: Component = {"type": label, "value": f"{value:.4f}", "slice": f"{split} split"}
            if bounds := values.get("intervals", {}).get(name):
                metric["confidenceInterval"] = {
                    "lowerBound": f"{bounds['low']:.4f}",
                    "upperBound": f"{bounds['high']:.4f}",
                }
            metrics.append(metric)
    return metrics


def _hashes(sha256: str) -> list[Component]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(values: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"name": f"scalp:{name}", "value": str(value)} for name, value in values.items() if value is not None
    ]
