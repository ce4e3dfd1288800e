"""Reviews of several readers at the same time: one queue, one label log, one session per reader."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

from scalp_core.labels.decisions import Answers
from scalp_core.labels.log import LabelLog, open_log
from scalp_core.labels.queue import Queue
from scalp_core.labels.views import ModelViews
from scalp_core.review.model_view import ModelView
from scalp_core.review.referrals import Referrals
from scalp_core.review.session import Session

_log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """Name of a reader, and whether the answers decide between readers."""

    name: str
    decides: bool = False


class Readers:
    """Reviews of the referred images of one run, or of a store; threads may share it.

    A session has the images that were open when it was opened, and those that the reader answered in earlier
    sessions here, so that an answer can be corrected. Other programs may write to the log: opening a session
    reads their answers, the new images of a store, and the similar training images found since.

    Args:
        referrals: Referred images of the run.
        labels: Directory of the label log, local or `s3://`; created if it is missing.
        shows_model: Whether readers see the answer of the model.
        answered_too: Whether answered images stay in the queue.
        view: Model's view of the images that is offered to readers; None offers none.
        warn: Gets the reason if labels have no groups.

    Raises:
        UserError: The log holds other files, or storage failed.
    """

    def __init__(
        self,
        referrals: Referrals,
        labels: str,
        *,
        shows_model: bool = False,
        answered_too: bool = False,
        view: ModelView | None = None,
        warn: Callable[[str], None] = _log.warning,
    ) -> None:
        self.answers = Answers()
        """Answers in the log so far."""
        self._referrals = referrals
        self._labels = labels
        self._shows_model, self._answered_too, self._view = shows_model, answered_too, view
        self._log_reader, self._log = open_log(labels), LabelLog(labels)
        self._groups = referrals.groups(warn)
        self._opening = threading.Lock()
        self._sessions: dict[Reader, Session] = {}
        self._read_log()

    def queue(self, reader: Reader) -> Queue:
        """Images of a reader, answered ones included."""
        queue = self._referrals.queue
        return queue.keep(self.answers.differ) if reader.decides else queue

    def open(self, reader: Reader) -> Session:
        """Open a new session of a reader, which replaces an earlier one.

        Raises:
            UserError: storage failed.
        """
        with self._opening:
            self._read_log()
            self._referrals = self._referrals.refresh()
            if self._view:
                self._view.refresh()
            session = self._sessions[reader] = self._new_session(reader)
            return session

    def session(self, reader: Reader) -> Session:
        """Return the session of a reader; opens one if there is none.

        Raises:
            UserError: storage failed.
        """
        return self._sessions.get(reader) or self.open(reader)

    def _new_session(self, reader: Reader) -> Session:
        earlier = self._sessions.get(reader)
        session = Session(
            self.queue(reader),
            self._log,
            ModelViews(self._labels, reader.name),
            self.answers,
            reader.name,
            shows_model=self._shows_model,
            adjudicate=reader.decides,
            answered_too=self._answered_too,
            groups=self._groups,
            answered=earlier.answered if earlier else None,
        )
        if self._view:
            session.offer(self._view)
        return session

    def _read_log(self) -> None:
        for label in self._log_reader.read_new():
            self.answers.add(label)
            self._log.follow(label.time)
