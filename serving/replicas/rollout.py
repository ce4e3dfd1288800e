"""Another bundle beside the one that answers: as a shadow it grades copies, as a canary it answers some.

What both said is in the audit log; `scalp compare` makes a table of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from scalp_core.errors import ImageError
from serving.observability.audit import AuditLog
from serving.replicas.breaker import CircuitBreaker
from serving.replicas.handles import DecodedImage, GraderClient, hash_of
from serving.schemas.grading import CandidateState
from serving.schemas.messages import Graded
from serving.settings import CandidateSettings

# Copies that each ingress has graded at once. More are left out: a shadow must cost nobody time.
_MOST_COPIES = 32
# Of the seconds that a request may take, those that a canary has.
_CANARY_SHARE = 1 / 3

_log = logging.getLogger("ray.serve")


class Rollout:
    """Divides images between two bundles.

    Args:
        settings: how.
        first: that answers.
        candidate: that might.
        audit: where both are written down; without it there is nothing to compare.
        answer_seconds: of a request; a canary has a third of them, so that the first has the rest.
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
        self._breaker = CircuitBreaker()
        self._copies: set[asyncio.Task[None]] = set()

    async def grade(self, data: bytes, cost: float = 0.0) -> tuple[DecodedImage, Graded]:
        """As `GraderClient.grade`."""
        chosen = is_chosen(await asyncio.to_thread(hash_of, data), self._settings.share)
        if chosen and self._settings.mode == "canary" and self._breaker.allows():
            found = await self._try(data, cost)
            if found is not None:
                return found
        image, graded = await self._first.grade(data, cost)
        if chosen and self._settings.mode == "shadow" and len(self._copies) < _MOST_COPIES:
            self._start(self._copy(data, cost, image, graded))
        return image, graded

    def describe(self) -> CandidateState:
        """How the candidate fares."""
        own = self._settings
        return CandidateState(
            mode=own.mode, share=own.share, breaker=self._breaker.state, failures=self._breaker.failures
        )

    async def _try(self, data: bytes, cost: float) -> tuple[DecodedImage, Graded] | None:
        """The candidate's answer; None where it failed or was too slow: then the first answers."""
        seconds = self._answer_seconds * _CANARY_SHARE
        try:
            async with asyncio.timeout(seconds):
                found = await self._candidate.grade(data, cost)
        except ImageError:
            self._breaker.record_cancel()
            raise
        except asyncio.CancelledError:
            self._breaker.record_cancel()
            raise
        except Exception as error:
            reason = str(error) or f"no answer within {seconds:g} s"
            self._breaker.record_failure()
            _log.warning(
                "the candidate failed (breaker %s), the first answers: %s", self._breaker.state, reason
            )
            self._log_candidate(hash_of(data), None, reason)
            return None
        self._breaker.record_success()
        return found

    def _start(self, copy: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(copy)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy(self, data: bytes, cost: float, image: DecodedImage, first: Graded) -> None:
        try:
            async with asyncio.timeout(self._answer_seconds):
                graded = await self._candidate.grade_decoded(image, data, cost)
        except Exception as error:
            self._log_candidate(image.sha256, first, str(error) or "no answer in time")
        else:
            self._log_candidate(image.sha256, first, graded)

    def _log_candidate(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        if self._audit is not None:
            self._audit.log_candidate(sha256, first, candidate)


def is_chosen(sha256: str, share: float) -> bool:
    """Whether an image is of the share that the candidate gets."""
    return int(sha256[:8], 16) < share * 16**8
