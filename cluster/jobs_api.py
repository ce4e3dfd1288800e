"""Ray's Job API, with time-outs, and errors of one line that say what to do."""

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

# They tell of every connection that ends and every package that is sent.
for _name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 15.0
_ATTEMPT = re.compile(r"(.+)\.(\d+)")


@dataclass(frozen=True)
class Job:
    """One attempt at a piece of work.

    Args:
        id: work and attempt, `WORK.ATTEMPT`; any other name for a job that somebody else submitted.
        attempt: 1 for the first.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        entrypoint: what runs.
        metadata: of who submitted it.
        message: Ray's, on the status.
        exit_code: None while it runs, and where it ended before it began.
        started: in UTC; None before.
        ended: the same.
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
        """As `scalp submit` was given it."""
        return self.metadata.get("command", self.entrypoint)

    @property
    def is_alive(self) -> bool:
        return self.status in ("PENDING", "RUNNING")

    @property
    def work(self) -> str:
        """Without the attempt."""
        found = _ATTEMPT.fullmatch(self.id)
        return found[1] if found else self.id


class _Client(JobSubmissionClient):
    """Ray's own asks without a time-out, and would wait for ever for a head that hangs."""

    def _do_request(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._do_request(*arguments, **{"timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)} | keywords)


class Jobs:
    """The jobs of one cluster. All calls block, 20 seconds at most.

    Args:
        address: `http://HOST:8265`, of the dashboard; None takes RAY_API_SERVER_ADDRESS.

    Raises:
        ClusterError: it does not answer, does not let us in, or is another Ray.
    """

    def __init__(self, address: str | None) -> None:
        named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not named:
            raise ClusterError(
                "name the cluster: --address http://HOST:8265, its dashboard, or RAY_API_SERVER_ADDRESS"
            )
        self.address = named if "://" in named else f"http://{named}"
        if urlsplit(self.address).scheme not in ("http", "https"):
            raise ClusterError(f"{named}: jobs are submitted to the dashboard; write http://HOST:8265")
        _check_answers(self.address)
        with _one_line(self.address), _named_by_argument_alone():
            self.client = _Client(self.address)
        theirs = self.client._server_ray_version
        if theirs != ray.__version__:
            raise ClusterError(
                f"{self.address} runs Ray {theirs} and this machine {ray.__version__}; jobs need the same: "
                "install the cluster from requirements.lock, or this machine as the cluster"
            )

    @classmethod
    def of_this_ray(cls) -> Jobs:
        """Those of the Ray that this process is part of, wherever its dashboard is now."""
        own = ray.get_runtime_context().gcs_address
        with _one_line(own), _named_by_argument_alone():
            return cls(ray_internals.dashboard_address(own))

    def all(self) -> list[Job]:
        """That were submitted, the oldest first."""
        with _one_line(self.address):
            found = [_job(each) for each in self.client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda job: job.started or datetime.max.replace(tzinfo=UTC))

    def last(self, work: str) -> Job | None:
        """The last attempt at a piece of work; also by the id of one attempt."""
        found = [job for job in self.all() if work in (job.work, job.id)]
        return max(found, key=lambda job: job.attempt, default=None)

    def get(self, id_: str) -> Job:
        """One job by its id, or the last attempt at a piece of work; asks for that job alone where it can.

        Raises:
            ClusterError: there is none.
        """
        with _one_line(self.address):
            answer = self.client._do_request("GET", f"/api/jobs/{quote(id_, safe='')}")
        details = JobDetails(**answer.json()) if answer.status_code == HTTPStatus.OK else None
        # Ray finds drivers by their numbers too, which nobody submitted.
        job = _job(details) if details and details.submission_id else self.last(id_)
        if job is None:
            raise ClusterError(f"{id_}: {self.address} knows no such job; scalp jobs list shows them")
        return job

    def check_capacity(self, cpus: float, gpus: float, memory: int) -> None:
        """Refuses a process to drive a job that no node of the cluster can hold.

        A cluster with an autoscaler is not refused: it starts nodes for the process, and has none when idle.

        Raises:
            ClusterError: no node has so much, and no autoscaler could start one.
        """
        wanted = {name: value for name, value in (("CPU", cpus), ("GPU", gpus), ("memory", memory)) if value}
        if not wanted:
            return
        with _one_line(self.address):
            answer = self.client._do_request("GET", "/api/v0/nodes?limit=10000&detail=1").json()
        nodes = [
            each["resources_total"] for each in answer["data"]["result"]["result"] if each["state"] == "ALIVE"
        ]
        for name, value in wanted.items():
            most = max((node.get(name, 0) for node in nodes), default=0)
            if value > most and not self._grows():
                raise ClusterError(
                    f"no node of {self.address} has {value:g} {name} for the process that drives the job, "
                    f"the largest has {most:g}; ask for less, or none: the verb's workers reserve their own"
                )

    def _grows(self) -> bool:
        """Whether an autoscaler reports to the cluster; without one Ray says that there is no status."""
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
        """Starts an attempt; no matter if somebody else just did.

        Raises:
            ClusterError: as for `Jobs`.
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
        """Asks it to end; Ray kills what has not ended after some seconds."""
        with _one_line(self.address):
            self.client.stop_job(id_)

    def log(self, id_: str) -> str:
        """All that it has printed."""
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
def _named_by_argument_alone() -> Iterator[None]:
    """Ray would take what the environment names before the argument."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _one_line(address: str) -> Iterator[None]:
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
    found = _ATTEMPT.fullmatch(id_)
    status: JobStatus = details.status
    return Job(
        id=id_,
        attempt=int(found[2]) if found else 1,
        status=status.value,
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=_moment(details.start_time),
        ended=_moment(details.end_time),
    )


def _moment(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
