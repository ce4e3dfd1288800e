"""Follow the log of a Ray job until it ends, and stop jobs."""

from __future__ import annotations

import asyncio
import sys
import time

import aiohttp

from cluster.jobs_api import Job, Jobs
from cluster.local import ClusterError
from jobs.common.console import console, moment
from jobs.common.interrupt import Detached

_POLL_INTERVAL_S = 1.0
# Retries while the head restarts, or a forwarded port is opened again.
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
        sys.stdout.write(jobs.log(id_)[shown:])  # lines after a broken connection
        sys.stdout.flush()
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
    if job.exit_code is None:  # the command did not print its own error
        console.print(f"{id_} failed: {job.message.strip()}")
    return job.exit_code or 1


def stop(jobs: Jobs, id_: str) -> None:
    """Stop a job, and wait for its end.

    Raises:
        ClusterError: The cluster does not answer.
    """
    if jobs.get(id_).is_alive:
        jobs.stop(id_)
        while jobs.get(id_).is_alive:
            time.sleep(_POLL_INTERVAL_S)
    job = jobs.get(id_)
    console.print(f"{id_} {job.status.lower()} at {moment(job.ended)}")


def _print_until_end(jobs: Jobs, id_: str) -> tuple[Job, int]:
    """Print the log; return the ended job, and the number of characters printed."""
    shown, began = 0, time.monotonic()
    answered, is_reported = began, False
    while True:
        try:
            job = jobs.get(id_)
            answered = time.monotonic()
            if not job.is_alive:
                return job, shown
            if job.status == "PENDING" and not is_reported and answered - began > _REPORT_PENDING_AFTER_S:
                is_reported = True
                console.print(f"{id_} is pending: {job.message.strip()} To stop it: scalp jobs stop {id_}")
            if job.status == "RUNNING":
                shown = asyncio.run(_tail(jobs, id_, shown))
        except ClusterError as error:
            if time.monotonic() - answered > _RETRY_TIMEOUT_S:
                raise ClusterError(
                    f"{error}; {id_} may still run: the same command attaches to it"
                ) from error
        time.sleep(_POLL_INTERVAL_S)


async def _tail(jobs: Jobs, id_: str, shown: int) -> int:
    """Print the log after its first `shown` characters, until the connection ends; return its length."""
    seen = 0
    try:
        async for text in jobs.client.tail_job_logs(id_):
            sys.stdout.write(text[max(0, shown - seen) :])
            sys.stdout.flush()
            seen += len(text)
    except (RuntimeError, OSError, aiohttp.ClientError):  # reconnects while the job runs
        pass
    return max(shown, seen)
