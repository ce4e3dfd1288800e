"""Submit, list and stop the Ray jobs of bulk grading."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TypeVar

import ray

from cluster import jobs_api
from cluster.jobs_api import Job
from cluster.resources import ClusterError
from serving.http.problems import Refusal

_WORK = re.compile(r"bulk-[0-9a-f]{20}")
_ERROR = re.compile(r"^error: (.*)(?:\nhint:  (.*))?", re.MULTILINE)

T = TypeVar("T")


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
        last: dict[str, Job] = {}
        for job in self._call(lambda jobs: jobs.all()):
            if is_id(job.work) and (job.work not in last or last[job.work].attempt < job.attempt):
                last[job.work] = job
        return last

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


def is_id(text: str) -> bool:
    """Whether `text` has the format of an id of a bulk run."""
    return bool(_WORK.fullmatch(text))


def error_line(message: str) -> str:
    """Last error of `scalp grade` in Ray's message of a failed job, or else the first line of the message."""
    if errors := _ERROR.findall(message):
        return "; ".join(filter(None, errors[-1]))
    return message.strip().partition("\n")[0] or "the job failed; Ray's log of it has the reason"
