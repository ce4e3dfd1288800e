"""Second step of `scalp grade`: pass uncommitted shards through loading tasks and models."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from jobs.common.console import Clock, console, now, progress_bar, write_json
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions
from jobs.grade.files import GroupState, Listing, find_committed, place_of, shard_names
from jobs.grade.identity import Identity, make_checked
from jobs.grade.loading import LoadShard
from jobs.grade.planning import Plan
from jobs.grade.shards import GradeShard
from scalp_core import storage
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.results.progress import SESSIONS
from scalp_core.results.schema import Signature
from scalp_core.storage.outputs import Output

if TYPE_CHECKING:
    from jobs.common.prometheus import GradeMetrics  # imports Ray

# Images before --max-failed-share is checked.
_CHECK_FAILED_FROM = 200
_SESSION_INTERVAL_S = 5.0
_POINT_SHARE = 0.01  # of the time so far, between two points of the rate: some hundreds in hours

logger = logging.getLogger(__name__)

Shared = Callable[[], Bundle]
MakeModel = Callable[[Shared, ModelOptions, int], Any]


@dataclass(frozen=True)
class Run:
    """One session of a run: what its steps share.

    Args:
        output: Output directory, and the lease on it.
        identity: What all rows of the output share.
        named: Sources.
        bundle: Bundle that grades.
        model: Resolved options of inference.
        plan: Sizes of the run.
        make_model: Makes the model in its actor.
        executor: Runs the steps.
        clock: Seconds per step.
        within: Local sources out of which no link may lead; empty if links may.
    """

    output: Output
    identity: Identity
    named: list[str]
    bundle: Bundle
    model: ModelOptions
    plan: Plan
    make_model: MakeModel
    executor: Executor
    clock: Clock
    within: tuple[str, ...] = ()


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
    errors: Counter[str] = field(default_factory=Counter)
    node_seconds: float = 0.0
    points: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._started = self._written = time.monotonic()

    @property
    def failed(self) -> int:
        """Images that failed."""
        return self.errors.total()

    @property
    def seconds(self) -> float:
        """Seconds since the session started."""
        return time.monotonic() - self._started

    def add(self, rows: int, errors: dict[str, int]) -> None:
        """Count a committed shard, and its errors by code."""
        self.photographs += rows
        self.errors.update(errors)
        if not self.points or self.seconds * (1 - _POINT_SHARE) >= self.points[-1][0]:
            self.points.append(self._point())
        if time.monotonic() - self._written > _SESSION_INTERVAL_S:
            self.write()

    def _point(self) -> list[float]:
        return [round(self.seconds, 2), self.photographs, self.failed]

    def write(self) -> None:
        """Write the session, which then survives a killed driver."""
        moment = time.monotonic()
        self.node_seconds += self.nodes() * (moment - self._written)
        self._written = moment
        content = {
            "started_at": self.started_at,
            "seconds": round(self.seconds, 1),
            "photographs": self.photographs,
            "failed": self.failed,
            "node_seconds": round(self.node_seconds, 1),
            "points": [*self.points, self._point()],
        }
        write_json(self.uri, content)


def grade_shards(
    run: Run,
    folder: str,
    listing: Listing,
    max_failed_share: float,
    committed: Callable[[str], None] = lambda _: None,
) -> None:
    """Grade and commit every shard that is not committed yet.

    Args:
        run: Session of a run.
        folder: Folder of the shards: the scratch folder, or that of a retry.
        listing: Listing of the run or the retry.
        max_failed_share: Largest fraction of failed images.
        committed: Called with the name of each committed shard, or piece of a tar.

    Raises:
        UserError: Too many images failed, or the output cannot be written.
    """
    # Microseconds: short sessions of one second stay in their order.
    name = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}-{uuid.uuid4().hex[:8]}.json"
    session = Session(storage.join(folder, SESSIONS, name), run.executor.nodes)
    session.write()
    done, shards = _count_committed(folder, listing)
    if done:
        console.print(f"resuming: {done:,} images are already graded")
    total = None if listing.tars else listing.photographs
    metrics = _make_metrics(run, total, done)
    try:
        with metrics or nullcontext(), progress_bar("grading", total, done) as (progress, bar):
            for row in _run_pipeline(run, folder, listing, shards) if shards else ():
                committed(row.pop("shard"))
                session.add(row["rows"], row["errors"])
                if metrics:
                    metrics.add(**row)
                progress.update(bar, advance=row["rows"], note=_note(session))
                _check_failed_share(session, max_failed_share)
    finally:
        with suppress(UserError):  # the error that stopped the run is reported instead
            session.write()
        run.clock.lap("grade")


def _make_metrics(run: Run, total: int | None, done: int) -> GradeMetrics | None:
    """Metrics of the run, which Ray exports."""
    if not run.executor.uses_ray:
        return None
    from jobs.common.prometheus import GradeMetrics

    return GradeMetrics(run.output.uri, total, done)


def _note(session: Session) -> str:
    rate = session.photographs / max(session.seconds, 0.1)
    return f"{rate:.0f}/s, {session.failed:,} failed, {session.node_seconds / 3600:.2f} machine-hours"


def _run_pipeline(run: Run, folder: str, listing: Listing, shards: int) -> Iterator[dict[str, Any]]:
    """Grade up to `shards` shards; yield the result of `GradeShard` per committed one."""
    plan, spec, identity = run.plan, run.bundle.spec, run.identity
    load = LoadShard(folder, run.output.guard, spec.preprocess, listing.shard_size, plan.fetches, run.within)
    low, high = (min(number, shards) for number in plan.models)
    if listing.tars:
        high = plan.models[1]  # a tar is one shard, but many pieces
    size = replace(plan, loaders=min(plan.loaders, shards), models=(low, high))
    shared = run.executor.share(run.bundle)
    make_model = partial(make_checked, run.make_model, identity, shared, run.model, plan.cpus_per_model)
    signature = Signature(identity.model_version, identity.computed_by)
    arguments = (folder, spec, signature, make_model, plan.batch_size)
    return run.executor.pipeline(_pending(folder, listing), load, GradeShard, arguments, size)


def _count_committed(folder: str, listing: Listing) -> tuple[int, int]:
    """Number of committed images, approximate for a tar that was not read to its end, and of other shards."""
    size, images, shards = listing.shard_size, 0, 0
    for group in listing.groups:
        committed = find_committed(folder, group)
        shards += len(shard_names(group, size)) - (0 if group.tars else len(committed))
        for shard, tags in committed.items():
            pieces = max(map(len, tags.values()))
            images += size * pieces if group.tars else min(size, group.photographs - place_of(shard) * size)
    return images, shards


def _pending(folder: str, listing: Listing) -> Iterator[dict[str, Any]]:
    """Items for `LoadShard` of uncommitted shards, group by group, with their listed images."""
    for group in listing.groups:
        state = GroupState(folder, listing, group)
        for shard in state.pending:
            done, listed = state.pieces.get(shard, {}), state.read_listed(shard)
            yield {"shard": shard, "tar": bool(group.tars), "done": done, "listed": listed}


def _check_failed_share(session: Session, limit: float) -> None:
    if session.photographs < _CHECK_FAILED_FROM or session.failed <= limit * session.photographs:
        return
    reasons = ", ".join(f"{code} {count:,}" for code, count in session.errors.most_common(3))
    raise UserError(
        f"{session.failed:,} of the first {session.photographs:,} images failed ({reasons}), more than "
        f"--max-failed-share {limit:g}; fix the cause and run the same command again with --retry-failed, "
        "or as it is with --max-failed-share 1"
    )
