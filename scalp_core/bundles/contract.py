"""The contract of a bundle, in `bundle.json`: what inference needs to know of a model, and its provenance."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from scalp_core.datasets.manifest import ReviewedLabels, SplitSpec
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.evaluation.targets import Target
from scalp_core.grades import GRADE_NAMES, SYMPTOM_IDS
from scalp_core.images.gates import Gates
from scalp_core.images.preprocess import Preprocess

SCHEMA_VERSION: Literal[2] = 2
READ_VERSIONS = (1, 2)  # bundles of version 1 grade one symptom
WEIGHTS_FILE = "model.safetensors"

GraphKind = Literal["float", "int8"]
Head = Literal["softmax", "corn"]

GRAPH_FILES: dict[GraphKind, tuple[str, str]] = {
    "float": ("model.xml", "model.bin"),
    "int8": ("model-int8.xml", "model-int8.bin"),
}

# Arguments of `timm.create_model` that scalp sets, or by which a bundle could read other files.
_RESERVED_KEYWORDS = {
    "cache_dir", "checkpoint_path", "features_only", "in_chans", "model_name", "num_classes", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict",
}  # fmt: skip


def _check_keywords(keywords: dict[str, Any]) -> dict[str, Any]:
    if reserved := sorted(_RESERVED_KEYWORDS & keywords.keys()):
        raise ValueError(f"scalp sets {', '.join(reserved)}; omit it")
    return keywords


ModelKeywords = Annotated[dict[str, Any], AfterValidator(_check_keywords)]
"""Keywords of `timm.create_model`, such as `drop_path_rate`."""


class Conformal(BaseModel):
    """Conformal grade sets with a promised coverage (`inference.calibration`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coverage: float = Field(
        description="promised share of grade sets that contain the true grade, for each true grade"
    )
    quantile: float | None = Field(
        None, description="largest score that a set includes; of older bundles, without thresholds"
    )
    thresholds: tuple[float, ...] | None = Field(
        None, description="least conformity of each grade in a set (`inference.conformal`)"
    )
    groups: int | None = Field(
        None, description="groups (microscopes or sessions) of the images that the thresholds were fitted on"
    )
    grade_groups: tuple[int, ...] | None = Field(
        None, description="groups with images of each grade; 0: too few to promise coverage for this grade"
    )


class Referral(BaseModel):
    """The referral rule: when a person should look at the image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_set_size: int = Field(1, description="refer when the grade set is larger than this")
    min_confidence: float = Field(
        0.5, description="refer below this probability of the likeliest grade; above 1: refer each image"
    )
    max_tail: float | None = Field(
        None,
        description="refer images graded good or mild above this probability of moderate or worse; None: no",
    )
    targets: tuple[Target, ...] | None = Field(
        None, description="targets that the thresholds were fitted to; None: thresholds without a target"
    )


class LocalCalibration(BaseModel):
    """Images that `scalp calibrate` fitted a bundle to, after its training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_version: str = Field(description="version of the bundle before")
    data_sha256: str = Field(description="hash of the manifest")
    images: int = Field(description="number of images")
    groups: int = Field(description="groups of the images: microscopes or sessions")


class OtherSymptom(BaseModel):
    """A symptom that the model grades in addition to that of `grade`, by four outputs more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="a name as in `symptom`")
    images: int = Field(description="training images with a label of it")
    temperature: float | None = Field(
        None, description="divisor of its logits, fitted on validation; None: too few labels, so no grade"
    )


class GraphRecord(BaseModel):
    """An OpenVINO graph of the bundle, and its measured difference from the weights in fp32."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    xml_sha256: str = Field(description="hash of the `.xml` file")
    weights_sha256: str = Field(description="hash of the `.bin` file")
    photographs: int = Field(description="validation images, graded both ways")
    max_logit_difference: float = Field(description="largest difference of a logit")
    grade_agreement: float = Field(description="share of images that get the same grade")
    qwk_drop: float = Field(description="kappa of the weights minus kappa of the graph")
    openvino: str = Field(description="OpenVINO version that converted the model")
    comparison: Comparison | None = Field(None, description="non-inferiority to the weights; of int8 only")


class InitialWeights(BaseModel):
    """Origin of the initial weights of a training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="imagenet, offline, none, or the file, as the user wrote it")
    tensors: int = Field(0, description="weight tensors of the model")
    taken: int = Field(0, description="weight tensors loaded from the file; the others were random")
    head_kept: bool = Field(
        False, description="whether the file's head fitted; otherwise the head was random"
    )
    tag: str | None = Field(None, description="timm name with the tag of the weights; for imagenet")
    url: str | None = Field(None, description="address of the file or package; for imagenet and offline")
    sha256: str | None = Field(None, description="hash of the file; None without one")

    def __str__(self) -> str:
        if self.source == "none":
            return "none (random)"
        head = "its head kept" if self.head_kept else "a new head"
        origin = "".join(f"{part}, " for part in (self.tag, self.url) if part)
        return f"{self.source} ({origin}sha256 {self.sha256}; {self.taken} of {self.tensors} tensors, {head})"


class Teachers(BaseModel):
    """Models of cross-validation whose out-of-fold answers a model learned from (`scalp train --folds`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...] = Field(description="versions of the models, by fold")
    share: float = Field(
        description="share of their probabilities in a training label; the rest is the label"
    )
    images: int = Field(description="images with an out-of-fold answer")
    groups: int = Field(description="their groups: microscopes or sessions")
    decide: bool = Field(
        False,
        description="whether grade sets and referral rule are fitted on these answers; false: on val",
    )


class Training(BaseModel):
    """Provenance of the weights: recipe, data, split and best epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="complete recipe of the run")
    initial_weights: InitialWeights = Field(description="where the training began")
    workers: int = Field(description="data-parallel workers")
    best_epoch: int = Field(description="epoch with the best validation kappa, from 1")
    data_sha256: str = Field(description="hash of the training manifest")
    labels_sha256: str | None = Field(
        None, description="hash of the grades of all symptoms in it; None if the model learned one symptom"
    )
    grade_counts: list[int] = Field(
        description="training images per grade; an image with a soft label counts for its likeliest grade"
    )
    grade_mix_limit: float | None = Field(
        None,
        description="population stability index of the grade mix that 95 % of the training groups keep, each "
        "compared with the rest; None: fewer than five groups of 30 images",
    )
    split: SplitSpec | None = Field(None, description="how the splits were assigned; None in older bundles")
    fold: int | None = Field(None, description="cross-validation fold that was the validation split")
    synthetic: bool = Field(False, description="whether scalp synth rendered some of the images")
    reviews: tuple[ReviewedLabels, ...] = Field((), description="answers of readers among the labels")
    extends: tuple[str, ...] = Field(
        (), description="hashes of earlier training manifests with the same val and test splits, oldest first"
    )
    teachers: Teachers | None = Field(None, description="models that taught this one; None: labels alone")


class BundleSpec(BaseModel):
    """The contract in `bundle.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = Field(SCHEMA_VERSION, description="version of this contract")
    name: str = Field(description="name of the run")
    created_at: datetime = Field(description="end of the training, with its time zone")
    grade_names: tuple[str, ...] = Field(GRADE_NAMES, description="names of the grades, from 0")
    architecture: str = Field(description="timm name")
    head: Head = Field(
        "softmax", description="how the last layer's outputs become four logits (models.architecture)"
    )
    model: ModelKeywords = Field({}, description="further keywords of `timm.create_model`")
    symptom: str = Field(SYMPTOM_IDS[0], description=f"symptom of `grade`: {', '.join(SYMPTOM_IDS)}")
    other_symptoms: tuple[OtherSymptom, ...] = Field(
        (), description="symptoms of the outputs after the first four, in their order"
    )
    preprocess: Preprocess = Field(description="from the file to the model's input")
    temperature: float = Field(description="divisor of the logits, fitted on validation")
    bias: tuple[float, ...] | None = Field(
        None, description="added per grade to the divided logits; None: zeros"
    )
    conformal: Conformal = Field(description="sets of grades with a promised coverage")
    referral: Referral = Field(Referral(), description="when a person should look at the image")
    gates: Gates | None = Field(
        None, description="limits for out-of-distribution images; None in older bundles"
    )
    training: Training = Field(description="origin of the weights")
    calibrated_on: LocalCalibration | None = Field(
        None, description="images of `scalp calibrate`; None: calibrated on the validation split"
    )
    metrics: dict[str, Any] = Field(
        description="metrics per split; at least those of val; of scalp calibrate: calibration"
    )
    versions: dict[str, str] = Field(description="library versions of the training")
    git_revision: str | None = Field(description="git revision of scalp; None outside a checkout")
    weights_sha256: str = Field(description="hash of `model.safetensors`")
    graphs: dict[GraphKind, GraphRecord] = Field(
        {}, description="graphs for CPUs: float (runs in bf16 or fp32), int8"
    )

    @property
    def model_version(self) -> str:
        """Identifier of the exact weights: the run's name and the start of their hash.

        A model trained on a leaky split has the suffix `-leaky`, so each of its answers and plots shows it.
        """
        return f"{self.name}-{self.weights_sha256[:12]}" + ("-leaky" if self.leaky else "")

    def version_in(self, precision: str) -> str:
        """Return `model_version`, with the suffix `-int8` for int8, whose answers differ."""
        return self.model_version + ("-int8" if precision == "int8" else "")

    @property
    def fingerprint(self) -> str:
        """Hash of the contract, which contains the hashes of the weights and graphs."""
        return hash_contract(self.model_dump(mode="json"))

    @property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of the weights and graph files, by file name."""
        graphs = (
            zip(GRAPH_FILES[kind], (record.xml_sha256, record.weights_sha256), strict=True)
            for kind, record in self.graphs.items()
        )
        return {WEIGHTS_FILE: self.weights_sha256, **{name: value for pair in graphs for name, value in pair}}

    @property
    def symptoms(self) -> int:
        """Number of symptoms that the model grades, with four outputs each."""
        return 1 + len(self.other_symptoms)

    @property
    def graded_others(self) -> tuple[str, ...]:
        """Names of the other symptoms that have a grade."""
        return tuple(other.name for other in self.other_symptoms if other.temperature is not None)

    def offers(self, kind: GraphKind) -> bool:
        """Whether the bundle has this graph; an int8 graph must also have passed its comparison."""
        record = self.graphs.get(kind)
        if record is None or kind == "float":
            return record is not None
        return record.comparison is not None and record.comparison.failure is None

    @property
    def leaky(self) -> bool:
        """Whether the model was trained on a leaky split, which makes its metrics too optimistic."""
        return self.training.split is not None and self.training.split.leaky

    @property
    def warning(self) -> str | None:
        """Warning that accompanies each answer of a model trained on synthetic images; else None."""
        return "trained on synthetic images; not for clinical use" if self.training.synthetic else None

    @property
    def majority_grade(self) -> int:
        """The most common grade of the training split, which the majority baseline predicts."""
        counts = self.training.grade_counts
        return counts.index(max(counts))


def hash_contract(content: dict[str, Any]) -> str:
    """Hash the content of a contract, without its own hash."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
