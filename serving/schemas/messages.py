"""Messages from a grader to an ingress."""

from __future__ import annotations

from typing import NamedTuple

from scalp_core.inference.decision import Grading
from scalp_core.results.schema import Signature


class Graded(NamedTuple):
    """Grading of one image, with its model and durations."""

    grading: Grading
    signature: Signature
    bundle: str  # location with a pinned version
    batch_size: int
    queue_seconds: float
    forward_seconds: float
