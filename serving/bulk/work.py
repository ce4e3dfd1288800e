"""Bulk runs of `/v1/bulk`: `scalp grade` as a Ray job, with the bundle that the endpoint serves.

The id of a run is a hash of source, output and model. Therefore repeated requests start one job, a stopped or
failed run is resumed by the same request, and its output is found after Ray has dropped the job. A caller
sees the runs that it owns (`owners.py`); other runs are answered as unknown.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from cluster.jobs_api import Job
from scalp_core import storage
from scalp_core.bundles.bundle import read_spec
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Precision
from scalp_core.results.progress import REPORT_FILE, Progress, read_progress
from scalp_core.results.schema import RESULTS_FOLDER
from serving.auth.scopes import Caller
from serving.bulk.jobs import Jobs, error_line, is_id
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

_THREADS = 4
_TIMEOUT_S = 30.0
_MODEL_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 60
_PIECE = 2**18

T = TypeVar("T")


class _UnknownError(Refusal):
    """The refusal of an unknown id, and of an id that another key owns."""

    def __init__(self) -> None:
        super().__init__(404, "no_such_job", "there is no bulk run with this id")


class ServedModel(NamedTuple):
    """Model of the endpoint: location of its bundle with a pinned version, and its precision."""

    bundle: str
    model_version: str
    precision: Precision


class Bulk:
    """Bulk runs of a replica. The methods block, except `start` and `run`, which calls the others."""

    def __init__(self, settings: BulkSettings, served: Callable[[], Awaitable[ServedModel]]) -> None:
        self._settings = settings
        self._owners = Owners(settings.out)
        self._served = served
        self._jobs = Jobs()
        self._pool = ThreadPoolExecutor(_THREADS, "bulk")
        self._one_at_a_time = asyncio.Lock()

    async def start(self, caller: Caller, source: str, root: str) -> BulkResponse:
        """Start a bulk run, or find the running or finished one; the caller becomes an owner.

        Raises:
            Refusal: The source is not allowed, too many jobs run, or the model, Ray or storage do not answer.
        """
        source = await self.run(allowed_source, source, self._settings.sources, caller.rights)
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
            return await self.run(self._start, caller, source, served, root)

    async def run(self, method: Callable[..., T], *arguments: Any) -> T:
        """Call one of the blocking methods below in a separate thread.

        Raises:
            Refusal: Ray or storage do not answer, or as `method`.
        """
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._pool, method, *arguments), _TIMEOUT_S)
        except TimeoutError:
            raise Refusal(
                503, "jobs_unavailable", "Ray's Job API or the storage does not answer; try again later"
            ) from None
        except UserError as error:
            raise Refusal(503, "storage_unavailable", str(error)) from None

    def find(self, caller: Caller, work: str, root: str) -> BulkResponse:
        """Status and progress of a bulk run.

        Raises:
            Refusal: The caller owns no run with this id.
        """
        self._owned(caller, work)
        return self._describe(work, root, self._jobs.last())

    def list(self, caller: Caller, root: str, limit: int, cursor: str | None) -> BulkList:
        """List the runs of the caller, for an admin of all owners, in the order of ids."""
        jobs = self._jobs.last()
        if caller.rights.admin:
            works = {*storage.folders_in(self._settings.out), *jobs}
        else:
            works = self._owners.works(caller.key) if caller.key else set()
        later = sorted(work for work in works if is_id(work) and work > (cursor or ""))
        page, rest = later[:limit], later[limit:]
        runs = []
        for work in page:
            with suppress(_UnknownError):  # removed by the operator, or refused after its owner was stored
                self._owned(caller, work)
                runs.append(self._describe(work, root, jobs))
        return BulkList(runs=runs, next=page[-1] if rest else None)

    def stop(self, caller: Caller, work: str, root: str) -> BulkResponse:
        """Stop the job of a run, if one is running.

        Raises:
            Refusal: As `find`.
        """
        self._owned(caller, work)
        if (job := self._jobs.last().get(work)) and job.is_alive:
            self._jobs.stop(job)
        return self._describe(work, root, self._jobs.last())

    def report(self, caller: Caller, work: str) -> Iterator[bytes]:
        """Read the HTML report, piece by piece.

        Raises:
            Refusal: As `find`, or the report does not exist yet.
        """
        uri = storage.join(self._owned(caller, work), REPORT_FILE)
        try:
            file = storage.open_file(uri)
            first = file.read(_PIECE)
        except OSError as error:
            raise Refusal(
                404, "no_report_yet", "there is no report yet; it is written at the end of the run"
            ) from error
        return _pieces(file, first)

    def files(self, caller: Caller, work: str) -> BulkFiles:
        """List the Parquet files with the rows.

        Raises:
            Refusal: As `rows`.
        """
        names = [f"{RESULTS_FOLDER}/{name}" for name in self.rows(caller, work).files]
        return BulkFiles(id=work, out=self._out(work), files=names)

    def page(self, caller: Caller, work: str, limit: int, cursor: str | None) -> Page:
        """Read the page of rows after a cursor.

        Raises:
            Refusal: As `rows`, or the cursor does not belong to these rows.
        """
        return self.rows(caller, work).page(limit, cursor)

    def rows(self, caller: Caller, work: str) -> StoredRows:
        """Find the rows of a run.

        Raises:
            Refusal: As `find`, or there are no results yet.
        """
        rows = StoredRows(storage.join(self._owned(caller, work), RESULTS_FOLDER))
        if not rows.files:
            raise Refusal(
                404, "no_results_yet", "there are no results yet; they are written at the end of the run"
            )
        return rows

    def _owned(self, caller: Caller, work: str) -> str:
        """Output directory of a run of the caller; another run is refused like an unknown id."""
        out = self._out(work)
        if not self._owners.may_see(caller, work):
            raise _UnknownError
        return out

    def _start(self, caller: Caller, source: str, served: ServedModel, root: str) -> BulkResponse:
        work = _work_id(source, self._settings.out, served)
        jobs = self._jobs.last()
        job, progress = jobs.get(work), read_progress(self._out(work))
        if not (progress and progress.finished) and not (job and job.is_alive):
            if sum(other.is_alive for other in jobs.values()) >= self._settings.jobs:
                raise Refusal(
                    429,
                    "too_many_jobs",
                    f"the limit of {self._settings.jobs:,} running jobs is reached; try again later",
                    {"Retry-After": str(_RETRY_AFTER_S)},
                )
            if read_spec(served.bundle).version_in(served.precision) != served.model_version:
                raise Refusal(
                    409,
                    "bundle_changed",
                    "the bundle's files differ from those in the endpoint; reload the bundle first",
                )
            self._owners.add(caller, work, source)  # before the job, so that each job has an owner
            attempt = job.attempt + 1 if job else 1
            self._jobs.submit(work, attempt, self._command(work, source, served), source)
        else:
            self._owners.add(caller, work, source)
        return self._describe(work, root, self._jobs.last())

    def _command(self, work: str, source: str, served: ServedModel) -> str:
        # -P: Python imports nothing from the working directory of the job.
        # With the real path, --no-links refuses a link that was created after the check.
        real = source if storage.is_s3(source) else os.path.realpath(source)
        words = [sys.executable, "-P", "-m", "jobs.cli", "grade", served.bundle, real, self._out(work)]
        return shlex.join(
            [*words, "--no-tables", "--no-links", "--precision", served.precision, *self._settings.options]
        )

    def _describe(self, work: str, root: str, jobs: dict[str, Job]) -> BulkResponse:
        out, job = self._out(work), jobs.get(work)
        progress = read_progress(out)
        if job is None and progress is None:
            raise _UnknownError
        status = _status(job, progress)
        path = f"{root}/v1/bulk/{work}"
        done = status == "succeeded"
        return BulkResponse(
            id=work,
            status=status,
            source=(job.metadata or {}).get("source", "") if job else progress.sources[0] if progress else "",
            out=out,
            model_version=progress.model_version if progress else None,
            photographs=Photographs(
                done=progress.done if progress else 0,
                failed=progress.failed if progress else 0,
                total=progress.total if progress else None,
            ),
            photographs_per_second=progress.photographs_per_second if progress else None,
            error=error_line(job.message or "") if job and status == "failed" else None,
            started_at=job.started if job else None,
            ended_at=job.ended if job else None,
            links=BulkLinks(
                work=path,
                report=f"{path}/report" if done else None,
                results=f"{path}/results" if done else None,
                files=f"{path}/files" if done else None,
            ),
        )

    def _out(self, work: str) -> str:
        if not is_id(work):
            raise _UnknownError
        return storage.join(self._settings.out, work)


def _pieces(file: Any, first: bytes) -> Iterator[bytes]:
    with file:
        while first:
            yield first
            first = file.read(_PIECE)


def _work_id(source: str, out: str, served: ServedModel) -> str:
    identity = "\n".join((source, out, served.model_version, served.precision))
    return f"bulk-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"


def _status(job: Job | None, progress: Progress | None) -> Status:
    last: Status = job.status.lower() if job else "stopped"
    if job and job.is_alive:
        return last
    if progress and progress.finished:
        return "succeeded"
    return last  # a job that Ray does not list was lost with its cluster
