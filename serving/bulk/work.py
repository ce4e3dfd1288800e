"""Bulk grading behind `/v1/bulk`: `scalp grade` as a Ray job, with the bundle that the endpoint serves.

A stopped or failed one goes on where it was when the same is asked for again. The id of a piece of work is a
hash of what it is: asking twice makes one job, and its output is found when Ray has forgotten the job.
A caller sees what it owns (`owners`); all else is answered as what does not exist.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from scalp_core import storage
from scalp_core.bundles.bundle import read_spec
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Precision
from scalp_core.results.progress import REPORT_FILE, Progress, read_progress
from scalp_core.results.schema import RESULTS_FOLDER
from serving.auth.scopes import Caller
from serving.bulk.jobs import Job, Jobs
from serving.bulk.owners import Owners
from serving.bulk.rows import Page, StoredRows
from serving.bulk.sources import allowed_source
from serving.http.problems import Refusal
from serving.schemas.bulk import (
    BulkFiles,
    BulkLinks,
    BulkList,
    BulkResponse,
    BulkSettings,
    Photographs,
    Status,
)

_ID = re.compile(r"bulk-[0-9a-f]{20}")
_THREADS = 4
_PATIENCE_S = 30.0
_MODEL_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 60
_PIECE = 2**18

T = TypeVar("T")


class _UnknownError(Refusal):
    """The same for an id that nobody has and for one that another key owns."""

    def __init__(self) -> None:
        super().__init__(404, "no_such_job", "there is no bulk grading with this id")


class ServedModel(NamedTuple):
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

    def __init__(self, settings: BulkSettings, served: Callable[[], Awaitable[ServedModel]]) -> None:
        self._settings = settings
        self._owners = Owners(settings.out)
        self._served = served
        self._jobs = Jobs()
        self._pool = ThreadPoolExecutor(_THREADS, "bulk")
        self._one_at_a_time = asyncio.Lock()

    async def start(self, caller: Caller, source: str, root: str) -> BulkResponse:
        """Start the work, or find the job that does it, or did; the caller becomes an owner.

        Raises:
            Refusal: the source is not allowed, enough jobs run, or the model, Ray or storage do not answer.
        """
        source = await self._off_loop(allowed_source, source, self._settings.sources, caller.rights)
        try:
            served = await asyncio.wait_for(self._served(), _MODEL_TIMEOUT_S)
        except TimeoutError:
            raise Refusal(
                503,
                "model_unavailable",
                f"no model answered within {_MODEL_TIMEOUT_S:g} s; try again later",
                {"Retry-After": str(_RETRY_AFTER_S)},
            ) from None
        async with self._one_at_a_time:
            return await self._off_loop(self._start, caller, source, served, root)

    async def find(self, caller: Caller, work: str, root: str) -> BulkResponse:
        """How far a piece of work is.

        Raises:
            Refusal: the caller owns none with this id, or Ray or storage do not answer.
        """
        return await self._off_loop(self._owned, self._find, caller, work, root)

    async def list(self, caller: Caller, root: str, limit: int, cursor: str | None) -> BulkList:
        """The work of the caller, of all owners for an admin, in the order of ids.

        Raises:
            Refusal: Ray or storage do not answer.
        """
        return await self._off_loop(self._list, caller, root, limit, cursor)

    async def stop(self, caller: Caller, work: str, root: str) -> BulkResponse:
        """Stops its job, if one runs.

        Raises:
            Refusal: as `find`.
        """
        return await self._off_loop(self._owned, self._stop, caller, work, root)

    async def report(self, caller: Caller, work: str) -> Iterator[bytes]:
        """The report, piece by piece.

        Raises:
            Refusal: as `find`, or there is none yet.
        """
        return await self._off_loop(self._owned, self._report, caller, work)

    async def files(self, caller: Caller, work: str) -> BulkFiles:
        """The Parquet files with the rows.

        Raises:
            Refusal: as `find`, or there are none yet.
        """
        return await self._off_loop(self._owned, self._files, caller, work)

    async def page(self, caller: Caller, work: str, limit: int, cursor: str | None) -> Page:
        """The rows after a cursor.

        Raises:
            Refusal: as `files`, or the cursor is of something else.
        """
        return await self._off_loop(self._owned, self._page, caller, work, limit, cursor)

    async def rows(self, caller: Caller, work: str) -> Iterator[pa.RecordBatch]:
        """All rows, a small batch at a time.

        Raises:
            Refusal: as `files`.
        """
        return await self._off_loop(self._owned, self._rows, caller, work)

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

    def _owned(self, question: Callable[..., T], caller: Caller, work: str, *arguments: Any) -> T:
        """The answer to an owner. Other callers get the refusal of an unknown id."""
        self._out(work)
        if not self._owners.may_see(caller, work):
            raise _UnknownError
        return question(work, *arguments)

    def _start(self, caller: Caller, source: str, served: ServedModel, root: str) -> BulkResponse:
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
            self._owners.add(caller, work, source)  # first: no job is without its owner
            attempt = job.attempt + 1 if job else 1
            self._jobs.submit(work, attempt, self._command(work, source, served), source)
        else:
            self._owners.add(caller, work, source)
        return self._find(work, root)

    def _command(self, work: str, source: str, served: ServedModel) -> str:
        # -P: nothing that lies in the folder where Ray starts it is imported.
        # The real path: --no-links refuses one that has become a link since it was checked.
        real = source if storage.is_s3(source) else os.path.realpath(source)
        words = [sys.executable, "-P", "-m", "jobs.cli", "grade", served.bundle, real, self._out(work)]
        return shlex.join(
            [*words, "--no-tables", "--no-links", "--precision", served.precision, *self._settings.options]
        )

    def _list(self, caller: Caller, root: str, limit: int, cursor: str | None) -> BulkList:
        jobs = self._jobs.last()
        if caller.rights.admin:
            works = {*storage.folders_in(self._settings.out), *jobs}
        else:
            works = self._owners.works(caller.key) if caller.key else set()
        later = sorted(work for work in works if is_id(work) and work > (cursor or ""))
        page, rest = later[:limit], later[limit:]
        found = []
        for work in page:
            with suppress(_UnknownError):  # removed by the operator, or refused after its owner was stored
                if self._owners.may_see(caller, work):
                    found.append(self._find(work, root, jobs))
        return BulkList(runs=found, next=page[-1] if rest else None)

    def _find(self, work: str, root: str, jobs: dict[str, Job] | None = None) -> BulkResponse:
        out = self._out(work)
        job = (self._jobs.last() if jobs is None else jobs).get(work)
        progress = read_progress(out)
        if job is None and progress is None:
            raise _UnknownError
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
                files=f"{own}/files" if done else None,
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

    def _files(self, work: str) -> BulkFiles:
        names = [f"{RESULTS_FOLDER}/{name}" for name in self._stored(work).files]
        return BulkFiles(id=work, out=self._out(work), files=names)

    def _page(self, work: str, limit: int, cursor: str | None) -> Page:
        return self._stored(work).page(limit, cursor)

    def _rows(self, work: str) -> Iterator[pa.RecordBatch]:
        return self._stored(work).batches()

    def _stored(self, work: str) -> StoredRows:
        stored = StoredRows(storage.join(self._out(work), RESULTS_FOLDER))
        if not stored.files:
            raise Refusal(404, "no_results_yet", "there are no results; they are put together at the end")
        return stored

    def _out(self, work: str) -> str:
        if not is_id(work):
            raise _UnknownError
        return storage.join(self._settings.out, work)


def is_id(text: str) -> bool:
    """Whether it is written as the id of a bulk run."""
    return bool(_ID.fullmatch(text))


def _pieces(file: Any, first: bytes) -> Iterator[bytes]:
    with file:
        while first:
            yield first
            first = file.read(_PIECE)


def _work_id(source: str, out: str, served: ServedModel) -> str:
    what = "\n".join((source, out, served.model_version, served.precision))
    return f"bulk-{hashlib.sha256(what.encode()).hexdigest()[:20]}"


def _status(job: Job | None, progress: Progress | None) -> Status:
    if job and job.is_alive:
        return job.status
    if progress and progress.finished:
        return "succeeded"
    # A job that Ray has forgotten was lost with its cluster.
    return job.status if job else "stopped"
