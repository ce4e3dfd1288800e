"""Jobs of bulk grading on the Ray that this process is part of, through Ray's Job API (its dashboard)."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.exceptions import RequestException

from serving.bulk_schemas import Status
from serving.problems import Refusal

_SUBMISSION = re.compile(r"(bulk-[0-9a-f]{20})\.(\d+)")
_OUR_LINE = "scalp: "


@dataclass(frozen=True)
class Job:
    """One attempt at a piece of work.

    Args:
        work: id of the work.
        attempt: 1 for the first.
        status: of the attempt.
        source: what it grades.
        error: one line if it failed.
        started_at: when it was submitted.
        ended_at: None while it goes on.
    """

    work: str
    attempt: int
    status: Status
    source: str
    error: str | None
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def is_alive(self) -> bool:
        return self.status in ("pending", "running")


class Jobs:
    """All calls block.

    Raises:
        Refusal: the Job API does not answer.
    """

    def __init__(self) -> None:
        self._known: JobSubmissionClient | None = None
        self._lock = threading.Lock()

    def last(self) -> dict[str, Job]:
        """The last attempt at each piece of work that this Ray knows."""
        found: dict[str, Job] = {}
        for details in self._call("list_jobs"):
            job = _job(details)
            if job and (job.work not in found or found[job.work].attempt < job.attempt):
                found[job.work] = job
        return found

    def submit(self, work: str, attempt: int, command: str, source: str) -> None:
        """Starts an attempt; no matter if somebody else just did."""
        # Ray tells a job some Ray of the machine that it finds, which is another one where two run (2.60).
        own = ray.get_runtime_context().gcs_address
        self._call(
            "submit_job",
            entrypoint=f"RAY_ADDRESS={own} {command}",
            submission_id=f"{work}.{attempt}",
            metadata={"source": source},
        )

    def stop(self, job: Job) -> None:
        """Asks an attempt to end; Ray kills what has not ended after some seconds."""
        self._call("stop_job", f"{job.work}.{job.attempt}")

    def _call(self, method: str, *arguments: object, **keywords: object) -> Any:
        try:
            return getattr(self._client(), method)(*arguments, **keywords)
        except (ConnectionError, RequestException, RuntimeError, ValueError) as error:
            if "already exists" in str(error):
                return None
            self._known = None  # the head may have moved
            raise Refusal(
                503, "jobs_unavailable", "Ray's Job API does not answer; try again later"
            ) from error

    def _client(self) -> JobSubmissionClient:
        with self._lock:
            if self._known is None:
                # Asks Ray where its dashboard is, which a cluster may move.
                self._known = JobSubmissionClient(ray.get_runtime_context().gcs_address)
            return self._known


def _job(details: JobDetails) -> Job | None:
    found = _SUBMISSION.fullmatch(details.submission_id or "")
    if not found:
        return None
    status: Status = details.status.value.lower()
    return Job(
        work=found[1],
        attempt=int(found[2]),
        status=status,
        source=(details.metadata or {}).get("source", ""),
        error=_line(details.message or "") if details.status == JobStatus.FAILED else None,
        started_at=_moment(details.start_time),
        ended_at=_moment(details.end_time),
    )


def _line(message: str) -> str:
    """What `scalp grade` said last; what Ray says, if it did not come to it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    own = [line.removeprefix(_OUR_LINE) for line in lines if line.startswith(_OUR_LINE)]
    return (own[-1:] or lines[:1] or ["the job failed; Ray's log of it has the reason"])[0]


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
