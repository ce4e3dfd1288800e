"""What a grader says to an ingress."""

from __future__ import annotations

from typing import NamedTuple

from scalp_core.inference.decision import Grading
from scalp_core.results.schema import Signature


class Graded(NamedTuple):
    """The answer for one image, and how it came about."""

    grading: Grading
    signature: Signature
    bundle: str  # where it is, its version pinned
    batch_size: int
    queue_seconds: float
    forward_seconds: float
