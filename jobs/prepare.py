"""`scalp prepare`: a source of photographs to a manifest whose parts do not leak, and a report on the data.

Three steps, each in Ray's workers and each leaving its files below `OUT/work`, so that the driver's memory
does not grow with the source and a run that was stopped goes on:

    list      what the source holds, into shards of `inventory.LISTED`
    examine   each shard read, hashed and decoded, into shards of `inventory.EXAMINED`
    audit     what is kept, dropped and odd; groups, parts; the manifest
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.growth import room_to_work
from cluster.local import connect
from jobs.console import SUMMARY_FILE, Clock, console, now, progress_bar, read_json, show, write_json
from jobs.preflight import check_nodes
from jobs.shards import (
    EXAMINED,
    LISTED,
    OBJECTS_A_SHARD,
    PATIENCE_S,
    ExamineShard,
    ListRoots,
    each,
    shares,
)
from scalp_core import audit, data_report, inventory, manifest, provenance, storage
from scalp_core.audit import Options
from scalp_core.errors import SourceError, UserError
from scalp_core.grades import SYMPTOMS
from scalp_core.inventory import Root
from scalp_core.manifest import PARTS, DataSpec
from scalp_core.split import parse_ratio

REPORT_FILE = "report.html"

ListTask = Callable[[str], Callable[[dict[str, Any]], dict[str, Any]]]
ExamineTask = Callable[[str, str], Callable[[dict[str, Any]], dict[str, Any]]]

_WORK = "work"
_IDENTITY_FILE = "run.json"
_LISTING_FILE = "listing.json"
_POLL_S = 1.0


def prepare(
    source: str,
    out: str,
    options: Options = Options(),  # noqa: B008
    *,
    list_task: ListTask = ListRoots,
    examine_task: ExamineTask = ExamineShard,
) -> dict[str, Any]:
    """Lists, examines and audits a source.

    Args:
        source: folder, prefix, archive or table; local or `s3://`.
        out: directory for the manifest, the report and the lists of what was dropped and found.
        options: which labels, and how to split.
        list_task: what lists; `scalp bench scale` puts a simulated one in its place.
        examine_task: what examines.

    Returns:
        the summary that is also written to `out/summary.json`.

    Raises:
        UserError: bad input; or `out` holds something else.
    """
    clock = Clock()
    source, out = storage.absolute(source), storage.absolute(out)
    _check_options(options)
    if out == source or out.startswith(f"{source}/"):
        raise UserError(f"{out} lies in {source}, whose objects it would join; choose an OUT outside of it")
    identity = {"source": source, **_as_json(options)}
    if summary := _finished(out, identity):
        console.print(f"{out} is prepared already; remove it to read {source} again")
        return summary
    roots = inventory.roots(source)
    room_to_work(connect(), console.print)
    check_nodes([source], out)
    write_json(storage.join(out, _IDENTITY_FILE), identity)
    with storage.patience(PATIENCE_S):
        try:
            summary = _prepare(source, out, options, roots, clock, list_task, examine_task)
        except SourceError:
            storage.remove_folder(storage.join(out, _WORK))
            raise
    _show(summary, out)
    return summary


def _prepare(
    source: str,
    out: str,
    options: Options,
    roots: list[Root],
    clock: Clock,
    list_task: ListTask,
    examine_task: ExamineTask,
) -> dict[str, Any]:
    work = storage.join(out, _WORK)
    listing = _list(source, roots, list_task(work), work)
    clock.lap("list")
    # What lies above the source says nothing about grades; its own name may.
    _examine(listing, examine_task(work, source.rpartition("/")[0]), work)
    clock.lap("examine")
    with console.status("comparing, grouping and splitting"):
        found, audit_mib = _unwrapped(
            _audit.remote(storage.join(work, EXAMINED), source, out, options, inventory.is_table(source))
        )
    clock.lap("audit")
    spec = DataSpec.model_validate(found.pop("spec"))
    examples = {name: found.pop(name) for name in ("sheets", "near_pairs", "dropped_examples")}
    summary = {
        "kind": "prepare",
        "date": now(),
        **spec.model_dump(mode="json", exclude={"schema_version", "created_at"}),
        "objects_listed": listing["objects"],
        **found,
        "peak_mib": {"driver": provenance.peak_mib(), "audit": audit_mib},
        "seconds": clock.total(),
        "seconds_of_stages": clock.laps,
    }
    _check_accounts(summary, out)
    storage.write(storage.join(out, REPORT_FILE), data_report.html(spec, summary, examples))
    write_json(storage.join(out, SUMMARY_FILE), summary)
    manifest.write_spec(out, spec)  # last: what has one is whole
    storage.remove_folder(work)
    return summary


def _check_options(options: Options) -> None:
    parse_ratio(options.ratio)
    if options.symptom not in SYMPTOMS:
        raise UserError(f"--symptom {options.symptom}: give one of {', '.join(SYMPTOMS)}")
    if unknown := [key for key in options.keys if key not in audit.GROUP_KEYS]:
        raise UserError(f"--group {','.join(unknown)}: give some of {','.join(audit.GROUP_KEYS)}")


def _as_json(options: Options) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(options).items()}


def _finished(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished run; refuses a directory of another source or, once finished, other options.

    What an unfinished run has read of the source serves other options as well.
    """
    known = read_json(storage.join(out, _IDENTITY_FILE)) or identity
    finished = storage.exists(storage.join(out, manifest.SPEC_FILE))
    matters = list(identity) if finished else ["source"]
    if changed := [name for name in matters if known.get(name) != identity[name]]:
        raise UserError(
            f"{out} holds data prepared with another {', '.join(changed)}; choose another OUT, or remove it"
        )
    return read_json(storage.join(out, SUMMARY_FILE)) if finished else None


# --- list --------------------------------------------------------------------------------------------------


def _list(source: str, roots: list[Root], task: Any, work: str) -> dict[str, Any]:
    """Names of all shards, and the number of objects; from the last run, if that came so far."""
    known = read_json(storage.join(work, _LISTING_FILE))
    if known:
        return known
    names: list[str] = []
    objects = 0
    with progress_bar("listing", None) as (progress, bar), _following(work, progress, bar):
        for row in each(shares(roots)).map(task).iter_rows():
            names += list(row["names"])
            objects += int(sum(row["counts"]))
    if not objects:
        raise SourceError(f"{source} is empty; check the path")
    listing = {"shards": sorted(names), "objects": objects}
    write_json(storage.join(work, _LISTING_FILE), listing)
    return listing


@contextmanager
def _following(work: str, progress: Any, bar: Any) -> Iterator[None]:
    """Shows how many objects were listed so far: a flat prefix of millions is one task's."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(_POLL_S):
            shards = len(storage.names_in(storage.join(work, LISTED)))
            progress.update(bar, completed=shards * OBJECTS_A_SHARD)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- examine -----------------------------------------------------------------------------------------------


def _examine(listing: dict[str, Any], task: Any, work: str) -> None:
    """Examines what the last run left."""
    done = storage.names_in(storage.join(work, EXAMINED))
    pending = [{"name": name} for name in listing["shards"] if name not in done]
    objects = listing["objects"]
    if done:
        console.print(f"going on: {len(done)} of {len(listing['shards'])} shards are examined already")
    unfetched = 0
    with progress_bar("examining", objects) as (progress, bar):
        progress.update(bar, completed=min(objects, len(done) * OBJECTS_A_SHARD))
        for row in each(pending).map(task).iter_rows():
            unfetched += int(row["unfetched"])
            progress.update(bar, advance=int(row["objects"]), note=f"{unfetched} could not be fetched")


# --- audit -------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=1)
def _audit(*arguments: Any) -> tuple[dict[str, Any], float]:
    """In a worker, so that the driver's memory does not grow with the source.

    As a whole it is done again when storage was away: pyarrow's datasets do not wait.
    """
    examined = arguments[0]
    with storage.patience(PATIENCE_S):
        return storage.retried(examined, audit.audit, *arguments), provenance.peak_mib()


def _unwrapped(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None


def _check_accounts(summary: dict[str, Any], out: str) -> None:
    """Everything that was listed was examined, and every photograph is kept or dropped with a reason."""
    listed, examined = summary["objects_listed"], sum(summary["objects"].values())
    if examined < listed:  # a tar is listed as one object, and becomes its members
        raise UserError(
            f"{listed} objects were listed in {summary['source']}, but {examined} examined; remove {out} and "
            "run the same command again"
        )
    photographs = summary["objects"].get("photograph", 0)
    others = sum(summary["dropped_other"].values())
    kept, dropped = summary["photographs"], sum(summary["dropped"].values()) - others
    if kept + dropped != photographs:
        raise UserError(
            f"{photographs} photographs were found in {summary['source']}, but {kept} kept and {dropped} "
            f"dropped in {out}; remove it and run the same command again"
        )


def _show(summary: dict[str, Any], out: str) -> None:
    rows: dict[str, Any] = {
        "photographs": summary["photographs"],
        "left out": summary["dropped"],
        "found": {word: count for word, count in summary["findings"].items() if count},
    }
    for name in PARTS:
        part = summary["parts"][name]
        if part["photographs"]:
            rows[name] = f"{part['photographs']} of {part['groups']} groups: " + ", ".join(
                f"{grade} {count}" for grade, count in part["by_grade"].items()
            )
    show("prepare", rows | {"report": storage.join(out, REPORT_FILE)})
    for line in data_report.warnings(summary):
        console.print(line)
