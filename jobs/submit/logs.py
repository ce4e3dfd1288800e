"""Follow the log of a Ray job until it ends, and stop jobs."""

from __future__ import annotations

import asyncio
import math
import sys
import time

import aiohttp
import tenacity

from cluster.jobs_api import Job, Jobs
from cluster.resources import ClusterError
from jobs.common.console import console, moment
from jobs.common.interrupt import Detached

_POLL_INTERVAL_S = 1.0
_RETRY_TIMEOUT_S = 60.0
# Pending time before the reason is printed: an autoscaler may have to start a node.
_REPORT_PENDING_AFTER_S = 10.0
_STOPPED = 143  # exit code of a process that SIGTERM ended


def follow(jobs: Jobs, id_: str) -> int:
    """Print the log of a job until it ends.

    Returns:
        Exit code of the job.

    Raises:
        Detached: Ctrl-C.
        ClusterError: The cluster stopped answering.
    """
    try:
        job, shown = _print_until_end(jobs, id_)
        _write(jobs.get_job_logs(id_)[shown:])  # lines after a broken connection
    except KeyboardInterrupt:
        console.print(
            f"\ndetached; {id_} continues. The same command attaches again, or: scalp jobs logs {id_}; "
            f"to stop it: scalp jobs stop {id_}"
        )
        raise Detached from None
    if job.status == "SUCCEEDED":
        console.print(f"{id_} succeeded")
        return 0
    if job.status == "STOPPED":
        console.print(f"{id_} was stopped; the same command resumes it")
        return _STOPPED
    if job.driver_exit_code is None:  # the command did not print its own error
        console.print(f"{id_} failed: {(job.message or '').strip()}")
    return job.driver_exit_code or 1


def stop(jobs: Jobs, id_: str) -> None:
    """Stop a job, and wait for its end.

    Raises:
        ClusterError: The cluster does not answer.
    """
    job = jobs.get(id_)
    if job.is_alive:
        jobs.stop_job(id_)
    while job.is_alive:
        time.sleep(_POLL_INTERVAL_S)
        job = jobs.get(id_)
    console.print(f"{id_} {job.status.lower()} at {moment(job.ended)}")


def _print_until_end(jobs: Jobs, id_: str) -> tuple[Job, int]:
    """Print the log; return the ended job, and the number of characters printed."""
    shown, report_at = 0, time.monotonic() + _REPORT_PENDING_AFTER_S
    while (job := _get(jobs, id_)).is_alive:
        if job.status == "RUNNING":
            shown = asyncio.run(_tail(jobs, id_, shown))
        elif time.monotonic() > report_at:
            report_at = math.inf
            console.print(f"{id_} is pending: {job.message} To stop it: scalp jobs stop {id_}")
        time.sleep(_POLL_INTERVAL_S)
    return job, shown


def _get(jobs: Jobs, id_: str) -> Job:
    """Query a job; retry while the head restarts, or a forwarded port is opened again."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(ClusterError),
        stop=tenacity.stop_after_delay(_RETRY_TIMEOUT_S),
        wait=tenacity.wait_fixed(_POLL_INTERVAL_S),
        reraise=True,
    )
    try:
        return retry(jobs.get, id_)
    except ClusterError as error:
        raise ClusterError(f"{error}; {id_} may still run: the same command attaches to it") from error


async def _tail(jobs: Jobs, id_: str, shown: int) -> int:
    """Print the log after its first `shown` characters, until the connection ends; return its length."""
    seen = 0
    try:
        async for text in jobs.tail_job_logs(id_):
            _write(text[max(0, shown - seen) :])
            seen += len(text)
    except (RuntimeError, OSError, aiohttp.ClientError):  # reconnects while the job runs
        pass
    return max(shown, seen)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
