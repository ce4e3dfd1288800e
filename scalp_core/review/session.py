"""One reader's review: the queue, the own answers, and what the page may show of an image."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from scalp_core.datasets.locations import Location
from scalp_core.grades import GRADE_NAMES, GRADE_NAMES_KO
from scalp_core.labels.decisions import Answers
from scalp_core.labels.log import Answer, Label, LabelLog
from scalp_core.labels.queue import Queue
from scalp_core.labels.views import ModelViews
from scalp_core.review.groups import Place
from scalp_core.review.model_view import ModelView
from scalp_core.review.neighbors import Neighbor

_OF_MODEL = ("grade", "probabilities", "expected_severity", "grade_set", "refer_reasons", "model_version")


class Session:
    """The review of one reader; threads may share it, and sessions may share the log and its answers.

    What a reader must not see is not sent to the page: the answer of the model in a blind review, the answers
    of other readers, their names, and the location of the image, whose folders may name a grade or a person.
    The model's view of an image, if it is offered, is sent after `reveal` has recorded that the reader asked.

    Args:
        queue: Images to review, answered ones included.
        log: Log that gets the answers.
        views: Images of which the reader has seen the model's view.
        answers: Answers in the log so far.
        reader: Name of the reader.
        shows_model: Whether the reader sees the answer of the model.
        adjudicate: Whether answers are deciding ones, with the answers of the readers in view.
        answered_too: Whether answered images stay in the queue.
        groups: Groups of images by location.
        answered: Hashes of images that stay in the queue although the reader has answered them, so that the
            answer can be corrected; each answer adds one.
    """

    def __init__(
        self,
        queue: Queue,
        log: LabelLog,
        views: ModelViews,
        answers: Answers,
        reader: str,
        *,
        shows_model: bool = False,
        adjudicate: bool = False,
        answered_too: bool = False,
        groups: Mapping[Place, str] | None = None,
        answered: set[str] | None = None,
    ) -> None:
        self.reader = reader
        self.saved = 0
        self._view: ModelView | None = None
        self._views = views
        self._shows_model = shows_model
        self._adjudicate = adjudicate
        self._answered_too = answered_too
        self._log = log
        self._answers = answers
        self._groups = groups or {}
        self.answered = set() if answered is None else answered
        self._lock = threading.Lock()
        self._queue = queue if answered_too else queue.keep(self._is_offered)

    @property
    def is_finished(self) -> bool:
        """Whether the queue has no image, also none that is answered."""
        return not len(self._queue)

    @property
    def left(self) -> int:
        """Number of images without an answer."""
        return self._queue.count(self._is_open)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._queue

    def offer(self, view: ModelView) -> None:
        """Offer the model's view of the images to the reader."""
        self._view = view

    def describe(self) -> dict[str, Any]:
        """Describe the review and where the reader stands.

        `resize` is how the model's square is placed on an image, None without heatmaps.
        """
        return {
            "resize": self._view and self._view.resize,
            "reader": self.reader,
            "adjudicate": self._adjudicate,
            "answered_too": self._answered_too,
            "grades": [
                {"grade": grade, "name": name, "name_ko": GRADE_NAMES_KO[grade]}
                for grade, name in enumerate(GRADE_NAMES)
            ],
            "images": len(self._queue),
            "first": self._queue.first(lambda _: True),
            **self._progress(),
        }

    def image(self, image_id: str) -> dict[str, Any]:
        """Describe an image, as far as the reader may know it."""
        row = self._queue.row(image_id)
        own = self._own(row["sha256"])
        return {
            "image_id": image_id,
            "images": len(self._queue),
            **self._queue.neighbors(image_id),
            "answer": own and _shown(own),
            "saw_model": self._saw_model(image_id),
            "has_heatmap": bool(self._view and self._view.has_heatmap(row["model_version"])),
            "has_neighbors": bool(self._view and self._view.has_neighbors(image_id, row["model_version"])),
            "model": {name: row[name] for name in _OF_MODEL} if self._shows_model else None,
            "answers": self._given(row["sha256"]) if self._adjudicate else None,
        }

    def location(self, image_id: str) -> Location:
        """Return the location of an image, with the hash that its bytes had when it was graded."""
        row = self._queue.row(image_id)
        return Location(row["uri"], row["member"], sha256=row["sha256"])

    def reveal(self, image_id: str) -> None:
        """Record that the reader sees the model's view of an image, in which later answers are marked.

        Raises:
            UserError: It could not be recorded.
        """
        self._views.add(image_id)

    def heatmap(self, image_id: str) -> bytes | None:
        """Compute the heatmap of the model's answer, a transparent PNG; None unless offered and revealed.

        Raises:
            ImageError: The image cannot be read or decoded, or has changed since it was graded.
        """
        row = self._queue.row(image_id)
        if not (self._view and self._view.has_heatmap(row["model_version"]) and self._saw_model(image_id)):
            return None
        return self._view.heatmap(self.location(image_id), row["grade"])

    def neighbors(self, image_id: str) -> list[Neighbor] | None:
        """Return training images that look alike, the most alike first; None unless offered and revealed.

        Raises:
            ImageError: They are not known yet, and the image cannot be read or has changed.
            UserError: Storage failed.
        """
        version = self._queue.row(image_id)["model_version"]
        if not (self._view and self._view.has_neighbors(image_id, version) and self._saw_model(image_id)):
            return None
        return self._view.neighbors(image_id, self.location(image_id))

    def answer(self, image_id: str, answer: Answer) -> dict[str, Any]:
        """Save an answer; returns the progress when it is durable.

        Raises:
            UserError: It could not be saved.
        """
        row = self._queue.row(image_id)
        self._views.refresh(image_id)
        label = self._log.append(
            **{name: row[name] for name in ("image_id", "sha256", "uri", "member", "model_version")},
            **answer.model_dump(),
            group=self._groups.get((row["uri"], row["member"])),
            reader=self.reader,
            deciding=self._adjudicate,
            saw_model=self._saw_model(image_id),
            model_grade=row["grade"],
        )
        self._answers.add(label)
        self.answered.add(label.sha256)
        with self._lock:
            self.saved += 1
        return {"answer": _shown(label), **self._progress()}

    def _saw_model(self, image_id: str) -> bool:
        """Whether the reader sees the model's answer, or asked for its view, in this session or earlier."""
        if self._shows_model or image_id in self._views:
            return True
        own = self._own(self._queue.row(image_id)["sha256"])
        return own is not None and own.reader == self.reader and own.saw_model

    def _progress(self) -> dict[str, Any]:
        return {"left": self.left, "first_open": self._queue.first(self._is_open)}

    def _own(self, sha256: str) -> Label | None:
        if self._adjudicate:
            return self._answers.deciding.get(sha256)
        return self._answers.find(sha256, self.reader)

    def _is_open(self, sha256: str) -> bool:
        return self._own(sha256) is None

    def _is_offered(self, sha256: str) -> bool:
        return sha256 in self.answered or self._is_open(sha256)

    def _given(self, sha256: str) -> list[dict[str, Any]]:
        """Answers of the readers, in an order that does not depend on their names."""
        given = map(_shown, self._answers.of_image(sha256))
        return sorted(given, key=lambda shown: tuple(str(value) for value in shown.values()))


def _shown(label: Label) -> dict[str, Any]:
    return {"grade": label.grade, "reason": label.reason, "comment": label.comment}
