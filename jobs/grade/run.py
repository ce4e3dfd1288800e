"""The second step of `scalp grade`: shards that are not committed yet, through loading tasks and models."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from jobs.common.console import console, now, progress_bar, write_json
from jobs.common.executor import Executor, PipelineSize
from jobs.common.prometheus import GradeMetrics
from jobs.grade.files import Listing, committed, ended, is_whole, shard_names
from jobs.grade.loading import LoadShard
from jobs.grade.planning import Plan
from jobs.grade.shards import GradeShard
from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Hardware
from scalp_core.results.schema import Signature
from scalp_core.storage.lease import Guard

# Shards that one execution of Ray Data holds the names of: the driver's memory does not grow beyond it.
# Models start again in each, which takes seconds: of an hour of a CPU's work, or half an hour of a GPU's.
_WINDOW: dict[Hardware, int] = {"cpu": 2_500, "cuda": 20_000}
# Too few rows say nothing about a source.
_HOPELESS_FROM = 200
_SESSION_EVERY_S = 5.0
_NODES_EVERY_S = 5.0
_POINTS = 240
_DEATHS = "deaths"  # folder, in that of the run

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One time that the run ran: what it graded, how fast, on how many nodes. Kept beside the shards.

    Args:
        uri: of its file.
        nodes: counts the nodes that are alive.
    """

    uri: str
    nodes: Callable[[], int]
    started_at: str = field(default_factory=now)
    photographs: int = 0
    failed: int = 0
    node_seconds: float = 0.0
    points: list[list[float]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._started = self._written = self._looked = time.monotonic()
        self._alive = 1
        self._every = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def machine_hours(self) -> float:
        return self.node_seconds / 3600

    def add(self, rows: int, failed: int, errors: dict[str, int]) -> None:
        """Counts a shard that was committed."""
        self.photographs += rows
        self.failed += failed
        self.errors.update(errors)
        self._look()
        if not self.points or self.seconds - self.points[-1][0] >= self._every:
            self.points.append([round(self.seconds, 2), self.photographs, self.failed])
        if len(self.points) > _POINTS:  # every second one tells as much
            self.points = self.points[1::2]
            self._every = 2 * self.seconds / _POINTS
        if time.monotonic() - self._written > _SESSION_EVERY_S:
            self.write()

    def write(self) -> None:
        """Keeps it, so that a run that is killed is known to have run."""
        self._look()
        self._written = time.monotonic()
        last = [[round(self.seconds, 2), self.photographs, self.failed]]
        write_json(
            self.uri,
            {
                "started_at": self.started_at,
                "seconds": round(self.seconds, 1),
                "photographs": self.photographs,
                "failed": self.failed,
                "node_seconds": round(self.node_seconds, 1),
                "points": self.points + (last if self.points[-1:] != last else []),
            },
        )

    def _look(self) -> None:
        """Nodes come and go: each moment costs as many as there are."""
        moment = time.monotonic()
        if moment - self._looked > _NODES_EVERY_S or self._looked == self._started:
            self._alive = self.nodes()
        self.node_seconds += self._alive * (moment - self._looked)
        self._looked = moment


@dataclass(frozen=True)
class Work:
    """What is needed to run shards.

    Args:
        out: of the run.
        folder: in it, of what is being done.
        listing: what there is.
        plan: how the cluster is used.
        spec: the bundle's contract.
        signature: of the rows.
        model: makes the model in its actor.
        max_failed_share: above which a run is hopeless.
        guard: of the run's lease.
        executor: runs the steps.
        within: as for `LoadShard`.
    """

    out: str
    folder: str
    listing: Listing
    plan: Plan
    spec: BundleSpec
    signature: Signature
    model: Callable[[], Any]
    max_failed_share: float
    guard: Guard
    executor: Executor
    within: tuple[str, ...] = ()


def run_pending(work: Work, session: Session) -> None:
    """Grade and commit every shard that is not committed yet.

    Raises:
        UserError: too large a share fails, or the output cannot be written.
    """
    session.write()
    done = _done(work)
    if done:
        console.print(f"resuming: {done:,} photographs are done already")
    pending = _pending(work)
    total = None if work.listing.tars else work.listing.photographs
    metrics = GradeMetrics(work.out, total, done)
    with metrics, progress_bar("grading", total, done) as (progress, bar):
        while window := list(islice(pending, _WINDOW[work.plan.device])):
            logger.info("grading %d shards", len(window))
            for row in _graded(window, work):
                errors = json.loads(row["errors"])
                session.add(row["rows"], row["failed"], errors)
                metrics.add(row["rows"], errors, json.loads(row["seconds"]))
                progress.update(bar, advance=row["rows"], note=_note(session))
                _check_hopeless(session, work.max_failed_share)


def _note(session: Session) -> str:
    rate = session.photographs / max(session.seconds, 0.1)
    return f"{rate:.0f}/s, {session.failed:,} failed, {session.machine_hours:.2f} machine-hours"


def _graded(shards: list[dict[str, Any]], work: Work) -> Iterator[dict[str, Any]]:
    """One row per shard that was committed: `rows, failed, errors, seconds`."""
    plan, listing = work.plan, work.listing
    listed = storage.join(work.folder, listing.folder)
    spec, size_of_shard = work.spec.preprocess, listing.shard_size
    load = LoadShard(work.folder, listed, spec, size_of_shard, plan.fetches, work.within)
    low, high = (min(number, len(shards)) for number in plan.models)
    if listing.tars:
        high = plan.models[1]  # a tar is one shard here, and many pieces later
    size = PipelineSize(
        loaders=min(plan.loaders, len(shards)),
        models=(low, high),
        cpus_per_model=plan.cpus_per_model,
        gpus_per_model=plan.gpus_per_model,
        store_bytes=plan.store_bytes,
    )
    arguments = (work.folder, work.guard, work.spec, work.signature, work.model, plan.batch_size)
    deaths = storage.join(work.folder, _DEATHS)
    return work.executor.pipeline(shards, load, GradeShard, arguments, size, deaths)


def _done(work: Work) -> int:
    """Images that are committed already; of a tar that was not read to its end, approximately."""
    size, total = work.listing.shard_size, 0
    for group in work.listing.groups:
        for shard, tags in committed(work.folder, group).items():
            place = int(shard.rsplit("/", 1)[-1])
            pieces = max(map(len, tags.values()))
            total += size * pieces if group.tars else min(size, group.photographs - place * size)
    return total


def _pending(work: Work) -> Iterator[dict[str, Any]]:
    """Items of `LoadShard`, a group at a time."""
    for group in work.listing.groups:
        names = shard_names(group, work.listing.shard_size)
        known, ends = committed(work.folder, group), ended(work.folder, group)
        for shard in names:
            pieces = known.get(shard, {})
            if not is_whole(group, pieces, ends.get(shard)):
                done = {tag: sorted(numbers) for tag, numbers in pieces.items()}
                yield {"shard": shard, "tar": bool(group.tars), "done": json.dumps(done)}


def _check_hopeless(session: Session, most: float) -> None:
    if session.photographs < _HOPELESS_FROM or session.failed <= most * session.photographs:
        return
    reasons = ", ".join(f"{code} {count:,}" for code, count in session.errors.most_common(3))
    raise UserError(
        f"{session.failed:,} of the first {session.photographs:,} photographs failed ({reasons}), more than "
        f"--max-failed-share {most:g}; fix the cause and run the same command again with --retry-failed, "
        "or as it is with --max-failed-share 1"
    )
