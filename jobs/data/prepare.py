"""`scalp prepare`: build a manifest with splits that do not leak, and a report on the data.

Three steps run in workers and write to the scratch folder of OUT. So the driver's memory does not grow with
the source, and a stopped run resumes:

    list      objects of the source, into shards of `scan.LISTED`
    examine   read, hash and decode the objects of each shard, into shards of `scan.EXAMINED`
    audit     kept and dropped images, findings, groups, splits, manifest

`data.json` is written last: without it, OUT is not finished.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cluster.growth import wait_for_node
from jobs.common import provenance
from jobs.common.console import SUMMARY_FILE, Clock, console, now, progress_bar, read_json, write_json
from jobs.common.executor import Executor
from jobs.data.prepare_summary import REPORT_FILE, check_accounts, format_counts, show_summary
from jobs.data.tasks import (
    EXAMINED,
    OBJECTS_PER_SHARD,
    READERS_FILE,
    RETRY_TIMEOUT_S,
    examine_shard,
    list_labels,
    list_roots,
    split_roots,
)
from scalp_core import archives, storage
from scalp_core.curation import audit
from scalp_core.curation.audit import Options
from scalp_core.curation.splits import parse_ratio
from scalp_core.datasets import manifest, scan, tables
from scalp_core.datasets.group_by import GroupBy
from scalp_core.datasets.manifest import DataSpec, ReviewedLabels
from scalp_core.errors import SourceError, UserError
from scalp_core.grades import SYMPTOM_IDS, SYMPTOMS
from scalp_core.labels.decisions import Conflicts
from scalp_core.labels.log import is_label_log
from scalp_core.reports import data as data_report
from scalp_core.storage import outputs
from scalp_core.storage.lease import Guard
from scalp_core.storage.outputs import Output

_VERB = "prepare"
_IDENTITY_FILE = "run.json"
_LISTING_FILE = "listing.json"

# On two cores Ray examines 1.8 times as many images per second as one process, but starts 10 s later: 2,000
# images and their labels, 104 MiB, took it 16.9 s, and one process 10.2 s.
_SMALL_BYTES = 128 * 2**20

_log = logging.getLogger(__name__)


def is_small(source: str) -> bool:
    """Whether a source is a local folder or archive so small that it is prepared sooner without Ray.

    The images of a table or a label log are elsewhere, and may be many.
    """
    path = Path(source)
    if not path.is_dir():
        return archives.is_archive(source) and path.is_file() and _size(path) < _SMALL_BYTES
    if is_label_log(source):
        return False
    total = 0
    for folder, _, names in os.walk(source):
        total += sum(_size(Path(folder, name)) for name in names)
        if total >= _SMALL_BYTES:
            return False
    return True


def _size(file: Path) -> int:
    with suppress(OSError):  # a dangling link, or removed by now
        return file.stat().st_size
    return 0


def prepare(
    source: str,
    out: str,
    options: Options = Options(),  # noqa: B008
    *,
    retry_failed: bool = False,
    blind_only: bool = False,
    conflicts: Conflicts = "adjudicate",
    executor: Executor | None = None,
) -> dict[str, Any]:
    """List, examine and audit a source.

    Args:
        source: Folder, prefix, archive, table or label log; local or `s3://`. With `options.extend`, a label
            log, whose images are added to the train split of this data.
        out: Output directory for the manifest, the report, and the tables of dropped images and findings.
        options: Labels and splits.
        retry_failed: Read objects again that a finished run could not fetch.
        blind_only: Of a label log, leave out answers given while the reader saw the answer of the model.
        conflicts: Of a label log, what becomes of images on which readers differ, as for `decisions.Answers`.
        executor: Runs the steps; default: Ray.

    Returns:
        The summary, also written to `out/summary.json`.

    Raises:
        UserError: Bad input, or `out` holds something else.
    """
    clock = Clock()
    source, out = storage.absolute(source), storage.absolute(out)
    _check_options(options, source)
    outputs.check_output(out, _VERB, [source])
    # None, so that runs of earlier versions are recognized.
    options = _read_extended(options, source, out)
    identity = {
        "source": source,
        "blind_only": blind_only or None,
        "conflicts": None if conflicts == "adjudicate" else conflicts,
        **vars(options),
        "keys": list(options.keys),
    }
    finished = _read_finished(out, identity)
    if finished and not (retry_failed and finished["could_not_be_fetched"]):
        return _keep_finished(finished, out, source)
    roots = scan.divide_source(source)
    is_log = is_label_log(source)
    if blind_only and not is_log:
        raise UserError(f"--blind-only: {source} is not a label log of scalp review; omit the option")
    if is_log and options.symptom != SYMPTOMS[0]:
        raise UserError(
            f"--symptom {options.symptom}: readers of scalp review grade {SYMPTOMS[0]}; omit the option"
        )
    if conflicts != "adjudicate" and not is_log:
        raise UserError(f"--conflicts: {source} is not a label log of scalp review; omit the option")
    if executor is None:
        from jobs.common.ray_executor import RayExecutor  # slow to import

        executor = RayExecutor()
    wait_for_node(executor.cluster(), console.print)
    sources = [source, *([options.extend] if options.extend else [])]
    executor.check(sources, out)
    with outputs.open_output(out, _VERB, sources) as output, storage.retry_timeout(RETRY_TIMEOUT_S):
        _begin(output, identity, reopen=finished is not None)
        parent = source.rpartition("/")[0]  # only names below it may contain a grade
        examine = partial(examine_shard, output.scratch, parent)
        lists = (
            partial(
                executor.map,
                partial(list_labels, output.scratch, blind_only, conflicts, options.extend),
                [source],
            )
            if is_log
            else partial(executor.map, partial(list_roots, output.scratch), split_roots(roots))
        )
        try:
            summary = _prepare(output, source, options, lists, clock, executor, examine, retry_failed)
        except SourceError:
            storage.remove_file(storage.join(out, _IDENTITY_FILE))  # the fixed source is read again
            output.remove_scratch()
            raise
    if options.group_by and (alone := summary["grouped_by"].get("photograph")):
        console.print(f"{alone:,} images have no group by --group-by: each is a separate group")
    return summary


def _prepare(
    output: Output,
    source: str,
    options: Options,
    lists: Callable[[], Iterable[dict[str, int]]],
    clock: Clock,
    executor: Executor,
    examine: Callable[[tuple[str, bool]], tuple[int, int]],
    retry_failed: bool,
) -> dict[str, Any]:
    out, work = output.uri, output.scratch
    listing = _list(source, lists, work)
    readers = read_json(storage.join(work, READERS_FILE))
    if readers is not None and not readers["with_grade"]:
        raise SourceError(
            f"{source} has no image with an agreed grade "
            f"({format_counts(readers['left_out']) or 'no answer'}); "
            "review more images, or decide between readers with scalp review --adjudicate"
        )
    clock.lap("list")
    _examine(listing, executor, examine, work, retry_failed)
    clock.lap("examine")
    output.check()
    with console.status("comparing, grouping and splitting"):
        audited, audit_mib = executor.call(
            _audit, output.guard, storage.join(work, EXAMINED), source, out, options, readers is not None
        )
    clock.lap("audit")
    spec = DataSpec.model_validate(audited.pop("spec"))
    spec = spec.model_copy(update=_record_labels(source, options, readers, audited["new_images"]))
    examples = {name: audited.pop(name) for name in ("sheets", "near_pairs", "dropped_examples")}
    summary = {
        "kind": _VERB,
        "date": now(),
        **spec.model_dump(mode="json", exclude={"schema_version", "created_at"}),
        "objects_listed": listing["objects"],
        **({"label_log": readers} if readers else {}),
        **audited,
        "peak_mib": {"driver": provenance.peak_mib(), "audit": audit_mib},
        "seconds": clock.total(),
        "seconds_of_stages": clock.laps,
    }
    check_accounts(summary, out)
    output.check()
    storage.write(storage.join(out, REPORT_FILE), data_report.render_report(spec, summary, examples))
    write_json(storage.join(out, SUMMARY_FILE), summary)
    manifest.write_spec(out, spec)  # last: marks the output as finished
    if not summary["could_not_be_fetched"]:  # else --retry-failed needs it
        output.remove_scratch()
    show_summary(spec, summary, out)
    return summary


def _check_options(options: Options, source: str) -> None:
    parse_ratio(options.ratio)
    if options.symptom not in SYMPTOMS:
        raise UserError(
            f"--symptom {options.symptom} is unknown; give one of {', '.join(SYMPTOM_IDS)}, or in Korean"
        )
    if unknown := [key for key in options.keys if key not in audit.GROUP_KEYS]:
        raise UserError(f"--group {','.join(unknown)} is unknown; give some of {','.join(audit.GROUP_KEYS)}")
    if options.group_by:
        GroupBy(options.group_by)
        if scan.is_table(source) and "group" in tables.find_columns(source):
            raise UserError(f"--group-by: the table {source} has a column group; omit one of the two")


def _read_extended(options: Options, source: str, out: str) -> Options:
    """Read how the extended data was split and grouped; the options for its extension.

    Raises:
        UserError: The source has no hashes of its images, the data has no such splits, or an option would
            have no effect.
    """
    if options.extend is None:
        return options
    data = storage.absolute(options.extend)
    outputs.check_output(out, _VERB, [data])
    if options != Options(extend=options.extend, folds=options.folds):
        raise UserError(f"--extend keeps the splits and groups of {data}; omit the other options of them")
    if not is_label_log(source):
        raise UserError(f"--extend: {source} is not a label log of scalp review; omit the option")
    spec = manifest.read_spec(data)
    if spec.split.method != "group":
        raise UserError(f"--extend: {data} is split by {spec.split.method}; give data that is split by group")
    if spec.symptom not in (None, SYMPTOMS[0]):
        raise UserError(
            f"--extend: {data} has grades of {spec.symptom}, and readers grade {SYMPTOMS[0]}; give other data"
        )
    keys = tuple(key for key in spec.split.keys if key in audit.GROUP_KEYS)
    return replace(options, extend=data, ratio=spec.split.ratio, seed=spec.split.seed, keys=keys)


def _record_labels(
    source: str, options: Options, readers: dict[str, Any] | None, images: int
) -> dict[str, Any]:
    """Fields of the data's contract that record the label log, and the data that was extended."""
    before = manifest.read_spec(options.extend) if options.extend else None
    reviews = before.reviews if before else ()
    if readers is not None:
        log = {"labels": source, "answers": readers["answers"], "sha256": readers["sha256"]}
        reviews = (*reviews, ReviewedLabels(**log, images=images))
    return {"reviews": reviews, "extends": (*before.extends, before.sha256) if before else ()}


def _read_finished(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the summary of a finished run; refuse another source or, if finished, other options.

    Examined shards of an unfinished run are reused with other options, except `blind_only` and `conflicts`.
    """
    known = read_json(storage.join(out, _IDENTITY_FILE)) or identity
    finished = storage.exists(storage.join(out, manifest.SPEC_FILE))
    matters = list(identity) if finished else ["source", "blind_only", "conflicts"]
    if changed := [name for name in matters if known.get(name) != identity[name]]:
        raise UserError(
            f"{out} holds data prepared with another {', '.join(changed)}; choose another output directory"
        )
    return read_json(storage.join(out, SUMMARY_FILE)) if finished else None


def _keep_finished(summary: dict[str, Any], out: str, source: str) -> dict[str, Any]:
    """Report that the data is prepared already; return the summary of the finished run."""
    console.print(f"{out} is prepared already; choose another output directory to read {source} again")
    if unfetched := summary["could_not_be_fetched"]:
        console.print(f"{unfetched:,} objects could not be fetched; --retry-failed reads them again")
    elif outputs.has_scratch(out):  # a run that was killed after its last write
        with outputs.open_output(out, _VERB) as output:
            output.remove_scratch()
    return summary


def _begin(output: Output, identity: dict[str, Any], *, reopen: bool) -> None:
    """Write the identity of the run."""
    uri = storage.join(output.uri, _IDENTITY_FILE)
    known = read_json(uri)
    if known is None:  # an earlier run was killed while it removed the shards of a refused source
        output.remove_scratch()
    if reopen:  # not finished any more
        storage.remove_file(storage.join(output.uri, manifest.SPEC_FILE))
    if known != identity:
        write_json(uri, identity)


# --- list --------------------------------------------------------------------------------------------------


def _list(source: str, lists: Callable[[], Iterable[dict[str, int]]], work: str) -> dict[str, Any]:
    """List the source: names of all shards, and number of objects; reuse the listing of an earlier run.

    `lists` starts the listing tasks, and yields the number of objects of each of their shards.
    """
    known = read_json(storage.join(work, _LISTING_FILE))
    if known:
        return known
    counts: dict[str, int] = {}
    with progress_bar("listing", None) as (progress, bar):
        for counts_of_part in lists():
            counts |= counts_of_part
            progress.update(bar, advance=sum(counts_of_part.values()))
    if not counts and not storage.exists(storage.join(work, READERS_FILE)):
        raise SourceError(f"{source} is empty; check the path")
    listing = {"shards": sorted(counts), "objects": sum(counts.values())}
    write_json(storage.join(work, _LISTING_FILE), listing)
    return listing


# --- examine -----------------------------------------------------------------------------------------------


def _examine(listing: dict[str, Any], executor: Executor, task: Any, work: str, retry_failed: bool) -> None:
    """Examine the shards that earlier runs did not; with `retry_failed`, those with failed fetches too."""
    done = storage.names_in(storage.join(work, EXAMINED))
    pending = [(name, name in done) for name in listing["shards"] if retry_failed or name not in done]
    resumed = len(listing["shards"]) - len(pending)
    _log.info("%s: %d shards to examine, %d examined already", work, len(pending), resumed)
    objects = listing["objects"]
    if resumed:
        console.print(f"resuming: {resumed} of {len(listing['shards'])} shards are examined already")
    unfetched = 0
    with progress_bar("examining", objects) as (progress, bar):
        progress.update(bar, completed=min(objects, resumed * OBJECTS_PER_SHARD))
        for objects_of_shard, unfetched_of_shard in executor.map(task, pending):
            unfetched += unfetched_of_shard
            progress.update(bar, advance=objects_of_shard, note=f"{unfetched} could not be fetched")
    examined = storage.names_in(storage.join(work, EXAMINED))
    if missing := set(listing["shards"]) - examined:
        raise UserError(
            f"{len(missing)} of {len(listing['shards'])} shards are not examined, such as {min(missing)} in "
            f"{work}; run the same command again"
        )


# --- audit -------------------------------------------------------------------------------------------------


def _audit(
    guard: Guard, examined: str, source: str, out: str, options: Options, is_log: bool
) -> tuple[Any, float]:
    """Audit the examined shards; runs in a worker, to keep the driver's memory small.

    The whole audit is retried if storage was unavailable: pyarrow's datasets do not retry.
    """
    guard.check()
    with storage.retry_timeout(RETRY_TIMEOUT_S):
        is_table = is_log or scan.is_table(source)
        audited = storage.call_with_retries(examined, audit.audit, examined, source, out, options, is_table)
        return audited, provenance.peak_mib()
