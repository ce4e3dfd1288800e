"""Submit, list and stop the Ray jobs of bulk grading."""

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
_ERROR_PREFIX = "scalp: "

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One attempt of a bulk run.

    Args:
        id: Id of the attempt.
        attempt: Number of the attempt, from 1.
        status: Status of the attempt.
        source: Source that it grades.
        error: One line if it failed.
        started_at: Time of the submission.
        ended_at: Time of the end; None while it runs.
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
    """Jobs of bulk runs on the Ray of this process. All methods block.

    Raises:
        Refusal: Ray's Job API does not answer (503).
    """

    def __init__(self) -> None:
        self._client: jobs_api.Jobs | None = None
        self._lock = threading.Lock()

    def last(self) -> dict[str, Job]:
        """The last attempt of each bulk run that this Ray lists, by the id of the run."""
        last: dict[str, jobs_api.Job] = {}
        for job in self._call(lambda jobs: jobs.all()):
            if _WORK.fullmatch(job.work) and (job.work not in last or last[job.work].attempt < job.attempt):
                last[job.work] = job
        return {work: _bulk(job) for work, job in last.items()}

    def submit(self, work: str, attempt: int, command: str, source: str) -> None:
        """Start an attempt; idempotent."""
        # Without RAY_ADDRESS a job may join another Ray of the machine (Ray 2.60).
        address = ray.get_runtime_context().gcs_address
        entrypoint = f"RAY_ADDRESS={address} {command}"
        self._call(lambda jobs: jobs.submit(f"{work}.{attempt}", entrypoint, {"source": source}))

    def stop(self, job: Job) -> None:
        """Stop an attempt; Ray kills its processes that have not ended after some seconds."""
        self._call(lambda jobs: jobs.stop(job.id))

    def _call(self, function: Callable[[jobs_api.Jobs], T]) -> T:
        try:
            return function(self._jobs())
        except ClusterError as error:
            self._client = None  # the head may have moved
            raise Refusal(
                503, "jobs_unavailable", "Ray's Job API does not answer; try again later"
            ) from error

    def _jobs(self) -> jobs_api.Jobs:
        with self._lock:
            if self._client is None:
                self._client = jobs_api.Jobs.of_this_ray()
            return self._client


def _bulk(job: jobs_api.Job) -> Job:
    status: Status = job.status.lower()
    return Job(
        id=job.id,
        attempt=job.attempt,
        status=status,
        source=(job.metadata or {}).get("source", ""),
        error=_error_line(job.message or "") if status == "failed" else None,
        started_at=job.started,
        ended_at=job.ended,
    )


def _error_line(message: str) -> str:
    """Last error line of `scalp grade`; Ray's message if there is none."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix(_ERROR_PREFIX) for line in lines if line.startswith(_ERROR_PREFIX)]
    return (errors[-1:] or lines[:1] or ["the job failed; Ray's log of it has the reason"])[0]
