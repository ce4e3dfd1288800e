"""Records of the model registry: claims of version numbers, and the history of promotions."""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
from collections.abc import Iterable
from datetime import datetime
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scalp_core import storage
from scalp_core.bundles.signing import Signature
from scalp_core.datasets.manifest import ReviewedLabels
from scalp_core.errors import UserError
from scalp_core.evaluation.noninferiority import Comparison
from scalp_core.evaluation.promotion_policy import PolicyResult


class Claim(BaseModel):
    """The bundle that owns a version number, and the user who added it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str = Field(description="fingerprint of the added bundle")
    source: str = Field(description="directory that it was added from")
    who: str
    when: datetime


class Evidence(BaseModel):
    """Comparison of a version with the promoted one, on the same labeled images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    against: int = Field(description="number of the promoted version")
    against_model: str = Field(description="model_version of the promoted version")
    data: str = Field(description="directory of scalp prepare; both models graded its test split")
    data_sha256: str
    same_data: bool = Field(
        description="whether the version was trained with this data; if not, it may have seen images of it"
    )
    comparison: Comparison


class Promotion(BaseModel):
    """One entry of a model's history."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: Literal["promote", "rollback"]
    version: int = Field(description="number of the version that became promoted")
    model_version: str
    who: str = Field(description="user@host")
    when: datetime
    why: str = Field("", description="reason, as the user wrote it")
    evidence: Evidence | None = Field(
        None, description="None for a first version, an untested one or a rollback"
    )
    policy: PolicyResult | None = Field(None, description="decision of promotion.yaml; None without one")
    reviews: tuple[ReviewedLabels, ...] = Field(
        (), description="answers of readers among the labels of the version"
    )
    previous_sha256: str | None = Field(
        None, description="hash of the entry before; None for the first one and in older entries"
    )
    fingerprint: str | None = Field(
        None, description="spec_sha256 in bundle.json of the promoted bundle; None in older entries"
    )
    signature: Signature | None = Field(None, description="signature of the entry; None without --key")


Record = TypeVar("Record", Claim, Promotion)


def current_user() -> str:
    """Name the user and machine, as `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def to_json(record: BaseModel) -> bytes:
    """Serialize a record as the file that the registry keeps."""
    return (record.model_dump_json(indent=2) + "\n").encode()


def hash_record(data: bytes) -> str:
    """SHA-256 of a record's file, which the next entry of the history names."""
    return hashlib.sha256(data).hexdigest()


def read_record(kind: type[Record], uri: str) -> Record:
    """Read a record from its file.

    Raises:
        UserError: The file cannot be read, or is not such a record.
    """
    return parse_record(kind, storage.read(uri), uri)


def parse_record(kind: type[Record], data: bytes, uri: str) -> Record:
    """Parse a record from the bytes of its file at `uri`.

    Raises:
        UserError: It is not such a record.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise UserError(
            f"{uri} is not a valid record of the registry ({where}{first['msg']}); restore it from a backup"
        ) from None


def stack_promoted(history: Iterable[Promotion]) -> list[int]:
    """Stack of the promoted versions that were not rolled back, the current one last, without repetitions.

    If entries are lost, each remaining rollback still ends at the version that it names.
    """
    stack: list[int] = []
    for entry in history:
        if entry.action == "rollback":
            del stack[-1:]
            while entry.version in stack and stack[-1] != entry.version:
                stack.pop()
        if stack[-1:] != [entry.version]:
            stack.append(entry.version)
    return stack
