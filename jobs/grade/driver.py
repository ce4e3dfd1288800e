"""`scalp grade`: bulk grading of images in storage into Parquet result rows, exactly one row per image.

Three steps leave files: `listing`, then `run` (with `loading` and `shards`), then `gather`. The same command
resumes a stopped run.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from jobs.common.console import SUMMARY_FILE, Clock, console, read_json, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.grade import identity as grade_identity
from jobs.grade import retry as grade_retry
from jobs.grade.files import RETRY_TIMEOUT_S, Listing
from jobs.grade.gather import gather
from jobs.grade.identity import Identity
from jobs.grade.listing import list_small_sources, list_sources
from jobs.grade.planning import Plan, PoolOptions, plan_run, resolve_model, room_for
from jobs.grade.run import Session, Work, run_pending
from jobs.grade.summary import RunDescription, check_accounts, make_summary, read_sessions, show_summary
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import SourceError, UserError
from scalp_core.inference.predictor import Predictor, resolve_runtime
from scalp_core.results.progress import IDENTITY_FILE, SESSIONS
from scalp_core.results.schema import RESULTS_FOLDER, Signature
from scalp_core.storage import outputs
from scalp_core.storage.outputs import Output

logger = logging.getLogger(__name__)

Shared = Callable[[], Bundle]
MakeModel = Callable[[Shared, ModelOptions, int], Any]


@dataclass(frozen=True)
class GradeOptions:
    """Options of a bulk run.

    Args:
        model: Options of inference.
        pool: Numbers and sizes of models and loading tasks.
        max_failed_share: Largest fraction of failed images before the run is stopped.
        retry_failed: Whether to grade the failed images again.
        heatmaps: Maximum number of referred images with a heatmap in the report.
        tables: Whether tables of uris and prepared data, which can name images anywhere, may be sources.
        links: Whether links of local folders may lead out of the source.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    pool: PoolOptions = field(default_factory=PoolOptions)
    max_failed_share: float = 0.5
    retry_failed: bool = False
    heatmaps: int = 12
    tables: bool = True
    links: bool = True


def make_predictor(bundle: Shared, options: ModelOptions, threads: int) -> Predictor:
    """Load and warm up the model of an actor."""
    predictor = Predictor(bundle(), options.device, options.precision, threads, options.runtime)
    predictor.warm_up(options.batch_size)
    return predictor


def grade(
    bundle: str,
    source: str | Sequence[str],
    out: str,
    options: GradeOptions = GradeOptions(),
    make_model: MakeModel = make_predictor,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Grade every image of the sources that has no row in `out` yet.

    Args:
        bundle: Bundle directory, local, `s3://` or `models://`.
        source: One or more folders, prefixes, archives, tables of uris, or outputs of `scalp prepare`.
        out: Output directory, local or `s3://`; a stopped run is resumed.
        options: Options of the run.
        make_model: Makes the model in its actor; benchmarks replace it.
        executor: Runs the steps; default: Ray.

    Returns:
        The summary, also written to `out/summary.json`.

    Raises:
        UserError: Bad input, too many failed images, or images without exactly one row at the end.
    """
    out, clock = storage.absolute(out), Clock()
    given = [source] if isinstance(source, str) else source
    if not options.links:
        _refuse_links(given)
    named = [storage.absolute(uri) for uri in given]
    if not named:
        raise UserError("name a SOURCE: a folder, prefix, archive, table of uris, or prepared data")
    outputs.check_places(named, out)
    known = grade_identity.read(out)
    pinned = grade_identity.pin_bundle(bundle, known)
    loaded = load_bundle(pinned)
    if known:
        grade_identity.check(out, known, loaded.spec, options.model, named)
    summary = read_json(storage.join(out, SUMMARY_FILE))
    is_finished = summary and not summary["rows_unaccounted"] and not outputs.has_scratch(out)
    if summary and is_finished and not (options.retry_failed and summary["failed"]):
        console.print(f"{out} is finished: all {summary['rows']:,} images are accounted for")
        return summary
    requested = grade_identity.resume_options(out, known, options.model) if known else options.model
    # Before Ray is started: a mistyped source is reported immediately.
    scratch = storage.join(out, outputs.SCRATCH_FOLDER)
    listed_early = None if summary else list_small_sources(named, scratch, options.tables, options.links)
    if executor is None:
        from jobs.common.ray_executor import RayExecutor  # slow to import

        executor = RayExecutor()
    cluster = room_for(executor.cluster(), requested, options.pool)
    plan = plan_run(cluster, loaded, requested, options.pool)
    model = resolve_model(requested, plan, executor)
    clock.lap("start")
    # Opened last: a refused command must not claim OUT.
    with outputs.open_output(out, "grade", named) as output, storage.retry_timeout(RETRY_TIMEOUT_S):
        executor.check(named, out)
        # Another run may have started since.
        identity = grade_identity.read(out)
        if identity:
            grade_identity.check(out, identity, loaded.spec, model, named)
            model = grade_identity.resume_options(out, identity, model)
        else:
            identity = Identity.of(loaded.spec, pinned, named, plan.device, model)
            grade_identity.write(out, identity)
        run = _Run(output, identity, named, loaded, model, options, plan, make_model, executor, clock)
        summary = run.resume(listed_early)
    check_accounts(summary, out)
    return summary


def _refuse_links(sources: Sequence[str]) -> None:
    """Refuse local sources whose path has a symbolic link, which listing would follow.

    Raises:
        UserError: A path has a link; names the real path.
    """
    for source in sources:
        if not storage.is_s3(source) and (real := os.path.realpath(source)) != os.path.abspath(source):  # noqa: PTH100
            raise UserError(f"{source} is reached through a link, which --no-links refuses; use {real}")


@dataclass(frozen=True)
class _Run:
    """One session of a run: the state that its steps share."""

    output: Output
    identity: Identity
    named: list[str]
    bundle: Bundle
    model: ModelOptions
    options: GradeOptions
    plan: Plan
    make_model: MakeModel
    executor: Executor
    clock: Clock

    def resume(self, listed_early: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Finish the run from where earlier sessions stopped; return the summary."""
        out, scratch = self.output.uri, self.output.scratch
        summary = read_json(storage.join(out, SUMMARY_FILE))
        storage.remove_temporary(storage.join(out, RESULTS_FOLDER))
        if summary and (retry := grade_retry.find(scratch, summary)):
            return self._run_retry(retry)
        if summary is None or summary["rows_unaccounted"]:
            summary = self._run_all(scratch, listed_early)
        else:
            self._close(summary)  # a session may have been killed after its summary
        if not self.options.retry_failed or not summary["failed"] or summary["rows_unaccounted"]:
            return summary
        retry = grade_retry.begin(self.output, self.plan.shard_size, summary, self.executor)
        return self._run_retry(retry)

    def _run_all(self, scratch: str, listed_early: list[dict[str, Any]] | None) -> dict[str, Any]:
        """List the sources, grade what is not graded yet, and gather the rows."""
        size, options = self.plan.shard_size, self.options
        try:
            listing = list_sources(
                self.named, scratch, size, listed_early, self.executor, options.tables, options.links
            )
        except SourceError:
            # The next command lists the sources again, after they were fixed.
            self.output.remove_scratch()
            storage.remove_file(storage.join(self.output.uri, IDENTITY_FILE))
            raise
        self.clock.lap("list")
        return self._with_runtime(listing)._grade_listing(scratch, listing)

    def _with_runtime(self, listing: Listing) -> _Run:
        """Resolve the runtime, which on GPUs depends on the number of images, before the first row."""
        if self.identity.runtime != "auto":
            return self
        count = listing.photographs / self.plan.models[1]
        runtime = resolve_runtime("auto", self.plan.device, count)
        identity = replace(self.identity, runtime=runtime)
        grade_identity.write(self.output.uri, identity)
        return replace(self, identity=identity, model=replace(self.model, runtime=runtime))

    def _grade_listing(self, scratch: str, listing: Listing) -> dict[str, Any]:
        """Grade the listed images, and gather their rows."""
        console.print(f"grading {_size(listing)} with {self.identity.model_version}")
        console.print(f"computed by {self.identity.computed_by}")
        console.print(str(self.plan))
        self._grade(scratch, listing, self.options.max_failed_share)
        self.output.check()
        totals = gather(self.output.uri, scratch, listing, self.output.guard, self.executor)
        self.clock.lap("gather")
        return self._finish(make_summary(self._describe(), totals, listing, read_sessions(scratch)))

    def _run_retry(self, retry: grade_retry.Retry) -> dict[str, Any]:
        """Grade the failed images again, and replace their rows."""
        listing, before = retry.listing, retry.before
        self.clock.lap("list")
        console.print(f"grading {_size(listing)} again with {self.identity.model_version}")
        self._grade(retry.folder, listing, 1)  # no limit: most may fail again
        self.output.check()
        totals = grade_retry.merge(self.output, retry, self.executor)
        self.clock.lap("gather")
        sessions = before["sessions"] + read_sessions(retry.folder)
        return self._finish(make_summary(self._describe(), totals, listing, sessions, before, retry.name))

    def _grade(self, folder: str, listing: Listing, max_failed_share: float) -> None:
        # Microseconds: short sessions of one second stay in their order.
        name = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}-{uuid.uuid4().hex[:8]}.json"
        session = Session(storage.join(folder, SESSIONS, name), self.executor.nodes)
        make_model = partial(
            grade_identity.make_checked, self.make_model, self.identity, self.executor.share(self.bundle),
            self.model, self.plan.cpus_per_model,
        )  # fmt: skip
        signature = Signature(self.identity.model_version, self.identity.computed_by)
        work = Work(
            self.output.uri, folder, listing, self.plan, self.bundle.spec, signature,
            make_model, max_failed_share, self.output.guard, self.executor, self._within(),
        )  # fmt: skip
        try:
            run_pending(work, session)
        finally:
            with suppress(UserError):  # the error that stopped the run is reported instead
                session.write()
            self.clock.lap("grade")

    def _within(self) -> tuple[str, ...]:
        if self.options.links:
            return ()
        return tuple(uri for uri in self.named if not storage.is_s3(uri))  # without links: `_refuse_links`

    def _describe(self) -> RunDescription:
        settings = {**vars(self.model), **vars(self.plan), "models": list(self.plan.models)}
        spec, laps = self.bundle.spec, self.clock.laps
        return RunDescription(self.identity, self.named, spec, settings, laps)

    def _finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        self.output.check()
        write_json(storage.join(self.output.uri, SUMMARY_FILE), summary)
        self._close(summary)
        show_summary(summary, self.output.uri)
        return summary

    def _close(self, summary: dict[str, Any]) -> None:
        """Write the report, then remove the scratch folder: a run without one is finished."""
        if self.options.heatmaps:
            self.bundle.fetch("weights")
        logger.info("writing the report of %s", self.output.uri)
        # In a worker: queries of many rows, and PyTorch, would take memory of the driver.
        self.executor.call(_report, self.output.uri, summary, self.bundle, self.options.heatmaps)
        if not summary["rows_unaccounted"]:
            self.output.remove_scratch()


def _report(out: str, summary: dict[str, Any], bundle: Bundle, heatmaps: int) -> None:
    from jobs.grade.report import write_report  # slow to import

    with storage.retry_timeout(RETRY_TIMEOUT_S):
        write_report(out, summary, bundle, heatmaps)


def _size(listing: Listing) -> str:
    if not listing.tars:
        return f"{listing.photographs:,} images"
    return f"{listing.photographs:,} images and those in {listing.tars:,} tar{'s' * (listing.tars > 1)}"
