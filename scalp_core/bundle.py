"""A trained classifier as a directory, local or in S3: weights, and everything needed to use them right.

    model.safetensors   the weights
    bundle.json         the contract below, with the sha256 of the weights and of itself
    MODEL_CARD.md       what it is for, what it reached, on what data
    *.png               figures of its training and evaluation

Loading checks both hashes and the schema version, and never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import GRADE_NAMES
from scalp_core.preprocess import Preprocess

if TYPE_CHECKING:
    import torch  # takes seconds: at run time only where weights are touched

SCHEMA_VERSION: Literal[1] = 1
WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "bundle.json"
CARD_FILE = "MODEL_CARD.md"


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


class Training(BaseModel):
    """Where the weights come from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="the whole recipe as it was run")
    initial_weights: str = Field(description="imagenet, none, or the file that training started from")
    workers: int = Field(description="data-parallel workers")
    best_epoch: int = Field(description="the epoch kept, by validation kappa; the first is 1")
    data_sha256: str = Field(description="hash of the manifest that was trained on")
    grade_counts: list[int] = Field(description="photographs of each grade in the training part")


class BundleSpec(BaseModel):
    """The contract in `bundle.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(description="the run's name")
    created_at: datetime
    grade_names: tuple[str, ...] = GRADE_NAMES
    architecture: str = Field(description="timm name")
    preprocess: Preprocess
    temperature: float = Field(description="logits are divided by it; fitted on validation")
    conformal: Conformal
    referral: Referral = Referral()
    training: Training
    metrics: dict[str, Any] = Field(description="by data part; validation at least")
    versions: dict[str, str] = Field(description="of the libraries it was trained with")
    git_revision: str | None = Field(description="of this program; None outside a checkout")
    weights_sha256: str

    @property
    def model_version(self) -> str:
        """Names the exact weights in every answer: the run's name and the start of their hash."""
        return f"{self.name}-{self.weights_sha256[:12]}"

    @property
    def majority_grade(self) -> int:
        """The commonest grade of the training part; what the majority baseline answers."""
        counts = self.training.grade_counts
        return counts.index(max(counts))


class Bundle:
    """A loaded bundle: its contract and its weights.

    Args:
        spec: the contract.
        state: weights by name, as `nn.Module.load_state_dict` takes them.
    """

    def __init__(self, spec: BundleSpec, state: dict[str, torch.Tensor]) -> None:
        self.spec = spec
        self.state = state


def serialise_weights(state: dict[str, torch.Tensor]) -> bytes:
    """Weights as safetensors bytes; contiguous, on the CPU."""
    import safetensors.torch

    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def load_weights(data: bytes) -> dict[str, torch.Tensor]:
    """The inverse of `serialise_weights`."""
    import safetensors.torch

    return safetensors.torch.load(data)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def save_bundle(uri: str, spec: BundleSpec, weights: bytes, files: dict[str, bytes] | None = None) -> None:
    """Writes a bundle; `bundle.json` last, so that what has one is whole.

    Args:
        uri: directory, local or `s3://`.
        weights: from `serialise_weights`; `spec.weights_sha256` is their hash.
        files: further files by name (the card, figures).
    """
    storage.write(storage.join(uri, WEIGHTS_FILE), weights)
    for name, data in (files or {}).items():
        storage.write(storage.join(uri, name), data)
    content = spec.model_dump(mode="json")
    text = json.dumps({**content, "spec_sha256": _spec_hash(content)}, indent=2, ensure_ascii=False)
    storage.write(storage.join(uri, SPEC_FILE), text.encode())


def load_bundle(uri: str) -> Bundle:
    """Loads and checks a bundle, or a run's directory that holds one.

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
    spec = _read_spec(uri)
    weights = storage.read(storage.join(uri, WEIGHTS_FILE))
    if sha256(weights) != spec.weights_sha256:
        raise _damaged(uri, WEIGHTS_FILE, "does not match its sha256")
    return Bundle(spec, load_weights(weights))


def _read_spec(uri: str) -> BundleSpec:
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
    try:
        return BundleSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(uri, SPEC_FILE, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _spec_hash(content: dict[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def _damaged(uri: str, file: str, how: str) -> UserError:
    return UserError(f"{uri}: {file} {how}; the copy is damaged or was changed: copy the bundle again")
