"""`scalp grade`: bulk grading of images in storage into Parquet result rows, exactly one row per image.

Three steps leave files: `listing`, then `run` (with `loading` and `shards`), then `gather`. The same command
resumes a stopped run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.common.console import SUMMARY_FILE, Clock, console, read_json, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.grade import identity as grade_identity
from jobs.grade import retry as grade_retry
from jobs.grade.files import RETRY_TIMEOUT_S, Listing
from jobs.grade.gather import Gathering
from jobs.grade.identity import Identity
from jobs.grade.listing import find_roots, list_sources
from jobs.grade.planning import PoolOptions, plan_run, resolve_model, room_for
from jobs.grade.run import MakeModel, Run, Shared, grade_shards
from jobs.grade.summary import check_accounts, make_summary, read_sessions, show_summary
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import SourceError, UserError
from scalp_core.inference.predictor import Predictor, resolve_runtime
from scalp_core.results.documents import (
    DOCUMENTS_FOLDER,
    Document,
    documents_uri,
    export_documents,
    plan_documents,
)
from scalp_core.results.progress import IDENTITY_FILE
from scalp_core.results.query import ResultRows
from scalp_core.results.schema import RESULTS_FOLDER
from scalp_core.storage import outputs
from scalp_core.storage.outputs import Output

logger = logging.getLogger(__name__)


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
        documents: Kinds of clinical documents to write of all rows, in addition to those that `out` has.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    pool: PoolOptions = field(default_factory=PoolOptions)
    max_failed_share: float = 0.5
    retry_failed: bool = False
    heatmaps: int = 12
    tables: bool = True
    links: bool = True
    documents: Sequence[Document] = ()


def make_predictor(bundle: Shared, options: ModelOptions, threads: int) -> Predictor:
    """Load and warm up the model of an actor."""
    predictor = Predictor(bundle(), options.device, options.precision, threads, options.runtime)
    predictor.warm_up(options.batch_size, smaller=False)
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
        raise UserError("no SOURCE is named; give a folder, prefix, archive, table of uris, or prepared data")
    requested = options.model
    known, pinned, loaded = grade_identity.open_run(bundle, named, out, requested)
    wanted = options.documents
    summary = read_json(storage.join(out, SUMMARY_FILE))
    is_finished = summary and not summary["rows_unaccounted"] and not outputs.has_scratch(out)
    is_done = is_finished and summary and not (options.retry_failed and summary["failed"])
    if wanted or not is_done:  # otherwise no document is written, so this machine need not be able to
        plan_documents(out, wanted, loaded.spec.symptom)
    if summary and is_done:
        console.print(f"{out} is finished: all {summary['rows']:,} images are accounted for")
        if missing := [kind for kind in wanted if not storage.exists(documents_uri(out, kind))]:
            with outputs.open_output(out, "grade", named) as output, storage.retry_timeout(RETRY_TIMEOUT_S):
                # Another run may have ended, with other documents.
                summary = read_json(storage.join(out, SUMMARY_FILE)) or summary
                kinds = plan_documents(out, wanted, loaded.spec.symptom)
                _write_documents(output, summary, kinds, missing)
        return summary
    if known:
        requested = grade_identity.resume_options(out, known, requested)
    else:  # before Ray is started: a mistyped source is reported immediately
        find_roots(named, options.tables, options.links)
    if executor is None:
        from jobs.common.ray_executor import RayExecutor  # slow to import

        executor = RayExecutor()
    cluster = room_for(executor.cluster(), requested, options.pool)
    plan = plan_run(cluster, loaded, requested, options.pool)
    model = resolve_model(requested, plan, executor)
    clock.lap("start")
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        executor.check(named, out)
    # Opened last: a refused command must not claim OUT.
    with outputs.open_output(out, "grade", named) as output, storage.retry_timeout(RETRY_TIMEOUT_S):
        if grade_identity.read(out) != known:
            raise UserError(f"another scalp grade has begun {out}; run the same command again")
        identity = known or Identity.of(loaded.spec, pinned, named, plan.device, model)
        if not known:
            grade_identity.write(out, identity)
        # Without links: `_refuse_links`.
        within = () if options.links else tuple(uri for uri in named if not storage.is_s3(uri))
        options = replace(options, documents=plan_documents(out, wanted, loaded.spec.symptom))
        run = Run(output, identity, named, loaded, model, plan, make_model, executor, clock, within)
        summary = _resume(run, options)
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


def _resume(run: Run, options: GradeOptions) -> dict[str, Any]:
    """Finish the run from where earlier sessions stopped; return the summary."""
    out, scratch = run.output.uri, run.output.scratch
    summary = read_json(storage.join(out, SUMMARY_FILE))
    storage.remove_temporary(storage.join(out, RESULTS_FOLDER))
    if summary and (retry := grade_retry.find(scratch, summary)):
        return _run_retry(run, options, retry)
    if summary is None or summary["rows_unaccounted"]:
        summary = _run_all(run, options)
    else:
        _close(run, options, summary)  # a session may have been killed after its summary
    if not options.retry_failed or not summary["failed"] or summary["rows_unaccounted"]:
        return summary
    return _run_retry(run, options, grade_retry.begin(run.output, run.plan.shard_size, summary, run.executor))


def _run_all(run: Run, options: GradeOptions) -> dict[str, Any]:
    """List the sources, grade what is not graded yet, and gather the rows."""
    out, scratch = run.output.uri, run.output.scratch
    try:
        listing = list_sources(
            run.named, scratch, run.plan.shard_size, run.executor, options.tables, options.links
        )
    except SourceError:
        # The next command lists the sources again, after they were fixed.
        run.output.remove_scratch()
        storage.remove_file(storage.join(out, IDENTITY_FILE))
        raise
    run.clock.lap("list")
    run = with_runtime(run, listing)
    console.print(f"grading {_size(listing)} with {run.identity.model_version}")
    console.print(f"computed by {run.identity.computed_by}")
    console.print(str(run.plan))
    gathering = Gathering(out, scratch, listing, run.output.guard, run.executor)
    grade_shards(run, scratch, listing, options.max_failed_share, gathering.count)
    run.output.check()
    totals = gathering.finish()
    run.clock.lap("gather")
    return _finish(run, options, make_summary(run, totals, listing, read_sessions(scratch)))


def with_runtime(run: Run, listing: Listing) -> Run:
    """Resolve the runtime, which on GPUs depends on the number of images, before the first row."""
    if run.identity.runtime != "auto":
        return run
    runtime = resolve_runtime("auto", run.plan.device, listing.photographs / run.plan.models[1])
    identity = replace(run.identity, runtime=runtime)
    grade_identity.write(run.output.uri, identity)
    return replace(run, identity=identity, model=replace(run.model, runtime=runtime))


def _run_retry(run: Run, options: GradeOptions, retry: grade_retry.Retry) -> dict[str, Any]:
    """Grade the failed images again, and replace their rows."""
    listing, before = retry.listing, retry.before
    run.clock.lap("list")
    console.print(f"grading {_size(listing)} again with {run.identity.model_version}")
    grade_shards(run, retry.folder, listing, 1)  # no limit: most may fail again
    run.output.check()
    totals = grade_retry.merge(run.output, retry, run.executor)
    run.clock.lap("gather")
    sessions = before["sessions"] + read_sessions(retry.folder)
    return _finish(run, options, make_summary(run, totals, listing, sessions, before, retry.name))


def _finish(run: Run, options: GradeOptions, summary: dict[str, Any]) -> dict[str, Any]:
    run.output.check()
    write_json(storage.join(run.output.uri, SUMMARY_FILE), summary)
    _close(run, options, summary)
    show_summary(summary, run.output.uri)
    return summary


def _close(run: Run, options: GradeOptions, summary: dict[str, Any]) -> None:
    """Write the report, then remove the scratch folder: a run without one is finished."""
    if options.heatmaps:
        run.bundle.fetch("weights")
    logger.info("writing the report of %s", run.output.uri)
    # In a worker: queries of many rows, and PyTorch, would take memory of the driver.
    run.executor.call(_report, run.output.uri, summary, run.bundle, options.heatmaps)
    if not summary["rows_unaccounted"]:
        _write_documents(run.output, summary, options.documents, options.documents)
        run.output.remove_scratch()


def _write_documents(
    output: Output, summary: dict[str, Any], kinds: Sequence[Document], missing: Sequence[Document]
) -> None:
    """Write the missing documents of a finished run.

    The summary names them first: a file that it does not name was made by somebody else, and is kept.
    """
    output.check()
    storage.remove_temporary(storage.join(output.uri, DOCUMENTS_FOLDER))
    if summary.get("documents", []) != list(kinds):
        summary["documents"] = list(kinds)
        write_json(storage.join(output.uri, SUMMARY_FILE), summary)
    for kind in missing:
        uri = documents_uri(output.uri, kind)
        logger.info("writing %s", uri)
        with ResultRows(output.uri) as graded:
            documents = export_documents(kind, output.uri, graded.select_rows(), uri)
        console.print(f"{documents:,} documents are in {uri}")


def _report(out: str, summary: dict[str, Any], bundle: Bundle, heatmaps: int) -> None:
    from jobs.grade.report import write_report  # slow to import

    with storage.retry_timeout(RETRY_TIMEOUT_S):
        write_report(out, summary, bundle, heatmaps)


def _size(listing: Listing) -> str:
    if not listing.tars:
        return f"{listing.photographs:,} images"
    return f"{listing.photographs:,} images and those in {listing.tars:,} tar{'s' * (listing.tars > 1)}"
