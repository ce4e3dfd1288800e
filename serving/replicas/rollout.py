"""Shadow and canary: a candidate bundle grades copies of images, or answers a part of them.

The audit log has the gradings of both; `scalp compare` makes a table of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from typing import Literal

from scalp_core.errors import ImageError
from serving.observability.audit import AuditLog
from serving.replicas.handles import DecodedImage, GraderClient, hash_of
from serving.schemas.grading import CandidateState, Graded
from serving.settings import CandidateSettings

# Concurrent copies per ingress. More are skipped, so that a shadow does not slow down requests.
_MOST_COPIES = 32
# Part of answer_seconds for the canary, so that the first model has the rest.
_CANARY_SHARE = 1 / 3
# A canary gets no images for a while after so many failures among its last ones; then one image tests it.
_MOST_FAILURES, _LAST_IMAGES, _PAUSE_S = 5, 20, 30.0

_log = logging.getLogger("ray.serve")


class Rollout:
    """Route images to the first model and to the candidate.

    Args:
        answer_seconds: Timeout of a request; a canary gets a third of it.
    """

    def __init__(
        self,
        settings: CandidateSettings,
        first: GraderClient,
        candidate: GraderClient,
        audit: AuditLog | None,
        answer_seconds: float = 30.0,
    ) -> None:
        self._settings = settings
        self._first = first
        self._candidate = candidate
        self._audit = audit
        self._answer_seconds = answer_seconds
        self._failures: deque[bool] = deque(maxlen=_LAST_IMAGES)  # whether each of the last images failed
        self._paused_until = -math.inf
        self._copies: set[asyncio.Task[None]] = set()

    async def grade(self, data: bytes, cost: float = 0.0) -> tuple[DecodedImage, Graded]:
        """Grade one image with the first model or the candidate; see `GraderClient.grade`."""
        is_candidate = is_chosen(await asyncio.to_thread(hash_of, data), self._settings.share)
        if is_candidate and self._settings.mode == "canary" and self._may_try():
            result = await self._try_candidate(data, cost)
            if result is not None:
                return result
        image, graded = await self._first.grade(data, cost)
        if is_candidate and self._settings.mode == "shadow" and len(self._copies) < _MOST_COPIES:
            task = asyncio.create_task(self._copy(data, cost, image, graded))
            self._copies.add(task)
            task.add_done_callback(self._copies.discard)
        return image, graded

    async def find_cached(self, sha256: str) -> tuple[Graded, tuple[str, ...]] | None:
        """Answer of the model that grades this image, if it is kept; a shadow grades no copy again."""
        is_canary = self._settings.mode == "canary" and is_chosen(sha256, self._settings.share)
        is_candidate = is_canary and self._breaker_state() == "closed"
        return await (self._candidate if is_candidate else self._first).find_cached(sha256)

    def describe(self) -> CandidateState:
        """State of the candidate."""
        settings = self._settings
        return CandidateState(
            mode=settings.mode,
            share=settings.share,
            breaker=self._breaker_state(),
            failures=sum(self._failures),
        )

    def _breaker_state(self) -> Literal["closed", "open", "half_open"]:
        if sum(self._failures) < _MOST_FAILURES:
            return "closed"
        return "open" if time.monotonic() < self._paused_until else "half_open"

    def _may_try(self) -> bool:
        """Whether the candidate gets an image now."""
        state = self._breaker_state()
        if state == "half_open":
            self._paused_until = time.monotonic() + _PAUSE_S  # for the images after this one
        return state != "open"

    async def _try_candidate(self, data: bytes, cost: float) -> tuple[DecodedImage, Graded] | None:
        """Grading of the candidate; None if it failed or was too slow."""
        seconds = self._answer_seconds * _CANARY_SHARE
        try:
            async with asyncio.timeout(seconds):
                result = await self._candidate.grade(data, cost)
        except ImageError:
            raise
        except Exception as error:
            reason = str(error) or f"no answer within {seconds:g} s"
            self._failures.append(True)
            self._paused_until = time.monotonic() + _PAUSE_S
            _log.warning(
                "the candidate failed (breaker %s), the first model answers: %s",
                self._breaker_state(),
                reason,
            )
            self._log_candidate(hash_of(data), None, reason)
            return None
        if self._breaker_state() != "closed":
            self._failures.clear()
        self._failures.append(False)
        return result

    async def _copy(self, data: bytes, cost: float, image: DecodedImage, first: Graded) -> None:
        try:
            async with asyncio.timeout(self._answer_seconds):
                _, graded = await self._candidate.grade(data, cost, image)
        except Exception as error:
            self._log_candidate(image.sha256, first, str(error) or "no answer in time")
        else:
            self._log_candidate(image.sha256, first, graded)

    def _log_candidate(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        if self._audit is not None:
            self._audit.log_candidate(sha256, first, candidate)


def is_chosen(sha256: str, share: float) -> bool:
    """Whether an image belongs to the part of the candidate; depends on its hash alone."""
    return int(sha256[:8], 16) < share * 16**8
