"""Bulk grading behind `/v1/bulk`: `scalp grade` as a Ray job, with the bundle that the endpoint serves.

A stopped or failed one goes on where it was when the same is asked for again. The id of a piece of work is a
hash of what it is: asking twice makes one job, and its output is found when Ray has forgotten the job.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from scalp_core import storage
from scalp_core.bundle import read_spec
from scalp_core.errors import UserError
from scalp_core.predictor import Precision
from scalp_core.progress import REPORT_FILE, Progress, read_progress
from scalp_core.results import RESULTS_FOLDER
from serving.bulk_jobs import Job, Jobs
from serving.bulk_schemas import BulkLinks, BulkResponse, BulkResults, BulkSettings, Photographs, Status
from serving.bulk_sources import allowed_source
from serving.problems import Refusal

_ID = re.compile(r"bulk-[0-9a-f]{20}")
_THREADS = 4
_PATIENCE_S = 30.0
_RETRY_AFTER_S = 60
_PIECE = 2**18

T = TypeVar("T")


class Served(NamedTuple):
    """What the endpoint answers with: where its bundle is, its version pinned, and how it is run."""

    bundle: str
    model_version: str
    precision: Precision


class Bulk:
    """Bulk grading of a replica. All that blocks is done in threads of its own.

    Args:
        settings: what is allowed.
        served: what the endpoint answers with now.
    """

    def __init__(self, settings: BulkSettings, served: Callable[[], Awaitable[Served]]) -> None:
        self._settings = settings
        self._served = served
        self._jobs = Jobs()
        self._pool = ThreadPoolExecutor(_THREADS, "bulk")
        self._one_at_a_time = asyncio.Lock()

    async def start(self, source: str, root: str) -> BulkResponse:
        """Starts the work, or finds the job that does it, or did.

        Raises:
            Refusal: the source is not allowed, enough jobs run, or Ray or storage do not answer.
        """
        source = await self._off_loop(allowed_source, source, self._settings.sources)
        served = await self._served()
        async with self._one_at_a_time:
            return await self._off_loop(self._start, source, served, root)

    async def find(self, work: str, root: str) -> BulkResponse:
        """How far a piece of work is.

        Raises:
            Refusal: there is none with this id, or Ray or storage do not answer.
        """
        return await self._off_loop(self._find, work, root)

    async def stop(self, work: str, root: str) -> BulkResponse:
        """Stops its job, if one runs.

        Raises:
            Refusal: as `find`.
        """
        return await self._off_loop(self._stop, work, root)

    async def report(self, work: str) -> Iterator[bytes]:
        """The report, piece by piece.

        Raises:
            Refusal: there is none yet.
        """
        return await self._off_loop(self._report, work)

    async def results(self, work: str) -> BulkResults:
        """The files with the rows.

        Raises:
            Refusal: there are none yet.
        """
        return await self._off_loop(self._results, work)

    async def _off_loop(self, call: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._pool, call, *arguments), _PATIENCE_S)
        except TimeoutError:
            raise Refusal(
                503, "jobs_unavailable", "Ray's Job API or the storage does not answer; try again later"
            ) from None
        except UserError as error:
            raise Refusal(503, "storage_unavailable", str(error)) from None

    def _start(self, source: str, served: Served, root: str) -> BulkResponse:
        work = _work_id(source, self._settings.out, served)
        jobs = self._jobs.last()
        job, progress = jobs.get(work), read_progress(self._out(work))
        if not (progress and progress.finished) and not (job and job.is_alive):
            if sum(each.is_alive for each in jobs.values()) >= self._settings.jobs:
                raise Refusal(
                    429,
                    "too_many_jobs",
                    f"{self._settings.jobs:,} jobs run already, which is the limit; try again later",
                    {"Retry-After": str(_RETRY_AFTER_S)},
                )
            if read_spec(served.bundle).version_in(served.precision) != served.model_version:
                raise Refusal(
                    409,
                    "bundle_changed",
                    "the bundle's files are not those that the endpoint has loaded; load them again first",
                )
            attempt = job.attempt + 1 if job else 1
            self._jobs.submit(work, attempt, self._command(work, source, served), source)
        return self._find(work, root)

    def _command(self, work: str, source: str, served: Served) -> str:
        # -P: nothing that lies in the folder where Ray starts it is imported.
        words = [sys.executable, "-P", "-m", "jobs.cli", "grade", served.bundle, source, self._out(work)]
        return shlex.join([*words, "--no-tables", "--precision", served.precision, *self._settings.options])

    def _find(self, work: str, root: str) -> BulkResponse:
        out = self._out(work)
        job, progress = self._jobs.last().get(work), read_progress(out)
        if job is None and progress is None:
            raise Refusal(404, "no_such_job", "there is no bulk grading with this id")
        status = _status(job, progress)
        own = f"{root}/v1/bulk/{work}"
        done = status == "succeeded"
        return BulkResponse(
            id=work,
            status=status,
            source=job.source if job else progress.sources[0] if progress else "",
            out=out,
            model_version=progress.model_version if progress else None,
            photographs=Photographs(
                done=progress.done if progress else 0,
                failed=progress.failed if progress else 0,
                total=progress.total if progress else None,
            ),
            photographs_per_second=progress.photographs_per_second if progress else None,
            error=job.error if job and status == "failed" else None,
            started_at=job.started_at if job else None,
            ended_at=job.ended_at if job else None,
            links=BulkLinks(
                work=own,
                report=f"{own}/report" if done else None,
                results=f"{own}/results" if done else None,
            ),
        )

    def _stop(self, work: str, root: str) -> BulkResponse:
        self._out(work)
        if (job := self._jobs.last().get(work)) and job.is_alive:
            self._jobs.stop(job)
        return self._find(work, root)

    def _report(self, work: str) -> Iterator[bytes]:
        uri = storage.join(self._out(work), REPORT_FILE)
        try:
            file = storage.open_file(uri)
            first = file.read(_PIECE)
        except OSError as error:
            raise Refusal(404, "no_report_yet", "there is no report; it is made at the end") from error
        return _pieces(file, first)

    def _results(self, work: str) -> BulkResults:
        out = self._out(work)
        names = storage.names_in(storage.join(out, RESULTS_FOLDER))
        files = [f"{RESULTS_FOLDER}/{name}" for name in sorted(names) if name.endswith(".parquet")]
        if not files:
            raise Refusal(404, "no_results_yet", "there are no results; they are put together at the end")
        return BulkResults(id=work, out=out, files=files)

    def _out(self, work: str) -> str:
        if not _ID.fullmatch(work):
            raise Refusal(404, "no_such_job", "there is no bulk grading with this id")
        return storage.join(self._settings.out, work)


def _pieces(file: Any, first: bytes) -> Iterator[bytes]:
    with file:
        while first:
            yield first
            first = file.read(_PIECE)


def _work_id(source: str, out: str, served: Served) -> str:
    what = "\n".join((source, out, served.model_version, served.precision))
    return f"bulk-{hashlib.sha256(what.encode()).hexdigest()[:20]}"


def _status(job: Job | None, progress: Progress | None) -> Status:
    if job and job.is_alive:
        return job.status
    if progress and progress.finished:
        return "succeeded"
    # A job that Ray has forgotten was lost with its cluster.
    return job.status if job else "stopped"
