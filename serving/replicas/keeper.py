"""Keep images in the store of the endpoint, if their requests opt in: in threads, and bounded.

The answer of such a request waits until the image is durable, for seconds at most. Other requests do not
wait: a full disk or an unavailable bucket changes only `kept` of the answer.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

from scalp_core import storage
from scalp_core.errors import ImageError, UserError
from scalp_core.results.schema import SCHEMA
from scalp_core.results.store import NotKept, StoreWriter
from serving.observability.audit import AuditLog
from serving.observability.metrics import ImageMetrics
from serving.schemas.grading import GradeResponse
from serving.schemas.store import Kept, KeptResponse, StoreSettings

_THREADS = 2  # each decodes an image twice: 300 MB for one of 50 megapixels
_MAX_WAITING = 16  # images, each of up to 32 MiB
_RETRY_TIMEOUT_S = 5
_WAIT_S = 15

_COLUMNS = set(SCHEMA.names)

_log = logging.getLogger("ray.serve")


class Keeper:
    """Keeps images of one ingress replica.

    Args:
        settings: Settings of the store.
        metrics: Metrics that count the outcomes.
        audit: Audit log that gets a line per outcome; None without one.
    """

    def __init__(self, settings: StoreSettings, metrics: ImageMetrics, audit: AuditLog | None) -> None:
        self._settings = settings
        self._metrics, self._audit = metrics, audit
        self._store = StoreWriter(settings.folder, settings.max_images)
        self._pool = ThreadPoolExecutor(_THREADS, "keep")
        self._tasks: set[asyncio.Task[Kept]] = set()
        self._pool.submit(self._claim)  # so that a review of the store opens before its first image

    async def keep(self, data: bytes, answer: GradeResponse) -> KeptResponse:
        """Keep an image that the current request opted in, and add the outcome to its answer.

        The outcome is logged and counted also if the client leaves, or if it comes after the answer.

        Args:
            data: Bytes of the image as they were sent.
            answer: Answer of the request.
        """
        if not answer.refer and self._settings.which == "referred":
            kept = self._report(answer, Kept(image_id=None, reason="not_referred"))
        elif len(self._tasks) >= _MAX_WAITING:
            kept = self._report(answer, Kept(image_id=None, reason="busy"))
        else:
            task = asyncio.create_task(self._keep(data, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            try:
                kept = await asyncio.wait_for(asyncio.shield(task), _WAIT_S)
            except TimeoutError:
                kept = Kept(image_id=None, reason="storage_failed")
        return KeptResponse(**dict(answer), kept=kept)

    async def _keep(self, data: bytes, answer: GradeResponse) -> Kept:
        row = answer.model_dump(include=_COLUMNS)
        kept = await asyncio.get_running_loop().run_in_executor(self._pool, self._add, data, row)
        return self._report(answer, kept)

    def _add(self, data: bytes, row: dict[str, object]) -> Kept:
        try:
            with storage.retry_timeout(_RETRY_TIMEOUT_S):
                return Kept(image_id=self._store.add(data, row), reason=None)
        except NotKept as refusal:
            return Kept(image_id=None, reason=refusal.reason)
        except ImageError as error:
            _log.error("an image was not kept, since its metadata cannot be removed: %s", error)
            return Kept(image_id=None, reason="metadata")
        except Exception as error:
            # Also an unexpected error: the image has been graded, and its answer must not be lost.
            _log.error("an image was not kept: %s", error, exc_info=not isinstance(error, UserError))
            return Kept(image_id=None, reason="storage_failed")

    def _claim(self) -> None:
        try:
            with storage.retry_timeout(_RETRY_TIMEOUT_S):
                self._store.claim()
        except UserError as error:
            _log.error("the store cannot be opened; each image that is to be kept tries again: %s", error)

    def _report(self, answer: GradeResponse, kept: Kept) -> Kept:
        self._metrics.observe_kept(kept.reason or "kept")
        if self._audit is not None:
            self._audit.log_kept(answer.sha256, kept.image_id, kept.reason)
        return kept
