"""Bulk runs of `/v1/bulk`: `scalp grade` as a Ray job, with the bundle that the endpoint serves.

The id of a run is a hash of source, output and model. Therefore repeated requests start one job, a stopped or
failed run is resumed by the same request, and its output is found after Ray has dropped the job. A caller
sees the runs that it owns (`owners.py`); other runs are answered as unknown.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import ray

from cluster.jobs_api import Job, Jobs
from cluster.resources import ClusterError
from scalp_core import storage
from scalp_core.bundles.bundle import read_spec
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Precision
from scalp_core.results.progress import REPORT_FILE, SUMMARY_FILE, Progress, read_progress
from scalp_core.results.schema import RESULTS_FOLDER
from serving.auth.scopes import Caller
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
_WORK = re.compile(r"bulk-[0-9a-f]{20}")
_ERROR = re.compile(r"^error: (.*)(?:\nhint:  (.*))?", re.MULTILINE)

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
    """Bulk runs of a replica. The methods block, except `start` and `run`, which calls the others.

    They raise `Refusal` if the caller owns no run with the id.
    """

    def __init__(self, settings: BulkSettings, served: Callable[[], Awaitable[ServedModel]]) -> None:
        self._settings = settings
        self._owners = Owners(settings.out)
        self._served = served
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
        except (TimeoutError, ClusterError) as error:
            what = "Ray's Job API" if isinstance(error, ClusterError) else "Ray's Job API or the storage"
            raise Refusal(503, "jobs_unavailable", f"{what} does not answer; try again later") from error
        except UserError as error:
            raise Refusal(503, "storage_unavailable", str(error)) from None

    def find(self, caller: Caller, work: str, root: str) -> BulkResponse:
        """Status and progress of a bulk run."""
        self._owned(caller, work)
        return self._describe(work, root, _last_jobs(Jobs.of_this_ray()))

    def list(self, caller: Caller, root: str, limit: int, cursor: str | None) -> BulkList:
        """List the runs of the caller, for an admin of all owners, in the order of ids."""
        jobs = _last_jobs(Jobs.of_this_ray())
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
        """Stop the job of a run, if one is running."""
        self._owned(caller, work)
        ray_jobs = Jobs.of_this_ray()
        if (job := _last_jobs(ray_jobs).get(work)) and job.is_alive:
            ray_jobs.stop_job(job.id)
        return self._describe(work, root, _last_jobs(ray_jobs))

    def report(self, caller: Caller, work: str) -> bytes:
        """Read the HTML report; raises `Refusal` if it does not exist yet."""
        uri = storage.join(self._owned(caller, work), REPORT_FILE)
        if not storage.exists(uri):
            raise Refusal(404, "no_report_yet", "there is no report yet; it is written at the end of the run")
        return storage.read(uri)

    def files(self, caller: Caller, work: str) -> BulkFiles:
        """List the Parquet files with the rows."""
        names = [f"{RESULTS_FOLDER}/{name}" for name in self.rows(caller, work).files]
        return BulkFiles(id=work, out=self._out(work), files=names)

    def page(self, caller: Caller, work: str, limit: int, cursor: str | None) -> Page:
        """Read the page of rows after a cursor; raises `Refusal` if the cursor is not of these rows."""
        return self.rows(caller, work).page(limit, cursor)

    def rows(self, caller: Caller, work: str) -> StoredRows:
        """Find the rows of a run; raises `Refusal` if there are no results yet.

        Before the summary is written, the folder of the results may hold a part of the rows.
        """
        out = self._owned(caller, work)
        rows = StoredRows(storage.join(out, RESULTS_FOLDER))
        if not rows.files or not storage.exists(storage.join(out, SUMMARY_FILE)):
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
        ray_jobs = Jobs.of_this_ray()
        jobs = _last_jobs(ray_jobs)
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
            ray_jobs.submit(f"{work}.{attempt}", self._command(work, source, served), {"source": source})
            jobs = _last_jobs(ray_jobs)
        else:
            self._owners.add(caller, work, source)
        return self._describe(work, root, jobs)

    def _command(self, work: str, source: str, served: ServedModel) -> str:
        # -P: Python imports nothing from the working directory of the job.
        # With the real path, --no-links refuses a link that was created after the check.
        real = source if storage.is_s3(source) else os.path.realpath(source)
        words = [sys.executable, "-P", "-m", "jobs.cli", "grade", served.bundle, real, self._out(work)]
        words += ["--no-tables", "--no-links", "--precision", served.precision, *self._settings.options]
        # Without RAY_ADDRESS a job may join another Ray of the machine (Ray 2.60).
        return f"RAY_ADDRESS={ray.get_runtime_context().gcs_address} {shlex.join(words)}"

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
            error=_error_line(job.message or "") if job and status == "failed" else None,
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


def is_id(text: str) -> bool:
    """Whether `text` has the format of an id of a bulk run."""
    return bool(_WORK.fullmatch(text))


def _last_jobs(jobs: Jobs) -> dict[str, Job]:
    """The last attempt of each bulk run that Ray lists, by the id of the run."""
    last: dict[str, Job] = {}
    for job in jobs.all():
        if is_id(job.work) and (job.work not in last or last[job.work].attempt < job.attempt):
            last[job.work] = job
    return last


def _error_line(message: str) -> str:
    """Last error of `scalp grade` in Ray's message of a failed job, or else the first line of the message."""
    if errors := _ERROR.findall(message):
        return "; ".join(filter(None, errors[-1]))
    return message.strip().partition("\n")[0] or "the job failed; Ray's log of it has the reason"


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
