"""Another bundle beside the one that answers: as a shadow it grades copies, as a canary it answers some.

What both said is in the audit log; `scalp compare` makes a table of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from scalp_core.errors import ImageError
from serving.answers import Graded
from serving.audit import AuditLog
from serving.graders import Graders, Photograph, hash_of
from serving.settings import CandidateSettings

# Copies that each ingress has graded at once. More are left out: a shadow must cost nobody time.
_MOST_COPIES = 32

_log = logging.getLogger("ray.serve")


class Rollout:
    """Divides photographs between two bundles.

    Args:
        settings: how.
        first: that answers.
        candidate: that might.
        audit: where both are written down; without it there is nothing to compare.
    """

    def __init__(
        self, settings: CandidateSettings, first: Graders, candidate: Graders, audit: AuditLog | None
    ) -> None:
        self._settings = settings
        self._first = first
        self._candidate = candidate
        self._audit = audit
        self._copies: set[asyncio.Task[None]] = set()

    async def grade(self, data: bytes, cost: float = 0.0) -> tuple[Photograph, Graded]:
        """As `Graders.grade`."""
        chosen = is_chosen(await asyncio.to_thread(hash_of, data), self._settings.share)
        if chosen and self._settings.mode == "canary":
            try:
                return await self._candidate.grade(data, cost)
            except ImageError:
                raise
            except Exception as error:
                # Who asks must not pay for a trial: the first answers and signs, the failure is kept.
                _log.warning("the candidate failed, the first answers: %s", error)
                self._told(hash_of(data), None, str(error))
        photograph, graded = await self._first.grade(data, cost)
        if chosen and self._settings.mode == "shadow" and len(self._copies) < _MOST_COPIES:
            self._start(self._copy(data, cost, photograph, graded))
        return photograph, graded

    def _start(self, copy: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(copy)
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _copy(self, data: bytes, cost: float, photograph: Photograph, first: Graded) -> None:
        try:
            graded = await self._candidate.grade_again(photograph, data, cost)
        except Exception as error:
            self._told(photograph.sha256, first, str(error))
        else:
            self._told(photograph.sha256, first, graded)

    def _told(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        if self._audit is not None:
            self._audit.tried(sha256, first, candidate)


def is_chosen(sha256: str, share: float) -> bool:
    """Whether a photograph is of the share that the candidate gets."""
    return int(sha256[:8], 16) < share * 16**8
