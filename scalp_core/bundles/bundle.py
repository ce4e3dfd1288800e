"""The bundle: a trained classifier as a directory, local or in S3, with all that inference needs.

    model.safetensors   weights; GPUs run them
    model.xml, .bin     the same model as an OpenVINO graph; CPUs run it
    model-int8.xml, …   the graph in int8, after `scalp quantize` has made and measured it
    bundle.json         the contract `BundleSpec`, with the sha256 of every file and of itself
    MODEL_CARD.md       intended use, metrics and training data
    *.png               plots of training and evaluation

Loading checks the schema version and the hash of each file that is used. It never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.evaluation.targets import Target
from scalp_core.grades import GRADE_NAMES
from scalp_core.images.gates import Gates
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.statistics import STATISTICS_VERSION

if TYPE_CHECKING:
    import torch  # takes seconds to import: at run time only where weights are read or written

SCHEMA_VERSION: Literal[1] = 1
WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"
INITIAL_FILE = "initial.safetensors"
"""Initial weights of the training, in the run directory next to the bundle."""

GraphKind = Literal["float", "int8"]
Head = Literal["softmax", "corn"]
Part = Literal["weights", "float", "int8"]
"""The part of a bundle that a runtime executes: weights for PyTorch, a graph for OpenVINO."""

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


class Training(BaseModel):
    """Provenance of the weights: recipe, data, split and best epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="complete recipe of the run")
    initial_weights: InitialWeights = Field(description="where the training began")
    workers: int = Field(description="data-parallel workers")
    best_epoch: int = Field(description="epoch with the best validation kappa, from 1")
    data_sha256: str = Field(description="hash of the training manifest")
    grade_counts: list[int] = Field(description="training images per grade")
    grade_mix_limit: float | None = Field(
        None,
        description="population stability index of the grade mix that 95 % of the training groups keep, each "
        "compared with the rest; None: fewer than five groups of 30 images",
    )
    split: SplitSpec | None = Field(None, description="how the splits were assigned; None in older bundles")
    fold: int | None = Field(None, description="cross-validation fold that was the validation split")
    synthetic: bool = Field(False, description="whether scalp synth rendered some of the images")


class BundleSpec(BaseModel):
    """The contract in `bundle.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(SCHEMA_VERSION, description="version of this contract")
    name: str = Field(description="name of the run")
    created_at: datetime = Field(description="end of the training, with its time zone")
    grade_names: tuple[str, ...] = Field(GRADE_NAMES, description="names of the grades, from 0")
    architecture: str = Field(description="timm name")
    head: Head = Field(
        "softmax", description="how the last layer's outputs become four logits (models.architecture)"
    )
    model: ModelKeywords = Field({}, description="further keywords of `timm.create_model`")
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
        return _spec_hash(self.model_dump(mode="json"))

    @property
    def file_hashes(self) -> dict[str, str]:
        """sha256 of the weights and graph files, by file name."""
        graphs = (
            zip(GRAPH_FILES[kind], (record.xml_sha256, record.weights_sha256), strict=True)
            for kind, record in self.graphs.items()
        )
        return {WEIGHTS_FILE: self.weights_sha256, **{name: value for pair in graphs for name, value in pair}}

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


@dataclass(frozen=True)
class Graph:
    """An OpenVINO graph as IR. Input uint8 (N, size, size, 3), output float32 (N, 4) logits."""

    xml: bytes
    weights: bytes


class Bundle:
    """A loaded bundle: the contract, and files that are read and verified at their first use.

    A pickled bundle contains only the files read so far: call `fetch` before sending it to another process.

    Args:
        spec: Contract of the bundle.
        uri: Directory of the bundle; None if `files` holds every file that will be used.
        files: Contents of files by name; files that are read are added.
    """

    def __init__(
        self, spec: BundleSpec, uri: str | None = None, files: dict[str, bytes] | None = None
    ) -> None:
        self.spec = spec
        self.uri = uri
        self.files = dict(files or {})

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights by name, for `nn.Module.load_state_dict`."""
        return load_weights(self._read(WEIGHTS_FILE, self.spec.weights_sha256))

    def graph(self, kind: GraphKind) -> Graph:
        """Read the stored OpenVINO graph; older bundles have no float graph (`openvino_runtime.load_graph`).

        Raises:
            UserError: The bundle has no int8 graph that passed its comparison.
        """
        if kind == "int8" and not self.spec.offers("int8"):
            raise UserError(
                f"--precision int8: the bundle {self.spec.name} has no int8 graph; make and measure it with "
                "scalp quantize BUNDLE DATA, or use --precision auto"
            )
        record = self.spec.graphs[kind]
        xml, weights = GRAPH_FILES[kind]
        return Graph(self._read(xml, record.xml_sha256), self._read(weights, record.weights_sha256))

    def fetch(self, part: Part) -> Bundle:
        """Read and verify the files that a runtime needs, and return the bundle.

        Raises:
            UserError: A file is missing, damaged or changed, or as in `graph`.
        """
        if part == "weights" or (part == "float" and part not in self.spec.graphs):
            self._read(WEIGHTS_FILE, self.spec.weights_sha256)
        else:
            self.graph(part)
        return self

    def _read(self, name: str, expected: str) -> bytes:
        if name not in self.files:
            if self.uri is None:
                raise RuntimeError(f"{name} was not fetched")
            self.files[name] = read_file(self.uri, name, expected)
        return self.files[name]


def serialize_weights(state: dict[str, torch.Tensor]) -> bytes:
    """Serialize weights as safetensors, contiguous and on the CPU."""
    import safetensors.torch
    import torch

    # Cloned: safetensors refuses layers that share a tensor, as CoaT's do.
    contiguous = torch.contiguous_format
    return safetensors.torch.save(
        {name: value.detach().cpu().clone(memory_format=contiguous) for name, value in state.items()}
    )


def load_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Deserialize the output of `serialize_weights`."""
    import safetensors.torch

    return safetensors.torch.load(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def graph_files(kind: GraphKind, graph: Graph) -> dict[str, bytes]:
    """Return the files of a graph, by their names in a bundle."""
    return dict(zip(GRAPH_FILES[kind], (graph.xml, graph.weights), strict=True))


def save_bundle(uri: str, spec: BundleSpec, files: dict[str, bytes]) -> None:
    """Write a bundle or add files to it; `bundle.json` is written last, so its presence means complete."""
    for name, data in files.items():
        storage.write(storage.join(uri, name), data)
    storage.write(storage.join(uri, SPEC_FILE), serialize_spec(spec))


def serialize_spec(spec: BundleSpec) -> bytes:
    """Serialize a contract as the content of `bundle.json`."""
    content = spec.model_dump(mode="json")
    text = json.dumps({**content, "spec_sha256": _spec_hash(content)}, indent=2, ensure_ascii=False)
    return text.encode()


def read_file(uri: str, name: str, expected: str) -> bytes:
    """Read one file of the bundle at `uri`, and verify its sha256.

    Raises:
        UserError: The file is missing, damaged or changed.
    """
    data = storage.read(storage.join(uri, name))
    if sha256(data) != expected:
        raise _damaged(uri, name, "does not match its sha256")
    return data


def open_bundle(uri: str) -> Bundle:
    """Open a bundle, or a run directory that holds one; large files are read at their first use.

    Raises:
        UserError: The bundle is missing, damaged, changed, or has an unsupported schema version.
    """
    uri = storage.absolute(uri)
    if not storage.exists(storage.join(uri, SPEC_FILE)) and storage.exists(
        storage.join(uri, "bundle", SPEC_FILE)
    ):
        uri = storage.join(uri, "bundle")
    if not storage.exists(storage.join(uri, SPEC_FILE)):
        raise UserError(
            f"{uri} is not a bundle: it has no {SPEC_FILE}; give a directory that `scalp train` wrote"
        )
    return Bundle(read_spec(uri), uri)


def read_spec(uri: str) -> BundleSpec:
    """Read and verify the contract of the bundle at `uri`.

    Raises:
        UserError: As in `open_bundle`.
    """
    try:
        content = json.loads(storage.read(storage.join(uri, SPEC_FILE)))
        recorded = content.pop("spec_sha256")
        version = content["schema_version"]
    except (ValueError, KeyError, AttributeError):
        raise _damaged(uri, SPEC_FILE, "cannot be read") from None
    if recorded != _spec_hash(content):
        raise _damaged(uri, SPEC_FILE, "does not match its sha256")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{uri} has bundle schema {version}, this scalp reads {SCHEMA_VERSION}; "
            "use the scalp version that wrote it, or train again"
        )
    gates = content.get("gates")
    if gates and gates.get("statistics_version", 1) != STATISTICS_VERSION:
        raise UserError(
            f"{uri} has gates of image statistics that this scalp does not measure; "
            "use the scalp version that wrote it, or train again"
        )
    try:
        return BundleSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(uri, SPEC_FILE, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _spec_hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _damaged(uri: str, file: str, problem: str) -> UserError:
    return UserError(f"{uri}: {file} {problem}; the copy is damaged or was changed: copy the bundle again")
