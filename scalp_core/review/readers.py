"""Reviews of several readers at the same time: one queue, one label log, one session per reader."""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple

from scalp_core.labels.decisions import Answers
from scalp_core.labels.log import KIND, LabelLog, LogReader
from scalp_core.labels.queue import Order
from scalp_core.labels.views import ModelViews
from scalp_core.review.model_view import ModelView, open_bundle_of_run
from scalp_core.review.referrals import read_referrals
from scalp_core.review.session import Session
from scalp_core.storage import outputs

_log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """Name of a reader, and whether the answers decide between readers."""

    name: str
    decides: bool = False


class Readers:
    """Reviews of the referred images of one run; threads may share it.

    A session has the images that were open when it was opened. Other programs may write to the log: opening a
    session reads their answers.

    Args:
        graded: Output directory of `scalp grade`, local or `s3://`.
        labels: Directory of the label log, local or `s3://`; created if it is missing.
        order: Strategy of the order.
        shows_model: Whether readers see the answer of the model.
        answered_too: Whether answered images stay in the queue.
        bundle: Bundle that graded the images, to offer its heatmaps; None: no view of the model.

    Raises:
        UserError: A directory is not what it should be, or there is nothing to review.
    """

    def __init__(
        self,
        graded: str,
        labels: str,
        order: Order = "referred",
        *,
        shows_model: bool = False,
        answered_too: bool = False,
        bundle: str | None = None,
    ) -> None:
        referrals = read_referrals(graded, labels, order)
        self._queue = referrals.queue
        self._labels = labels
        self._shows_model, self._answered_too = shows_model, answered_too
        self._view = ModelView(open_bundle_of_run(bundle, self._queue)) if bundle else None
        outputs.claim_output(labels, KIND)
        self._log, self._reader, self._answers = LabelLog(labels), LogReader(labels), Answers()
        self._groups = referrals.groups(_log.warning)
        self._opening = threading.Lock()
        self._sessions: dict[Reader, Session] = {}
        self._read_log()

    def open(self, reader: Reader) -> Session:
        """Open a new session of a reader, which replaces an earlier one.

        Raises:
            UserError: storage failed.
        """
        with self._opening:
            self._read_log()
            session = self._sessions[reader] = self._new_session(reader)
            return session

    def session(self, reader: Reader) -> Session:
        """Return the session of a reader; opens one if there is none.

        Raises:
            UserError: storage failed.
        """
        return self._sessions.get(reader) or self.open(reader)

    def _new_session(self, reader: Reader) -> Session:
        session = Session(
            self._queue.keep(self._answers.differ) if reader.decides else self._queue,
            self._log,
            ModelViews(self._labels, reader.name),
            self._answers,
            reader.name,
            shows_model=self._shows_model,
            adjudicate=reader.decides,
            answered_too=self._answered_too,
            groups=self._groups,
        )
        if self._view:
            session.offer(self._view)
        return session

    def _read_log(self) -> None:
        for label in self._reader.read_new():
            self._answers.add(label)
            self._log.follow(label.time)
