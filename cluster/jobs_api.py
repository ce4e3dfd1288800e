"""Client of Ray's Job API with timeouts and errors of one line."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from requests.exceptions import ConnectionError as Unreachable
from requests.exceptions import RequestException, SSLError

from cluster import ray_internals
from cluster.local import CREDENTIALS_HINT
from cluster.resources import ClusterError

# These loggers report each closed connection and each uploaded package.
for _name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
    logging.getLogger(_name).setLevel(logging.WARNING)
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 15.0


class Job(JobDetails):
    """One attempt of a submitted job, with the id `WORK.ATTEMPT`; any id if scalp did not submit the job."""

    @property
    def id(self) -> str:
        return str(self.submission_id)

    @property
    def work(self) -> str:
        """Name of the job without the attempt."""
        return re.sub(r"\.\d+$", "", self.id)

    @property
    def attempt(self) -> int:
        """Number of the attempt, from 1."""
        return int(self.id.removeprefix(f"{self.work}.")) if self.id != self.work else 1

    @property
    def command(self) -> str:
        """Command line that `scalp submit` received."""
        return str((self.metadata or {}).get("command", self.entrypoint))

    @property
    def is_alive(self) -> bool:
        return not self.status.is_terminal()

    @property
    def started(self) -> datetime | None:
        return _utc(self.start_time)

    @property
    def ended(self) -> datetime | None:
        return _utc(self.end_time)


def _utc(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


class _RefusedError(ClusterError):
    """The dashboard answered a request with an error."""


class Jobs(JobSubmissionClient):
    """The jobs of one cluster: Ray's client with timeouts, and with errors of one line.

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
        with _one_line(self.address), _without_address_variables():
            super().__init__(self.address)
        if self._server_ray_version != ray.__version__:
            raise ClusterError(
                f"{self.address} runs Ray {self._server_ray_version} and this machine {ray.__version__}; "
                "jobs need the same version: install both from requirements.lock"
            )

    @classmethod
    def of_this_ray(cls) -> Jobs:
        """The jobs of the Ray that this process is part of; looks up the current address of its dashboard."""
        gcs_address = ray.get_runtime_context().gcs_address
        with _one_line(gcs_address), _without_address_variables():
            return cls(ray_internals.dashboard_address(gcs_address))

    def _do_request(self, *arguments: Any, **keywords: Any) -> Any:
        """Without a timeout, Ray's client waits forever for a head node that hangs."""
        with _one_line(self.address):
            return super()._do_request(
                *arguments, **{"timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)} | keywords
            )

    def _raise_error(self, r: Any) -> None:
        # The text may be a traceback, whose last line is the error.
        raise _RefusedError(f"{self.address}: {(r.text.strip() or str(r.status_code)).splitlines()[-1]}")

    def all(self) -> list[Job]:
        """All submitted jobs, oldest first."""
        jobs = [Job(**vars(details)) for details in self.list_jobs() if details.submission_id]
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
        try:
            job = Job(**vars(self.get_job_info(id_)))
        except _RefusedError:  # no job has this id
            job = None
        if job is None or not job.submission_id:  # Ray also returns drivers that nobody submitted
            job = self.last(id_)
        if job is None:
            raise ClusterError(f"{id_}: {self.address} has no such job; list the jobs with: scalp jobs list")
        return job

    def submit(self, id_: str, entrypoint: str, metadata: dict[str, str], **options: Any) -> None:
        """Start an attempt by Ray's `submit_job`; idempotent.

        Args:
            id_: Id of the attempt.
            entrypoint: Shell command of the job.
            metadata: Metadata of the job.
            options: Further arguments of `submit_job`.
        """
        try:
            with _one_line(self.address):
                self.submit_job(entrypoint=entrypoint, submission_id=id_, metadata=metadata, **options)
        except _RefusedError as error:
            if "already exists" not in str(error):
                raise


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
    except (Unreachable, ConnectionError, TimeoutError) as error:
        if isinstance(error, SSLError) or isinstance(error.__context__, SSLError):
            problem = (
                f"{address} has a certificate that is not trusted here; name its authority in "
                "REQUESTS_CA_BUNDLE"
            )
        else:
            problem = (
                f"cannot reach {address}; check the address, and whether its port is forwarded "
                "(ray dashboard ray_cluster.yaml, kubectl port-forward)"
            )
        raise ClusterError(problem) from error
    except (RequestException, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ClusterError(f"{address}: {first}") from error
