"""Second step of `scalp grade`: pass uncommitted shards through loading tasks and models."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jobs.common.console import console, now, progress_bar, write_json
from jobs.common.executor import Executor
from jobs.grade.files import GroupState, ListedGroup, Listing, find_committed, place_of, shard_names
from jobs.grade.loading import LoadShard
from jobs.grade.planning import Plan
from jobs.grade.shards import GradeShard
from scalp_core import storage
from scalp_core.bundles.bundle import BundleSpec
from scalp_core.errors import UserError
from scalp_core.results.schema import Signature
from scalp_core.storage.lease import Guard

if TYPE_CHECKING:
    from jobs.common.prometheus import GradeMetrics  # imports Ray

# Images before --max-failed-share is checked.
_CHECK_FAILED_FROM = 200
_SESSION_INTERVAL_S = 5.0
_POINTS = 240
_DEATHS = "deaths"  # folder in the run's scratch folder

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """One session of a run: images, failures, speed and node time, written next to the shards.

    Args:
        uri: File to write.
        nodes: Counts the nodes that are alive.
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
        self._started = self._written = time.monotonic()
        self._point_interval = 0.0

    @property
    def seconds(self) -> float:
        """Seconds since the session started."""
        return time.monotonic() - self._started

    def add(self, rows: int, failed: int, errors: dict[str, int]) -> None:
        """Count a committed shard."""
        self.photographs += rows
        self.failed += failed
        self.errors.update(errors)
        if not self.points or self.seconds - self.points[-1][0] >= self._point_interval:
            self.points.append([round(self.seconds, 2), self.photographs, self.failed])
        if len(self.points) > _POINTS:  # halves the resolution
            self.points = self.points[1::2]
            self._point_interval = 2 * self.seconds / _POINTS
        if time.monotonic() - self._written > _SESSION_INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Write the session, which then survives a killed driver."""
        moment = time.monotonic()
        self.node_seconds += self.nodes() * (moment - self._written)
        self._written = moment
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


@dataclass(frozen=True)
class Work:
    """Inputs of `run_pending`: see `GradeOptions`, `LoadShard` and `GradeShard`.

    Args:
        folder: Folder of the shards, in the scratch folder.
        model: Makes the model in its actor.
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
        UserError: Too many images failed, or the output cannot be written.
    """
    session.write()
    done, shards = _count_committed(work)
    if done:
        console.print(f"resuming: {done:,} images are already graded")
    total = None if work.listing.tars else work.listing.photographs
    metrics = _metrics(work, total, done)
    with metrics or nullcontext(), progress_bar("grading", total, done) as (progress, bar):
        for row in _run_pipeline(work, shards):
            errors = json.loads(row["errors"])
            session.add(row["rows"], row["failed"], errors)
            if metrics:
                metrics.add(row["rows"], errors, json.loads(row["seconds"]))
            progress.update(bar, advance=row["rows"], note=_note(session))
            _check_failed_share(session, work.max_failed_share)


def _metrics(work: Work, total: int | None, done: int) -> GradeMetrics | None:
    """Metrics of the run, which Ray exports."""
    if not work.executor.uses_ray:
        return None
    from jobs.common.prometheus import GradeMetrics

    return GradeMetrics(work.out, total, done)


def _note(session: Session) -> str:
    rate = session.photographs / max(session.seconds, 0.1)
    return f"{rate:.0f}/s, {session.failed:,} failed, {session.node_seconds / 3600:.2f} machine-hours"


def _run_pipeline(work: Work, shards: int) -> Iterator[dict[str, Any]]:
    """Grade up to `shards` shards; yield one row per committed shard: `rows, failed, errors, seconds`."""
    if not shards:
        return
    plan, listing = work.plan, work.listing
    load = LoadShard(work.folder, work.spec.preprocess, listing.shard_size, plan.fetches, work.within)
    low, high = (min(number, shards) for number in plan.models)
    if listing.tars:
        high = plan.models[1]  # a tar is one shard, but many pieces
    size = replace(plan, loaders=min(plan.loaders, shards), models=(low, high))
    arguments = (work.folder, work.guard, work.spec, work.signature, work.model, plan.batch_size)
    deaths = storage.join(work.folder, _DEATHS)
    yield from work.executor.pipeline(_pending(work), load, GradeShard, arguments, size, deaths)


def _count_committed(work: Work) -> tuple[int, int]:
    """Number of committed images, approximate for a tar that was not read to its end, and of other shards."""
    size, images, shards = work.listing.shard_size, 0, 0
    for group in work.listing.groups:
        committed = find_committed(work.folder, group)
        shards += len(shard_names(group, size)) - (0 if group.tars else len(committed))
        for shard, tags in committed.items():
            pieces = max(map(len, tags.values()))
            images += size * pieces if group.tars else min(size, group.photographs - place_of(shard) * size)
    return images, shards


def _pending(work: Work) -> Iterator[dict[str, Any]]:
    """Items for `LoadShard` of uncommitted shards, group by group, with their listed images."""
    folder = storage.join(work.folder, work.listing.folder)
    for group in work.listing.groups:
        state = GroupState.read(work.folder, group, work.listing.shard_size)
        if not (pending := [shard for shard in state.shards if not state.is_whole(shard)]):
            continue
        listed = ListedGroup(folder, group)
        for shard in pending:
            done = {tag: sorted(numbers) for tag, numbers in state.pieces.get(shard, {}).items()}
            images = _to_bytes(listed.read(shard))
            yield {"shard": shard, "tar": bool(group.tars), "done": json.dumps(done), "listed": images}


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _check_failed_share(session: Session, limit: float) -> None:
    if session.photographs < _CHECK_FAILED_FROM or session.failed <= limit * session.photographs:
        return
    reasons = ", ".join(f"{code} {count:,}" for code, count in session.errors.most_common(3))
    raise UserError(
        f"{session.failed:,} of the first {session.photographs:,} images failed ({reasons}), more than "
        f"--max-failed-share {limit:g}; fix the cause and run the same command again with --retry-failed, "
        "or as it is with --max-failed-share 1"
    )
