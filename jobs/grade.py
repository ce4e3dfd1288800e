"""`scalp grade`: photographs wherever they lie to Parquet result rows, each accounted for exactly once.

Three steps that leave files: list (`grade_list`), run (`grade_run`, `grade_shards`), gather (`grade_gather`).
A run that is stopped anywhere goes on by the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray

from cluster.local import connect
from jobs import grade_retry
from jobs.console import SUMMARY_FILE, Clock, console, now, read_json, show, write_json
from jobs.grade_gather import Found, gather
from jobs.grade_list import Listing, glance, list_sources
from jobs.grade_plan import Plan, PoolOptions, plan_run, room_for
from jobs.grade_run import Session, Work, run_pending
from jobs.grade_shards import PATIENCE_S
from jobs.pipeline import ModelOptions
from jobs.preflight import check_nodes
from scalp_core import provenance, sources, storage
from scalp_core.bundle import Bundle, BundleSpec, load_bundle
from scalp_core.drift import compare
from scalp_core.errors import SourceError, UserError
from scalp_core.predictor import Predictor, resolve_runtime
from scalp_core.progress import IDENTITY_FILE, REPORT_FILE, SESSIONS, WORK
from scalp_core.results import RESULTS_FOLDER

MakeModel = Callable[[ray.ObjectRef, ModelOptions, int], Any]


@dataclass(frozen=True)
class GradeOptions:
    """How to grade.

    Args:
        model: how the model runs.
        pool: how the cluster is used.
        max_failed_share: a run of which more fails is stopped.
        retry_failed: grade the failed rows again.
        heatmaps: referred photographs that the report shows with a heatmap.
        tables: tables of uris and prepared data, which name photographs anywhere, may be sources.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    pool: PoolOptions = field(default_factory=PoolOptions)
    max_failed_share: float = 0.5
    retry_failed: bool = False
    heatmaps: int = 12
    tables: bool = True


def make_predictor(bundle: ray.ObjectRef, options: ModelOptions, threads: int) -> Predictor:
    """The model of an actor, warm."""
    predictor = Predictor(ray.get(bundle), options.device, options.precision, threads, options.runtime)
    predictor.warm_up(options.batch_size)
    return predictor


def grade(
    bundle: str,
    source: str | Sequence[str],
    out: str,
    options: GradeOptions = GradeOptions(),
    make_model: MakeModel = make_predictor,
) -> dict[str, Any]:
    """Grades every photograph that `out` does not hold yet.

    Args:
        bundle: directory of the bundle, local, `s3://` or `models://`.
        source: one or more folders, prefixes, archives, tables of uris, directories of `scalp prepare`.
        out: directory, local or `s3://`; a run that was stopped goes on where it was.
        options: how.
        make_model: what makes the model in its actor; a bench puts another in its place.

    Returns:
        the summary that is also written to `out/summary.json`.

    Raises:
        UserError: bad input, a hopeless source, or rows that are not accounted for at the end.
    """
    out, clock = storage.absolute(out), Clock()
    named = [storage.absolute(each) for each in ([source] if isinstance(source, str) else source)]
    _check_places(named, out)
    loaded = load_bundle(bundle)
    version = loaded.spec.version_in(options.model.precision)
    identity = _identity(loaded.spec, version, named, options)
    _check_identity(out, identity)
    summary = read_json(storage.join(out, SUMMARY_FILE))
    again = options.retry_failed and summary and summary["failed"]
    if summary and not summary["rows_unaccounted"] and not grade_retry.is_pending(out) and not again:
        if not storage.is_empty(storage.join(out, WORK)):
            _finish_report(out, summary, loaded, options)
        console.print(f"{out} is finished: all {summary['rows']:,} photographs are accounted for")
        return summary
    # Before Ray is started: a mistyped source is told at once.
    glanced = None if summary else glance(named, storage.join(out, WORK), options.tables)
    cluster = room_for(connect(), options.model, options.pool)
    check_nodes(named, out)
    plan = plan_run(cluster, loaded, options.model, options.pool)
    clock.lap("start")
    # Not before: a command that was refused must not bind OUT to its mistake.
    write_json(storage.join(out, IDENTITY_FILE), identity)
    run = _Run(out, named, loaded, version, options, plan, make_model, clock)
    with storage.patience(PATIENCE_S):
        if summary is None or (not grade_retry.is_pending(out) and summary["rows_unaccounted"]):
            summary = run.first(glanced)
        if grade_retry.is_pending(out) or (options.retry_failed and summary["failed"]):
            summary = run.again(summary)
    _check_accounts(summary, out)
    return summary


def _finish_report(out: str, summary: dict[str, Any], bundle: Bundle, options: GradeOptions) -> None:
    """What a call that was killed behind its summary did not come to."""
    from jobs.grade_report import write_report

    write_report(out, summary, bundle, options.heatmaps)
    _close(storage.join(out, WORK), summary)


def _check_places(named: list[str], out: str) -> None:
    if not named:
        raise UserError("name a SOURCE: a folder, prefix, archive, table of uris, or prepared data")
    sources.check_disjoint(named)
    for source in named:
        if out == source or out.startswith(f"{source}/"):
            raise UserError(f"{out} lies in {source}, whose files it would join; choose an OUT outside of it")


def _identity(spec: BundleSpec, version: str, named: list[str], options: GradeOptions) -> dict[str, Any]:
    """What all rows of one output have in common."""
    return {
        "model_version": version,
        "bundle": spec.fingerprint,
        "precision": options.model.precision,
        "sources": named,
    }


def _check_identity(out: str, identity: dict[str, Any]) -> None:
    """One output belongs to one bundle and the same sources; mixing would make every count a lie."""
    uri = storage.join(out, IDENTITY_FILE)
    known = read_json(uri)
    if known is None:
        if storage.exists(storage.join(out, SUMMARY_FILE)):
            raise UserError(f"{out} holds something else than results of scalp grade; choose another OUT")
        return
    for name, value in identity.items():
        if known.get(name) != value:
            raise UserError(
                f"{out} holds results of {name} {_words(known.get(name))}, not {_words(value)}; "
                "choose another OUT, or remove it"
            )


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class _Run:
    """One call of the verb: what its steps share."""

    out: str
    named: list[str]
    bundle: Bundle
    version: str
    options: GradeOptions
    plan: Plan
    make_model: MakeModel
    clock: Clock

    def first(self, glanced: list[dict[str, Any]] | None) -> dict[str, Any]:
        """Lists, runs and gathers what is left of it."""
        work = storage.join(self.out, WORK)
        try:
            listing = list_sources(self.named, work, self.plan.shard_size, glanced, self.options.tables)
        except SourceError:
            # Whoever mends the source, or its name, wants it read anew.
            storage.remove_folder(work)
            storage.remove_file(storage.join(self.out, IDENTITY_FILE))
            raise
        self.clock.lap("list")
        console.print(f"grading {_size(listing)} with {self.version}")
        console.print(str(self.plan))
        self._run(work, listing, self.options.max_failed_share)
        self.clock.lap("grade")
        found = gather(self.out, work, listing)
        self.clock.lap("gather")
        return self._finish(work, found, listing, _sessions(work))

    def again(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Grades the failed rows again, and puts what comes of it in their place."""
        work = storage.join(self.out, grade_retry.FOLDER)
        listing, before = grade_retry.list_failed(self.out, work, self.plan.shard_size, summary)
        self.clock.lap("list")
        console.print(f"grading {_size(listing)} again with {self.version}")
        self._run(work, listing, 1)  # what failed once may well fail again
        self.clock.lap("grade")
        found = grade_retry.merge(self.out, work, listing, before)
        self.clock.lap("gather")
        return self._finish(work, found, listing, before["sessions"] + _sessions(work), before)

    def _run(self, folder: str, listing: Listing, max_failed_share: float) -> None:
        session = Session(storage.join(folder, SESSIONS, f"{now()}.json"))
        asked, plan = self.options.model, self.plan
        runtime = resolve_runtime(asked.runtime, plan.device, listing.photographs / plan.models[1])
        model = partial(
            self.make_model, ray.put(self.bundle), replace(asked, runtime=runtime), plan.cpus_per_model
        )
        spec = self.bundle.spec
        work = Work(self.out, folder, listing, plan, spec, self.version, model, max_failed_share)
        try:
            run_pending(work, session)
        finally:
            with suppress(UserError):  # what stopped it is told, not what came of it
                session.write()

    def _finish(
        self,
        work: str,
        found: Found,
        listing: Listing,
        sessions: list[dict[str, Any]],
        before: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        summary = _summary(self, found, listing, sessions, before or {})
        write_json(storage.join(self.out, SUMMARY_FILE), summary)
        if self.options.heatmaps:
            self.bundle.fetch("weights")
        # In a worker: asking many rows, and PyTorch, take memory that the driver must not.
        ray.get(_report.remote(self.out, summary, self.bundle, self.options.heatmaps))
        _close(work, summary)
        _show(summary, self.out)
        return summary


@ray.remote(num_cpus=1)
def _report(out: str, summary: dict[str, Any], bundle: Bundle, heatmaps: int) -> None:
    from jobs.grade_report import write_report  # draws: not for whoever only lists

    with storage.patience(PATIENCE_S):
        write_report(out, summary, bundle, heatmaps)


def _close(work: str, summary: dict[str, Any]) -> None:
    """Last: what is gone is finished."""
    if not summary["rows_unaccounted"]:
        storage.remove_folder(work)


def _size(listing: Listing) -> str:
    if not listing.tars:
        return f"{listing.photographs:,} photographs"
    return f"{listing.photographs:,} photographs and those in {listing.tars:,} tar{'s' * (listing.tars > 1)}"


def _sessions(work: str) -> list[dict[str, Any]]:
    folder = storage.join(work, SESSIONS)
    return [read_json(storage.join(folder, name)) or {} for name in sorted(storage.names_in(folder))]


def _summary(
    run: _Run, found: Found, listing: Listing, sessions: list[dict[str, Any]], before: dict[str, Any]
) -> dict[str, Any]:
    seconds = sum(session["seconds"] for session in sessions)
    graded = sum(found.by_grade.values())
    photographs = sum(session["photographs"] for session in sessions)
    return {
        "kind": "grade",
        "date": now(),
        "model_version": run.version,
        "sources": run.named,
        "rows": found.rows,
        "graded": graded,
        "failed": found.rows - graded,
        "rows_unaccounted": found.unaccounted,
        "graded_again": found.again,
        "by_grade": {name: found.by_grade[name] for name in run.bundle.spec.grade_names},
        "by_error": dict(found.by_error.most_common()),
        "referred": found.referred,
        "by_reason": dict(found.by_reason.most_common()),
        "other_files": before.get("other_files", listing.other_files + found.other_files),
        "shadowed_members": before.get("shadowed_members", listing.shadowed + found.shadowed),
        "repeated": before.get("repeated", listing.repeated),
        "seconds": round(seconds, 1),
        "seconds_of_stages": run.clock.laps,
        "photographs_per_second": round(photographs / max(seconds, 0.1), 1),
        "machine_hours": round(sum(session["node_seconds"] for session in sessions) / 3600, 4),
        "settings": {**vars(run.options.model), **vars(run.plan), "models": list(run.plan.models)},
        "versions": provenance.versions(),
        "sessions": sessions,
        "throughput": _throughput(sessions),
        "inputs": found.inputs and found.inputs.model_dump(mode="json"),
        "drift": compare(found.inputs, found.by_grade, run.bundle.spec).model_dump(
            include={"level", "flag", "sentence"}
        ),
    }


def _throughput(sessions: list[dict[str, Any]]) -> list[list[float]]:
    """Seconds at work, photographs and failed, over all sessions."""
    points = [[0.0, 0, 0]]
    for session in sessions:
        before = points[-1]
        points += [[before[place] + point[place] for place in range(3)] for point in session["points"]]
    return points


def _check_accounts(summary: dict[str, Any], out: str) -> None:
    if summary["rows_unaccounted"]:
        raise UserError(
            f"{summary['rows_unaccounted']:,} photographs are not accounted for exactly once in {out}; run "
            "the same command again for those without a row, and with another OUT for those with several"
        )


def _show(summary: dict[str, Any], out: str) -> None:
    names = (
        "rows",
        "graded",
        "failed",
        "by_error",
        "by_grade",
        "referred",
        "rows_unaccounted",
        "graded_again",
    )
    rate = (
        f"{summary['photographs_per_second']:.1f} photographs/s, {summary['machine_hours']:.3f} machine-hours"
    )
    show(
        "grade",
        {name: summary[name] for name in names}
        | {"drift": summary["drift"]["sentence"]}
        | {"seconds": summary["seconds"], "speed": rate}
        | {"results": storage.join(out, RESULTS_FOLDER), "report": storage.join(out, REPORT_FILE)},
    )
