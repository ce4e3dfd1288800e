"""The label log: answers of readers about images, in Parquet files that are only added.

LABELS/scalp.json                         marker of `scalp review`
LABELS/labels/SESSION-NUMBER.parquet      one answer; columns of `SCHEMA`

Several sessions write to one log at the same time, on one machine or on several: the name of a file is unique
to its session, and no file is changed or removed. A corrected answer is a further one.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scalp_core import storage
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.storage import outputs, parquet

KIND = "review"
"""Command that makes a label log, in its marker."""

LABELS_FOLDER = "labels"
MAX_COMMENT = 2_000

REASONS = {
    "cannot_be_graded": "a reader found that the image cannot be graded",
    "not_a_scalp": "a reader found that the image does not show a scalp",
}
"""Reasons of an answer without a grade."""

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),  # `manifest.image_id`
        "sha256": pa.string(),  # of the image's bytes: equal bytes are one image
        "uri": pa.string(),
        "member": pa.string(),
        "group": pa.string(),  # group in the source of the bulk run; null if it has none
        "reader": pa.string(),
        "deciding": pa.bool_(),  # whether it decides between readers who disagree
        "grade": pa.int8(),  # 0 to 3; null with a reason
        "reason": pa.string(),  # one of `REASONS`; null with a grade
        "comment": pa.string(),
        "saw_model": pa.bool_(),  # whether the reader saw the answer of the model
        "model_version": pa.string(),
        "model_grade": pa.int8(),
        "time": pa.timestamp("us", tz="UTC"),
        "session": pa.string(),
    }
)

_READS = 16
_STEP = timedelta(microseconds=1)
_BEGINNING = datetime.min.replace(tzinfo=UTC)


class Answer(BaseModel):
    """Answer of a reader about an image: a grade, or a reason for its absence."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grade: int | None = Field(None, ge=0, lt=NUM_GRADES)
    reason: str | None = Field(None, description="one of REASONS")
    comment: str | None = Field(None, max_length=MAX_COMMENT)

    @model_validator(mode="after")
    def _check(self) -> Answer:
        if (self.grade is None) == (self.reason is None):
            raise ValueError("an answer has either a grade or a reason")
        if self.reason is not None and self.reason not in REASONS:
            raise ValueError(f"{self.reason} is not one of the reasons {', '.join(REASONS)}")
        return self

    @property
    def verdict(self) -> tuple[int | None, str | None]:
        """Grade and reason, without the comment: readers agree if these are equal."""
        return self.grade, self.reason


class Label(Answer):
    """A row of the label log; its columns are described at `SCHEMA`."""

    image_id: str
    sha256: str
    uri: str
    member: str | None = None
    group: str | None = None
    reader: str
    deciding: bool = False
    saw_model: bool
    model_version: str | None = None
    model_grade: int | None = None
    time: datetime
    session: str


class LabelLog:
    """Appends the answers of one session to a label log; threads may share it.

    Args:
        labels: Directory of the log, local or `s3://`, which `open_log` has claimed.
    """

    def __init__(self, labels: str) -> None:
        self.session = uuid.uuid4().hex
        self._folder = storage.join(labels, LABELS_FOLDER)
        self._newest = _BEGINNING
        self._files = 0
        self._lock = threading.Lock()

    def follow(self, time: datetime) -> None:
        """Give answers later times than `time`, whatever the clock shows, so that a correction is the newest.

        Args:
            time: Time of an answer in the log.
        """
        with self._lock:
            self._newest = max(self._newest, time)

    def append(self, **columns: object) -> Label:
        """Write one answer, given by the columns of `SCHEMA` except `time` and `session`.

        The answer is on the disk, or in the bucket, when this returns.

        Raises:
            UserError: storage failed; the answer may be written in spite of it, and may be given again.
        """
        with self._lock:
            time = max(datetime.now(UTC), self._newest + _STEP)
            self._newest = time
            self._files += 1  # also after a failure: the file may exist nevertheless
            name = f"{self.session}-{self._files:06d}.parquet"
        label = Label.model_validate({**columns, "time": time, "session": self.session})
        uri = storage.join(self._folder, name)
        if not parquet.create(uri, pa.Table.from_pylist([label.model_dump()], schema=SCHEMA)):
            raise UserError(f"{uri} exists already; start scalp review again, which chooses new file names")
        return label


class LogReader:
    """Reads a label log to which several sessions write; each file once.

    Args:
        labels: Directory of the log, local or `s3://`.
    """

    def __init__(self, labels: str) -> None:
        self._folder = storage.join(labels, LABELS_FOLDER)
        self._known: set[str] = set()

    def read_new(self) -> list[Label]:
        """Read the answers of all files that no earlier call has read, oldest first.

        Raises:
            UserError: storage failed, or a file is not one of a label log.
        """
        names = {name for name in storage.names_in(self._folder) if name.endswith(".parquet")} - self._known
        with ThreadPoolExecutor(_READS) as pool:
            files = pool.map(_read_file, [storage.join(self._folder, name) for name in sorted(names)])
            labels = sort_labels(label for labels_of_file in files for label in labels_of_file)
        self._known |= names
        return labels


def open_log(labels: str) -> LogReader:
    """Claim a directory as a label log; it may be new.

    Raises:
        UserError: the directory holds other files.
    """
    outputs.claim_output(labels, KIND)
    return LogReader(labels)


def is_label_log(source: str) -> bool:
    """Whether a directory is a label log, by its marker."""
    return outputs.kind_of(source) == KIND


def read_labels(labels: str) -> list[Label]:
    """Read all answers of a label log, oldest first.

    Raises:
        UserError: storage failed, or a file is not one of a label log.
    """
    return LogReader(labels).read_new()


def hash_labels(labels: Iterable[Label]) -> str:
    """Compute the SHA-256 of answers in the order of `sort_labels`."""
    digest = sha256()
    for label in sort_labels(labels):
        digest.update(label.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def sort_labels(labels: Iterable[Label]) -> list[Label]:
    """Sort answers by time, the oldest first."""
    return sorted(labels, key=lambda label: (label.time, label.session))


def _read_file(uri: str) -> list[Label]:
    try:
        return [Label.model_validate(row) for row in parquet.read(uri).to_pylist()]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{uri} is not a file of a label log ({place and f'{place}: '}{first['msg']}); move it elsewhere"
        ) from None
