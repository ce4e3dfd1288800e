"""Reviewer deployment: the reviews of all readers, in one process that writes the label log.

There is one replica, whatever the load: an answer that one process had accepted would be open in another.
While Ray replaces it, two run for seconds. They lose no answer, because each adds separate files to the
log, and a page that is opened reads the files of others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias, TypeVar

from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import ImageError, UserError
from scalp_core.labels.log import Answer
from scalp_core.review.features import FeatureFiles
from scalp_core.review.model_view import (
    ModelView,
    open_bundle_of_run,
    open_comparing_bundle,
    versions_of,
)
from scalp_core.review.neighbor_search import read_searchable
from scalp_core.review.neighbors import NeighborFiles, show_neighbors
from scalp_core.review.pictures import read_jpeg
from scalp_core.review.readers import Reader, Readers
from scalp_core.review.referrals import Referrals, read_referrals
from scalp_core.review.session import Session
from serving.schemas.review import ReviewSettings
from serving.settings import Scaling

SCALING = Scaling(target_ongoing_requests=4, max_ongoing_requests=8, max_queued_requests=64)
"""One replica, whose requests read storage, and wait for it."""

# Below `answer_seconds`, so that a reader gets the reason.
_RETRY_TIMEOUT_S = 20
_THREADS = 4

T = TypeVar("T")

_log = logging.getLogger("ray.serve")


class ReviewProblem(NamedTuple):
    """Reason why a request of a reader has no answer: a code of `problems.CODES`, and one line."""

    code: str
    detail: str


# Without the error itself, which names places and credentials.
_STORAGE_FAILED = ReviewProblem(
    "storage_unavailable",
    "the storage of the review failed; try again later, or ask the operator: the log has the reason",
)
_NOT_REVEALED = ReviewProblem(
    "not_revealed", "the reader has not asked for the model's view of this image, or none is offered"
)

Refused: TypeAlias = ReviewProblem | ImageError


class Review(NamedTuple):
    """The images of a review, the bundle whose view of them is offered, and similar training images."""

    referrals: Referrals
    bundle: Bundle | None
    neighbors: NeighborFiles | None


def read_review(settings: ReviewSettings) -> Review:
    """Read the images of a review, and what is offered of the model's view.

    Raises:
        UserError: A directory is not what it should be, there is nothing to review, a bundle is given that
            did not grade the images, or it has no similar training images for them.
    """
    data = settings.neighbors
    referrals = read_referrals(settings.graded, settings.labels, settings.order, [data] if data else [])
    bundle = open_bundle_of_run(settings.bundle, referrals) if settings.bundle else None
    if settings.order == "diverse":
        referrals = _order_by_looks(settings, bundle, referrals)
    if bundle is None:
        return Review(referrals, None, None)
    neighbors = NeighborFiles(bundle.spec, data, settings.labels) if data else None
    if data and neighbors is not None and not len(neighbors):
        missing = (
            f"{settings.labels} has no similar training images of {data} by {bundle.spec.model_version}; run "
            f"scalp neighbors {settings.graded} {settings.labels} --bundle {settings.bundle} --data {data}"
        )
        if not referrals.store:
            raise UserError(missing)
        if read_searchable(data, neighbors) is None:
            _log.warning(missing)
    return Review(referrals, bundle, neighbors)


def _order_by_looks(settings: ReviewSettings, bundle: Bundle | None, referrals: Referrals) -> Referrals:
    """Order the images by the features that LABELS has; an endpoint computes none.

    Raises:
        UserError: It has none.
    """
    comparing = open_comparing_bundle(bundle, referrals)
    ordered = referrals.rank(FeatureFiles(comparing.spec, settings.labels), versions_of(comparing))
    if not ordered.ranks:
        missing = (
            f"review.order is diverse, and {settings.labels} has no features of {settings.graded} by "
            f"{comparing.spec.model_version}; compute them with scalp neighbors, or set it to informative"
        )
        if not referrals.store:
            raise UserError(missing)
        _log.warning(missing)
    return ordered


class Reviewer:
    """Answer the requests of readers; each method returns the reason of a refusal as a value.

    It starts also while the storage of the review fails, because images can be graded without it. Then each
    request tries again to open the review.
    """

    def __init__(self, settings: ReviewSettings) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(_THREADS, "review")
        self._opening = threading.Lock()
        self._opened: Readers | None = None
        try:
            self._readers()
        except UserError as error:
            _log.error("the review cannot be opened; each request of a reader tries again: %s", error)

    async def open(self, reader: Reader) -> dict[str, Any] | Refused:
        """Open the review of a reader; describe it, and where the reader stands."""
        return await self._run(lambda: self._readers().open(reader).describe())

    async def image(self, reader: Reader, image_id: str) -> dict[str, Any] | Refused:
        """Describe an image, as far as the reader may know it."""
        return await self._run_with(reader, image_id, lambda session: session.image(image_id))

    async def picture(self, reader: Reader, image_id: str) -> bytes | Refused:
        """Read an image as a JPEG without metadata."""
        return await self._run_with(reader, image_id, lambda session: read_jpeg(session.location(image_id)))

    async def reveal(self, reader: Reader, image_id: str) -> bool | Refused:
        """Record that the reader asked for the model's view of an image."""

        def reveal(session: Session) -> bool:
            session.reveal(image_id)
            return True

        return await self._run_with(reader, image_id, reveal)

    async def heatmap(self, reader: Reader, image_id: str) -> bytes | Refused:
        """Compute the heatmap of an image, a PNG, if it is offered and revealed."""

        def heatmap(session: Session) -> bytes | ReviewProblem:
            return session.heatmap(image_id) or _NOT_REVEALED

        return await self._run_with(reader, image_id, heatmap)

    async def neighbors(self, reader: Reader, image_id: str) -> list[dict[str, Any]] | Refused:
        """Read the training images that look like an image, if they are offered and revealed."""

        def neighbors(session: Session) -> list[dict[str, Any]] | ReviewProblem:
            alike = session.neighbors(image_id)
            return _NOT_REVEALED if alike is None else show_neighbors(alike)

        return await self._run_with(reader, image_id, neighbors)

    async def answer(self, reader: Reader, image_id: str, answer: Answer) -> dict[str, Any] | Refused:
        """Save an answer; returns the progress when it is durable."""
        return await self._run_with(reader, image_id, lambda session: session.answer(image_id, answer))

    def _readers(self) -> Readers:
        settings = self._settings
        with self._opening, storage.retry_timeout(_RETRY_TIMEOUT_S):
            if self._opened is None:
                referrals, bundle, neighbors = read_review(settings)
                data = settings.neighbors if referrals.store else None
                self._opened = Readers(
                    referrals,
                    settings.labels,
                    shows_model=settings.show_model,
                    answered_too=settings.all,
                    view=ModelView(bundle, neighbors, data) if bundle else None,
                )
            return self._opened

    async def _run_with(
        self, reader: Reader, image_id: str, action: Callable[[Session], T | ReviewProblem]
    ) -> T | Refused:
        """Run an action on an image in the session of a reader."""

        def act() -> T | ReviewProblem:
            session = self._readers().session(reader)
            if image_id not in session:
                return ReviewProblem(
                    "unknown_image", "the image is not among those to answer; reload the page"
                )
            return action(session)

        return await self._run(act)

    async def _run(self, action: Callable[[], T | ReviewProblem]) -> T | Refused:
        """Run an action in a thread."""

        def act() -> T | Refused:
            try:
                with storage.retry_timeout(_RETRY_TIMEOUT_S):
                    return action()
            except ImageError as error:
                return error
            except UserError as error:
                _log.error("a request of a reader failed: %s", error)
                return _STORAGE_FAILED

        return await asyncio.get_running_loop().run_in_executor(self._pool, act)
