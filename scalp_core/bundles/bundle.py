"""A trained classifier as a directory, local or in S3: weights, and everything needed to use them right.

    model.safetensors   the weights; what GPUs run
    model.xml, .bin     the same model as an OpenVINO graph; what CPUs run
    model-int8.xml, …   the graph in int8, once `scalp quantize` has made and measured it
    bundle.json         the contract below, with the sha256 of every file and of itself
    MODEL_CARD.md       what it is for, what it reached, on what data
    *.png               figures of its training and evaluation

Loading checks the schema version and the hash of each file that is used, and never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.datasets.manifest import SplitSpec
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.grades import GRADE_NAMES
from scalp_core.images.preprocess import Preprocess
from scalp_core.images.statistics import STATISTICS_VERSION, Gates

if TYPE_CHECKING:
    import torch  # takes seconds: at run time only where weights are touched

SCHEMA_VERSION: Literal[1] = 1
WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"

GraphKind = Literal["float", "int8"]
Head = Literal["softmax", "corn"]
Part = Literal["weights", "float", "int8"]
"""What of a bundle is run: by PyTorch the weights, by OpenVINO a graph."""

GRAPH_FILES: dict[GraphKind, tuple[str, str]] = {
    "float": ("model.xml", "model.bin"),
    "int8": ("model-int8.xml", "model-int8.bin"),
}


class Conformal(BaseModel):
    """Grade sets that hold the true grade with a promised share (scalp_core.calibration)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    coverage: float = Field(description="promised share of sets that hold the true grade")
    quantile: float = Field(description="score within which a set grows, fitted on validation")


class Referral(BaseModel):
    """When a person should look at the photograph."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_set_size: int = Field(1, description="refer when the grade set is larger than this")
    min_confidence: float = Field(0.5, description="refer when the likeliest grade has less probability")


class GraphRecord(BaseModel):
    """A graph in the bundle, and how it was found to compare with the weights in fp32."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    xml_sha256: str
    weights_sha256: str
    photographs: int = Field(description="of the validation part, graded both ways")
    max_logit_difference: float
    grade_agreement: float = Field(description="share of photographs that get the same grade")
    qwk_drop: float = Field(description="kappa of the weights less that of the graph; negative is better")
    openvino: str = Field(description="version that made it")
    comparison: Comparison | None = Field(None, description="of int8: why it is not worse than the weights")


class InitialWeights(BaseModel):
    """Origin of the weights that training started from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="imagenet, none, or the file, as given")
    tensors: int = Field(0, description="weight tensors of the model")
    taken: int = Field(0, description="of them, tensors that came from the file; the others were random")
    head_kept: bool = Field(False, description="whether the file's head fitted; else a new one was drawn")
    tag: str | None = Field(None, description="timm name with the tag of its weights, of imagenet")
    url: str | None = Field(None, description="address of the file, of imagenet")
    sha256: str | None = Field(None, description="hash of the file; None of none")

    def __str__(self) -> str:
        if self.source == "none":
            return "none (random)"
        head = "its head kept" if self.head_kept else "a new head"
        origin = f"{self.tag}, {self.url}, " if self.tag else ""
        return f"{self.source} ({origin}sha256 {self.sha256}; {self.taken} of {self.tensors} tensors, {head})"


class Training(BaseModel):
    """Where the weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="the whole recipe as it was run")
    initial_weights: InitialWeights
    workers: int = Field(description="data-parallel workers")
    best_epoch: int = Field(description="the epoch kept, by validation kappa; the first is 1")
    data_sha256: str = Field(description="hash of the manifest that was trained on")
    grade_counts: list[int] = Field(description="photographs of each grade in the training part")
    split: SplitSpec | None = Field(None, description="how the parts were made; None in older bundles")
    fold: int | None = Field(None, description="of the cross-validation that was the validation part")
    synthetic: bool = Field(False, description="some images were drawn by scalp synth")


class BundleSpec(BaseModel):
    """The contract in `bundle.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(description="the run's name")
    created_at: datetime
    grade_names: tuple[str, ...] = GRADE_NAMES
    architecture: str = Field(description="timm name")
    head: Head = Field(
        "softmax", description="what makes four logits of the last layer (scalp_core.models.architecture)"
    )
    preprocess: Preprocess
    temperature: float = Field(description="logits are divided by it; fitted on validation")
    conformal: Conformal
    referral: Referral = Referral()
    gates: Gates | None = Field(
        None, description="which photographs it does not know; None in older bundles, which have no gates"
    )
    training: Training
    metrics: dict[str, Any] = Field(description="by data part; validation at least")
    versions: dict[str, str] = Field(description="of the libraries it was trained with")
    git_revision: str | None = Field(description="of this program; None outside a checkout")
    weights_sha256: str
    graphs: dict[GraphKind, GraphRecord] = Field({}, description="for CPUs: float (bf16 or fp32), int8")

    @property
    def model_version(self) -> str:
        """Names the exact weights in every answer: the run's name and the start of their hash.

        What was trained on a leaky split says so here, and with it in every answer and figure of it.
        """
        return f"{self.name}-{self.weights_sha256[:12]}" + ("-leaky" if self.leaky else "")

    def version_in(self, precision: str) -> str:
        """As `model_version`; int8 answers are those of another model, and say so."""
        return self.model_version + ("-int8" if precision == "int8" else "")

    @property
    def fingerprint(self) -> str:
        """Of the whole contract, and by the hashes in it of the weights and graphs."""
        return _spec_hash(self.model_dump(mode="json"))

    @property
    def file_hashes(self) -> dict[str, str]:
        """sha256 by name of every file that is run."""
        graphs = (
            zip(GRAPH_FILES[kind], (record.xml_sha256, record.weights_sha256), strict=True)
            for kind, record in self.graphs.items()
        )
        return {WEIGHTS_FILE: self.weights_sha256, **{name: value for pair in graphs for name, value in pair}}

    def offers(self, kind: GraphKind) -> bool:
        """Whether the bundle has this graph, and of int8 a comparison that it passed."""
        record = self.graphs.get(kind)
        if record is None or kind == "float":
            return record is not None
        return record.comparison is not None and record.comparison.failure is None

    @property
    def leaky(self) -> bool:
        """Whether it was trained on a leaky split, so that its figures flatter."""
        return self.training.split is not None and self.training.split.leaky

    @property
    def warning(self) -> str | None:
        """What to say wherever a model of synthetic images answers; None of others."""
        return "trained on synthetic images; not for clinical use" if self.training.synthetic else None

    @property
    def majority_grade(self) -> int:
        """The commonest grade of the training part; what the majority baseline answers."""
        counts = self.training.grade_counts
        return counts.index(max(counts))


@dataclass(frozen=True)
class Graph:
    """A model as OpenVINO keeps it. Input uint8 (N, size, size, 3), output float32 (N, 4) logits.

    Args:
        xml: the operations.
        weights: their constants.
    """

    xml: bytes
    weights: bytes


class Bundle:
    """A loaded bundle: its contract, and its files, read and checked when they are first used.

    To another process it takes the files that were read before it was sent: call `fetch` first.

    Args:
        spec: the contract.
        uri: the directory; None when all files that will be used are given.
        files: contents by name.
    """

    def __init__(
        self, spec: BundleSpec, uri: str | None = None, files: dict[str, bytes] | None = None
    ) -> None:
        self.spec = spec
        self.uri = uri
        self._files = dict(files or {})

    @property
    def files(self) -> dict[str, bytes]:
        """Contents by name of what was given or read so far."""
        return dict(self._files)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Weights by name, as `nn.Module.load_state_dict` takes them."""
        return load_weights(self._read(WEIGHTS_FILE, self.spec.weights_sha256))

    def graph(self, kind: GraphKind) -> Graph:
        """The stored OpenVINO graph.

        Raises:
            UserError: int8 was never made for this bundle, or has no comparison that it passed; or the bundle
                is older than graphs, see `openvino_runtime.load_graph`.
        """
        if self.spec.offers(kind):
            record = self.spec.graphs[kind]
            xml, weights = GRAPH_FILES[kind]
            return Graph(self._read(xml, record.xml_sha256), self._read(weights, record.weights_sha256))
        if kind == "float":
            raise UserError(
                f"the bundle {self.spec.name} has no float graph; save it again with this version"
            )
        raise UserError(
            f"--precision int8: the bundle {self.spec.name} has no int8 graph; make and measure it with "
            "scalp quantize BUNDLE DATA, or use --precision auto"
        )

    def fetch(self, part: Part) -> Bundle:
        """Reads and checks what is needed to run it, and returns itself.

        Raises:
            UserError: as `graph`; a file is missing, damaged or changed.
        """
        if part == "weights" or (part == "float" and part not in self.spec.graphs):
            self._read(WEIGHTS_FILE, self.spec.weights_sha256)
        else:
            self.graph(part)
        return self

    def _read(self, name: str, expected: str) -> bytes:
        if name not in self._files:
            if self.uri is None:
                raise RuntimeError(f"{name} was not fetched")
            self._files[name] = read_file(self.uri, name, expected)
        return self._files[name]


def serialize_weights(state: dict[str, torch.Tensor]) -> bytes:
    """Weights as safetensors bytes; contiguous, on the CPU."""
    import safetensors.torch
    import torch

    # Cloned: safetensors refuses layers that share a tensor, which CoaT's do.
    whole = torch.contiguous_format
    return safetensors.torch.save(
        {name: value.detach().cpu().clone(memory_format=whole) for name, value in state.items()}
    )


def load_weights(data: bytes) -> dict[str, torch.Tensor]:
    """The inverse of `serialize_weights`."""
    import safetensors.torch

    return safetensors.torch.load(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def graph_files(kind: GraphKind, graph: Graph) -> dict[str, bytes]:
    """A graph's files, by their names in a bundle."""
    return dict(zip(GRAPH_FILES[kind], (graph.xml, graph.weights), strict=True))


def save_bundle(uri: str, spec: BundleSpec, files: dict[str, bytes]) -> None:
    """Writes a bundle, or adds files to one; `bundle.json` last, so that what has one is whole.

    Args:
        uri: directory, local or `s3://`.
        spec: with the hashes of the weights and graphs.
        files: contents by name.
    """
    for name, data in files.items():
        storage.write(storage.join(uri, name), data)
    storage.write(storage.join(uri, SPEC_FILE), serialize_spec(spec))


def serialize_spec(spec: BundleSpec) -> bytes:
    """The content of `bundle.json`."""
    content = spec.model_dump(mode="json")
    text = json.dumps({**content, "spec_sha256": _spec_hash(content)}, indent=2, ensure_ascii=False)
    return text.encode()


def read_file(uri: str, name: str, expected: str) -> bytes:
    """One file of the bundle at `uri`, checked against its sha256.

    Raises:
        UserError: it is missing, damaged or changed.
    """
    data = storage.read(storage.join(uri, name))
    if sha256(data) != expected:
        raise _damaged(uri, name, "does not match its sha256")
    return data


def open_bundle(uri: str) -> Bundle:
    """Open a bundle, or a run's directory that holds one; its large files are read when they are used.

    Args:
        uri: local or `s3://`.

    Raises:
        UserError: it is missing, damaged, changed, or of a schema this version does not know.
    """
    uri = storage.absolute(uri)
    if not storage.exists(storage.join(uri, SPEC_FILE)) and storage.exists(
        storage.join(uri, "bundle", SPEC_FILE)
    ):
        uri = storage.join(uri, "bundle")
    if not storage.exists(storage.join(uri, SPEC_FILE)):
        raise UserError(f"{uri} is no bundle: it has no {SPEC_FILE}; give the directory `scalp train` wrote")
    return Bundle(read_spec(uri), uri)


def read_spec(uri: str) -> BundleSpec:
    """The contract of the bundle at `uri`.

    Raises:
        UserError: as `open_bundle`.
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
            f"{uri} has gates of other statistics than this scalp measures; "
            "use the scalp version that wrote it, or train again"
        )
    try:
        return BundleSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(uri, SPEC_FILE, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _spec_hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _damaged(uri: str, file: str, how: str) -> UserError:
    return UserError(f"{uri}: {file} {how}; the copy is damaged or was changed: copy the bundle again")
