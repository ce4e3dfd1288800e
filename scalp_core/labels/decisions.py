"""The label of each image from the answers of its readers: decided, agreed, or left out with a reason."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from scalp_core.grades import NUM_GRADES
from scalp_core.labels.log import REASONS, Label

Conflicts = Literal["adjudicate", "soft"]
"""Treatment of an image on which readers differ, and that none decides: left out, or a soft label."""

READERS_DIFFER = "readers_differ"
SAW_MODEL = "saw_model"

LEFT_OUT = REASONS | {
    READERS_DIFFER: "readers gave different answers, and none decides; scalp review --adjudicate",
    SAW_MODEL: "each answer was given while the reader saw the model's, which --blind-only leaves out",
}
"""Reasons why an image of a label log has no label."""


class Decision(NamedTuple):
    """The label of one image."""

    label: Label  # the deciding answer, else the newest one; its location is that of the image
    code: str | None  # one of `LEFT_OUT`; None if the label's grade is valid
    saw_model: bool  # whether all readers whose answers led to it saw the answer of the model
    detail: str = ""  # the answers that differ
    soft: tuple[float, ...] | None = None  # share of the readers per grade, if the label is soft


class Answers:
    """The newest answer of each reader about each image, and the newest deciding answers.

    Threads may add answers while others call `find`, `differ` and `of_image`.

    Args:
        labels: Rows of a label log; of two answers of a reader about an image the later one in time counts.
        blind_only: Ignore answers given while the reader saw the answer of the model.
        conflicts: `soft` gives an image on which readers differ the share of the readers per grade, if each
            of them gave a grade and none decides; `adjudicate` leaves it out.
    """

    def __init__(
        self, labels: Iterable[Label] = (), blind_only: bool = False, conflicts: Conflicts = "adjudicate"
    ) -> None:
        self.by_image: dict[str, dict[str, Label]] = {}  # sha256 -> reader -> independent answer
        self.deciding: dict[str, Label] = {}  # sha256 -> deciding answer
        self._ignored: dict[str, Label] = {}  # sha256 -> newest answer that was ignored
        self._blind_only = blind_only
        self._conflicts = conflicts
        self._adding = threading.Lock()
        for label in labels:
            self.add(label)

    def add(self, label: Label) -> None:
        """Add an answer, which replaces an older one of the same reader."""
        with self._adding:
            if self._blind_only and label.saw_model:
                _keep_newest(self._ignored, label.sha256, label)
            elif label.deciding:
                _keep_newest(self.deciding, label.sha256, label)
            else:
                _keep_newest(self.by_image.setdefault(label.sha256, {}), label.reader, label)

    def find(self, sha256: str, reader: str) -> Label | None:
        """Return the independent answer of a reader about an image."""
        return self.by_image.get(sha256, {}).get(reader)

    def of_image(self, sha256: str) -> list[Label]:
        """Return the independent answers about an image, one per reader."""
        return list(self.by_image.get(sha256, {}).values())

    def differ(self, sha256: str) -> bool:
        """Whether readers gave different answers about an image."""
        return len({label.verdict for label in self.of_image(sha256)}) > 1

    def decisions(self) -> Iterator[Decision]:
        """Decide each image, in the order of its first answer."""
        for sha256 in dict.fromkeys([*self.by_image, *self.deciding, *self._ignored]):
            yield self._decide(sha256)

    def _decide(self, sha256: str) -> Decision:
        answers = list(self.by_image.get(sha256, {}).values())
        if decided := self.deciding.get(sha256):
            return Decision(decided, decided.reason, decided.saw_model)
        if not answers:
            return Decision(self._ignored[sha256], SAW_MODEL, True)
        newest, saw_model = max(answers, key=lambda label: label.time), all(a.saw_model for a in answers)
        if self.differ(sha256):
            given = sorted(str(label.reason if label.grade is None else label.grade) for label in answers)
            detail = f"answers {', '.join(given)}"
            soft = _share_readers(answers) if self._conflicts == "soft" else None
            return Decision(newest, None if soft else READERS_DIFFER, saw_model, detail, soft)
        return Decision(newest, newest.reason, saw_model)

    def count(self) -> dict[str, Any]:
        """Count the images with their decisions, and the answers of each reader."""
        decisions = list(self.decisions())
        codes = Counter(decision.code for decision in decisions)
        with_grade = codes.pop(None, 0)
        readers: dict[str, Counter[str]] = {}
        for answers in self.by_image.values():
            for label in answers.values():
                counts = readers.setdefault(label.reader, Counter())
                counts["answers"] += 1
                counts[label.reason or "graded"] += 1
                counts[SAW_MODEL] += label.saw_model
        names = ("answers", "graded", *REASONS, SAW_MODEL)
        return {
            "images": with_grade + codes.total(),
            "with_grade": with_grade,
            "soft": sum(decision.soft is not None for decision in decisions),
            "decided": len(self.deciding),
            "left_out": dict(codes.most_common()),
            "saw_model": sum(decision.code is None and decision.saw_model for decision in decisions),
            "readers": {
                reader: {name: counts[name] for name in names} for reader, counts in sorted(readers.items())
            },
        }


def _share_readers(answers: Iterable[Label]) -> tuple[float, ...] | None:
    """Share of the readers per grade; None if one of them gave none."""
    grades = [label.grade for label in answers]
    if None in grades:
        return None
    return tuple(grades.count(grade) / len(grades) for grade in range(NUM_GRADES))


def _keep_newest(kept: dict[str, Label], key: str, label: Label) -> None:
    if key not in kept or kept[key].time <= label.time:
        kept[key] = label
