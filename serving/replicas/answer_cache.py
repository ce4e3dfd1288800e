"""Cache of a grader's answers, so that an image of the same owner is not decoded and graded again.

An answer depends on the bytes, the bundle and the settings of the model alone, so a cached answer is equal.
Each model of a grader has its own cache, which ends with it. Owners share no answers: otherwise the duration
would tell a client whether another client sent an image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from cachetools import LRUCache

from scalp_core.inference.decision import NOT_FINITE, Grading

ENTRY_BYTES = 2048
"""Upper bound of the memory of an entry with its key; a test measures it."""


class CachedAnswer(NamedTuple):
    """Grading of an image, its notes, and float (K,) `statistics` for the drift."""

    grading: Grading
    notes: tuple[str, ...]
    statistics: np.ndarray


class AnswerCache:
    """Least recently used answers of one model, by owner and sha256 of the bytes.

    Args:
        mib: Memory in MiB; 0 keeps nothing.
    """

    def __init__(self, mib: int) -> None:
        self._answers: LRUCache[tuple[str, bytes], CachedAnswer] = LRUCache(mib * 2**20 // ENTRY_BYTES)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, owner: str, sha256: str) -> CachedAnswer | None:
        """Return the answer to an image of `owner`, if it is kept."""
        return self._answers.get((owner, bytes.fromhex(sha256)))

    def put(self, owner: str, sha256: str, answer: CachedAnswer) -> None:
        """Keep an answer, unless the model failed on the image."""
        if self._answers.maxsize and sha256 and NOT_FINITE not in answer.grading.refer_reasons:
            self._answers[owner, bytes.fromhex(sha256)] = answer
