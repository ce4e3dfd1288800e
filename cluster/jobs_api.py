"""Client of Ray's Job API with timeouts and errors of one line."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from requests.exceptions import ConnectionError as Unreachable
from requests.exceptions import RequestException, SSLError

from cluster import ray_internals
from cluster.local import CREDENTIALS_HINT, ClusterError

# These loggers report each closed connection and each uploaded package.
for _name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 15.0
_ATTEMPT = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Job:
    """One attempt of a submitted job.

    Args:
        id: Name of the job and the attempt, `WORK.ATTEMPT`; any name if scalp did not submit the job.
        attempt: Number of the attempt, from 1.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        entrypoint: Shell command of the job.
        metadata: Metadata that was submitted with the job.
        message: Ray's message on the status.
        exit_code: Exit code of the command; None while it runs, or if it ended before it started.
        started: Start time in UTC; None before.
        ended: End time in UTC; None before.
    """

    id: str
    attempt: int
    status: str
    entrypoint: str
    metadata: dict[str, str]
    message: str
    exit_code: int | None
    started: datetime | None
    ended: datetime | None

    @property
    def command(self) -> str:
        """Command line that `scalp submit` received."""
        return self.metadata.get("command", self.entrypoint)

    @property
    def is_alive(self) -> bool:
        return self.status in ("PENDING", "RUNNING")

    @property
    def work(self) -> str:
        """Name of the job without the attempt."""
        match = _ATTEMPT.fullmatch(self.id)
        return match[1] if match else self.id


class _Client(JobSubmissionClient):
    """Ray's client with a timeout; without one it waits forever for a head node that hangs."""

    def _do_request(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)} | keywords)


class Jobs:
    """The jobs of one cluster. All methods block, 20 seconds at most.

    Args:
        address: URL of the dashboard, `http://HOST:8265`; None takes RAY_API_SERVER_ADDRESS.

    Raises:
        ClusterError: The dashboard does not answer, refuses access, or runs another version of Ray.
    """

    def __init__(self, address: str | None) -> None:
        named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not named:
            raise ClusterError(
                "no cluster is named; give its dashboard, --address http://HOST:8265, or set "
                "RAY_API_SERVER_ADDRESS"
            )
        self.address = named if "://" in named else f"http://{named}"
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise ClusterError(f"{named}: jobs are submitted to the dashboard; write http://HOST:8265")
        _check_answers(self.address)
        with _one_line(self.address), _without_address_variables():
            self.client = _Client(self.address)
        version = self.client._server_ray_version
        if version != ray.__version__:
            raise ClusterError(
                f"{self.address} runs Ray {version} and this machine {ray.__version__}; jobs need the "
                "same version: install both from requirements.lock"
            )

    @classmethod
    def of_this_ray(cls) -> Jobs:
        """The jobs of the Ray that this process is part of; looks up the current address of its dashboard."""
        gcs_address = ray.get_runtime_context().gcs_address
        with _one_line(gcs_address), _without_address_variables():
            return cls(ray_internals.dashboard_address(gcs_address))

    def all(self) -> list[Job]:
        """All submitted jobs, oldest first."""
        with _one_line(self.address):
            jobs = [_job(details) for details in self.client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or datetime.max.replace(tzinfo=UTC))

    def last(self, work: str) -> Job | None:
        """The last attempt of a job, by its name or by the id of an attempt."""
        attempts = [job for job in self.all() if work in (job.work, job.id)]
        return max(attempts, key=lambda job: job.attempt, default=None)

    def get(self, id_: str) -> Job:
        """One job by its id, or the last attempt of a job by its name.

        Raises:
            ClusterError: The cluster does not have this job.
        """
        with _one_line(self.address):
            answer = self.client._do_request("GET", f"/api/jobs/{quote(id_, safe='')}")
        details = JobDetails(**answer.json()) if answer.status_code == HTTPStatus.OK else None
        # Ray also returns drivers that nobody submitted.
        job = _job(details) if details and details.submission_id else self.last(id_)
        if job is None:
            raise ClusterError(f"{id_}: {self.address} has no such job; list the jobs with: scalp jobs list")
        return job

    def check_capacity(self, cpus: float, gpus: float, memory: int) -> None:
        """Raise if no node of the cluster can hold the driver process of a job.

        A cluster with an autoscaler always passes: it starts nodes for the process.

        Raises:
            ClusterError: No node has these resources, and the cluster has no autoscaler.
        """
        wanted = {name: value for name, value in (("CPU", cpus), ("GPU", gpus), ("memory", memory)) if value}
        if not wanted:
            return
        with _one_line(self.address):
            answer = self.client._do_request("GET", "/api/v0/nodes?limit=10000&detail=1").json()
        nodes = [
            node["resources_total"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"
        ]
        for name, value in wanted.items():
            most = max((node.get(name, 0) for node in nodes), default=0)
            if value > most and not self._grows():
                raise ClusterError(
                    f"no node of {self.address} has {value:g} {name} for the process that drives the job, "
                    f"the largest has {most:g}; request less, or nothing: workers reserve theirs separately"
                )

    def _grows(self) -> bool:
        """Whether the cluster has an autoscaler; without one its status is empty."""
        with _one_line(self.address):
            answer = self.client._do_request("GET", "/api/cluster_status?format=1").json()
        return "Autoscaler status" in (answer["data"]["clusterStatus"] or "")

    def submit(
        self,
        id_: str,
        entrypoint: str,
        metadata: dict[str, str],
        runtime_env: dict[str, Any] | None = None,
        cpus: float = 0,
        gpus: float = 0,
        memory: int = 0,
    ) -> None:
        """Start an attempt; idempotent.

        Raises:
            ClusterError: As for `Jobs`.
        """
        with _one_line(self.address):
            try:
                self.client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=id_,
                    runtime_env=runtime_env,
                    metadata=metadata,
                    entrypoint_num_cpus=cpus or None,
                    entrypoint_num_gpus=gpus or None,
                    entrypoint_memory=memory or None,
                )
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

    def stop(self, id_: str) -> None:
        """Stop a job; Ray kills its processes that have not ended after some seconds."""
        with _one_line(self.address):
            self.client.stop_job(id_)

    def log(self, id_: str) -> str:
        """Everything that a job has printed."""
        with _one_line(self.address):
            return self.client.get_job_logs(id_)


def _check_answers(address: str) -> None:
    parts = urlsplit(address)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"cannot reach {address} ({error.strerror or error}); check the address, and whether its port is "
            "forwarded (ray dashboard ray_cluster.yaml, kubectl port-forward)"
        ) from error


@contextmanager
def _without_address_variables() -> Iterator[None]:
    """Hide the address variables, which Ray prefers to the argument."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    variables = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(variables)


@contextmanager
def _one_line(address: str) -> Iterator[None]:
    """Raise errors of Ray and of HTTP as `ClusterError` with one line."""
    try:
        yield
    except AuthenticationError as error:
        missing = "required" in error.message
        what = "wants a token" if missing else "does not take this token"
        raise ClusterError(f"{address} {what}; {CREDENTIALS_HINT}") from error
    except SSLError as error:
        raise ClusterError(
            f"{address} has a certificate that is not trusted here; name its authority in REQUESTS_CA_BUNDLE"
        ) from error
    except (Unreachable, ConnectionError, TimeoutError) as error:
        raise ClusterError(f"{address} no longer answers; try again") from error
    except (RequestException, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ClusterError(f"{address}: {first}") from error


def _job(details: JobDetails) -> Job:
    id_ = str(details.submission_id)
    match = _ATTEMPT.fullmatch(id_)
    status: JobStatus = details.status
    return Job(
        id=id_,
        attempt=int(match[2]) if match else 1,
        status=status.value,
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=_utc(details.start_time),
        ended=_utc(details.end_time),
    )


def _utc(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
