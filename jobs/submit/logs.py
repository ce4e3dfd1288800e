"""Follows the log of a Ray job from here until it ends."""

from __future__ import annotations

import asyncio
import sys
import time

import aiohttp

from cluster.jobs_api import Job, Jobs
from cluster.local import ClusterError
from jobs.common.console import console, moment
from jobs.common.interrupt import Detached

_BETWEEN_S = 1.0
# A head that is restarted, or a forwarded port that is opened anew, is waited for.
_PATIENCE_S = 60.0
# A job that is to run on a node of its own waits until an autoscaler has started one.
_WAITS_AFTER_S = 10.0
_STOPPED = 143  # as of a process that SIGTERM ended


def follow(jobs: Jobs, id_: str) -> int:
    """Prints what a job printed and prints, until it ends.

    Returns:
        its exit code.

    Raises:
        Detached: Ctrl-C.
        ClusterError: the cluster does not answer any more.
    """
    try:
        job, shown = _until_it_ends(jobs, id_)
        sys.stdout.write(jobs.log(id_)[shown:])  # what a connection that broke kept from us
        sys.stdout.flush()
    except KeyboardInterrupt:
        console.print(
            f"\ndetached; {id_} goes on. The same command attaches again, or: scalp jobs logs {id_}; "
            f"to end it: scalp jobs stop {id_}"
        )
        raise Detached from None
    if job.status == "SUCCEEDED":
        console.print(f"{id_} ended well")
        return 0
    if job.status == "STOPPED":
        console.print(f"{id_} was stopped; the same command goes on where it was")
        return _STOPPED
    if job.exit_code is None:  # it did not come to its own words
        console.print(f"{id_} failed: {job.message.strip()}")
    return job.exit_code or 1


def stop(jobs: Jobs, id_: str) -> None:
    """Ends a job, and waits until it has ended.

    Raises:
        ClusterError: the cluster does not answer.
    """
    if jobs.get(id_).is_alive:
        jobs.stop(id_)
        while jobs.get(id_).is_alive:
            time.sleep(_BETWEEN_S)
    job = jobs.get(id_)
    console.print(f"{id_} {job.status.lower()} at {moment(job.ended)}")


def _until_it_ends(jobs: Jobs, id_: str) -> tuple[Job, int]:
    """The job at its end, and how many characters of its log were printed."""
    shown, began = 0, time.monotonic()
    answered, told = began, False
    while True:
        try:
            job = jobs.get(id_)
            answered = time.monotonic()
            if not job.is_alive:
                return job, shown
            if job.status == "PENDING" and not told and answered - began > _WAITS_AFTER_S:
                told = True
                console.print(
                    f"{id_} waits for its start: {job.message.strip()} To end it: scalp jobs stop {id_}"
                )
            if job.status == "RUNNING":
                shown = asyncio.run(_tail(jobs, id_, shown))
        except ClusterError as error:
            if time.monotonic() - answered > _PATIENCE_S:
                raise ClusterError(f"{error}; {id_} may go on: the same command attaches to it") from error
        time.sleep(_BETWEEN_S)


async def _tail(jobs: Jobs, id_: str, shown: int) -> int:
    """Prints what comes after the first characters; how many there are when the connection ends."""
    seen = 0
    try:
        async for text in jobs.client.tail_job_logs(id_):
            sys.stdout.write(text[max(0, shown - seen) :])
            sys.stdout.flush()
            seen += len(text)
    except (RuntimeError, OSError, aiohttp.ClientError):  # it broke; asked again while the job lives
        pass
    return max(shown, seen)
