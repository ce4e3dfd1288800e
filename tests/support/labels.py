"""Handmade answers of readers, for label logs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from scalp_core.labels.log import Label, LabelLog, open_log

AT = datetime(2026, 11, 25, 12, tzinfo=UTC)


def columns(image: str, reader: str = "kim", grade: int | None = 1, **changes: Any) -> dict[str, Any]:
    """Columns of an answer about the image `image`, without time and session."""
    digest = sha256(image.encode()).hexdigest()
    made = {"image_id": digest[:20], "sha256": digest, "uri": f"/data/{image}", "saw_model": False}
    return made | {"reader": reader, "grade": grade} | changes


def label(image: str, reader: str = "kim", grade: int | None = 1, at: int = 0, **changes: Any) -> Label:
    """An answer given `at` seconds after noon."""
    time = AT + timedelta(seconds=at)
    return Label.model_validate(
        columns(image, reader, grade, **changes) | {"time": time, "session": f"session of {reader}"}
    )


def write_log(labels: str, answers: list[dict[str, Any]]) -> None:
    """Write answers, in their order, as sessions of their readers would."""
    log = LabelLog(labels)
    for known in open_log(labels).read_new():
        log.follow(known.time)
    for answer in answers:
        log.append(**answer)
