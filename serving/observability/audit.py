"""Audit log: one line per graded or refused image, without its content."""

from __future__ import annotations

from serving.http import request_context
from serving.observability.audit_chain import timestamp
from serving.observability.audit_writer import Writer
from serving.schemas.grading import Graded, GradeResponse


class AuditLog(Writer):
    """Audit log of one replica: the lines of images and requests."""

    def log_grade(self, answer: GradeResponse, cached: bool = False) -> None:
        """Log an image that was graded in the current request; with `cached`, of an earlier pass."""
        self._log_answer(
            answer.sha256,
            model_version=answer.model_version,
            grade=answer.grade,
            probabilities=[round(probability, 6) for probability in answer.probabilities],
            refer=answer.refer,
            refer_reasons=answer.refer_reasons,
            **_other_grades(answer),
            **({"cached": True} if cached else {}),
        )

    def log_candidate(self, sha256: str, first: Graded | None, candidate: Graded | str) -> None:
        """Log the gradings of an image by the first model and the candidate, or the candidate's error."""
        line: dict[str, object] = {"candidate_error": candidate} if isinstance(candidate, str) else {}
        for name, graded in (("first", first), ("candidate", candidate)):
            if isinstance(graded, Graded):
                line[name] = {
                    "model_version": graded.signature.model_version,
                    "grade": graded.grading.grade,
                    "expected_severity": round(graded.grading.expected_severity, 6),
                    "refer": graded.grading.refer,
                    "forward_ms": round(1000 * graded.forward_seconds, 2),
                }
        self._log(sha256, **line)

    def log_refusal(self, sha256: str, code: str) -> None:
        """Log an image that was refused in the current request."""
        self._log_answer(sha256, problem=code)

    def log_kept(self, sha256: str, kept: str | None, reason: str | None) -> None:
        """Log whether an image whose request opted in was kept.

        Args:
            sha256: Hash of the bytes that were sent.
            kept: `image_id` of the stored file; None if it was not kept.
            reason: Why it was not kept.
        """
        self._log(sha256, kept=kept, **({"not_kept": reason} if reason else {}))

    def log_request(self) -> None:
        """Log the end of the current request, unless its images have lines.

        Requests that failed the authorization are not logged, so that they cannot fill the disk.
        """
        request = request_context.current()
        if request.owes_audit:
            about = {"work": request.work, "source": request.source, "image_id": request.image}
            self._log_answer(
                None,
                route=request.route,
                status=request.status,
                problem=request.problem,
                **{name: value for name, value in about.items() if value is not None},
            )

    def _log_answer(self, sha256: str | None, **answer: object) -> None:
        request = request_context.current()
        request.owes_audit = False
        self._log(sha256, **answer, ms=request.ms)

    def _log(self, sha256: str | None, **answer: object) -> None:
        request = request_context.current()
        line = {"time": timestamp(), "request_id": request.request_id, "key": request.key, "sha256": sha256}
        self.put({**line, **answer})


def _other_grades(answer: GradeResponse) -> dict[str, object]:
    """Return the grades of the other symptoms, by name, if the model grades any."""
    if answer.other_symptoms is None:
        return {}
    return {"other_symptoms": {name: other.grade for name, other in answer.other_symptoms.items()}}
