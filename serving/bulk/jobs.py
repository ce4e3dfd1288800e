"""Jobs of bulk grading on the Ray that this process is part of."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

import ray

from cluster import jobs_api
from cluster.local import ClusterError
from serving.http.problems import Refusal
from serving.schemas.bulk import Status

_WORK = re.compile(r"bulk-[0-9a-f]{20}")
_OUR_LINE = "scalp: "

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One attempt at a piece of work.

    Args:
        id: of the attempt.
        attempt: 1 for the first.
        status: of the attempt.
        source: what it grades.
        error: one line if it failed.
        started_at: when it was submitted.
        ended_at: None while it goes on.
    """

    id: str
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
        self._known: jobs_api.Jobs | None = None
        self._lock = threading.Lock()

    def last(self) -> dict[str, Job]:
        """The last attempt at each piece of work that this Ray knows."""
        found: dict[str, jobs_api.Job] = {}
        for job in self._ask(lambda jobs: jobs.all()):
            if _WORK.fullmatch(job.work) and (job.work not in found or found[job.work].attempt < job.attempt):
                found[job.work] = job
        return {work: _bulk(job) for work, job in found.items()}

    def submit(self, work: str, attempt: int, command: str, source: str) -> None:
        """Starts an attempt; no matter if somebody else just did."""
        # Ray tells a job some Ray of the machine that it finds, which is another one where two run (2.60).
        own = ray.get_runtime_context().gcs_address
        entrypoint = f"RAY_ADDRESS={own} {command}"
        self._ask(lambda jobs: jobs.submit(f"{work}.{attempt}", entrypoint, {"source": source}))

    def stop(self, job: Job) -> None:
        """Asks an attempt to end; Ray kills what has not ended after some seconds."""
        self._ask(lambda jobs: jobs.stop(job.id))

    def _ask(self, question: Callable[[jobs_api.Jobs], T]) -> T:
        try:
            return question(self._jobs())
        except ClusterError as error:
            self._known = None  # the head may have moved
            raise Refusal(
                503, "jobs_unavailable", "Ray's Job API does not answer; try again later"
            ) from error

    def _jobs(self) -> jobs_api.Jobs:
        with self._lock:
            if self._known is None:
                self._known = jobs_api.Jobs.of_this_ray()
            return self._known


def _bulk(job: jobs_api.Job) -> Job:
    status: Status = job.status.lower()  # type: ignore[assignment]
    return Job(
        id=job.id,
        attempt=job.attempt,
        status=status,
        source=job.metadata.get("source", ""),
        error=_line(job.message) if status == "failed" else None,
        started_at=job.started,
        ended_at=job.ended,
    )


def _line(message: str) -> str:
    """What `scalp grade` said last; what Ray says, if it did not come to it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    own = [line.removeprefix(_OUR_LINE) for line in lines if line.startswith(_OUR_LINE)]
    return (own[-1:] or lines[:1] or ["the job failed; Ray's log of it has the reason"])[0]
