"""`scalp grade` run, interrupted, repaired and retried in any order: one row per image after each run."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from scalp_core import storage
from scalp_core.storage import lease, outputs
from tests.support.small_grade import IMAGES, picture, rows, run, sources, write_bundle

# More than the steps of a run: some interruptions come too late.
_MOST_STEPS = 90


class Interrupted(BaseException):
    """Ends a run in the middle, as Ctrl-C does."""


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Interrupt before the storage change number `step`, from 0."""
    remaining = step
    original = storage.mutation

    @contextmanager
    def counted(kind: str, uri: str) -> Iterator[None]:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            raise Interrupted
        with original(kind, uri):
            yield

    with patch.object(storage, "mutation", counted), suppress(Interrupted):
        yield


def run_machine(examples: int) -> None:
    # The process of an interrupted run is dead; here it is this one.
    with patch.object(lease, "_is_running", lambda *_: False):
        run_state_machine_as_test(GradeInAnyOrder, settings=settings(_SETTINGS, max_examples=examples))


class GradeInAnyOrder(RuleBasedStateMachine):
    """One output directory; `repaired` images were damaged when the run began."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")  # noqa: S108
        self.root = tempfile.mkdtemp(dir=memory if memory.is_dir() else None)
        self.job = write_bundle(f"{self.root}/bundle"), sources(f"{self.root}/data")
        self.out = f"{self.root}/out"
        self.is_finished = False
        self.is_repaired = False

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def _run(self, retry: bool) -> None:
        summary = run(*self.job, self.out, retry, report=False)
        found = rows(self.out)
        places = [(row["uri"], row["member"]) for row in found]
        assert len(places) == len(set(places)) == IMAGES
        failed = [row["uri"] for row in found if row["status"] == "failed"]
        assert [uri.endswith("bad.jpg") for uri in failed] in ([], [True])
        assert summary["failed"] == len(failed)
        assert failed or self.is_repaired
        self.is_finished = True

    @rule()
    def grade(self) -> None:
        self._run(retry=False)

    @rule(step=st.integers(0, _MOST_STEPS))
    def interrupt(self, step: int) -> None:
        with interrupted_at(step):
            run(*self.job, self.out, False, report=False)
            self.is_finished = True

    @precondition(lambda self: not self.is_repaired)
    @rule()
    def repair(self) -> None:
        storage.write(f"{self.root}/data/source/bad.jpg", picture(10))
        self.is_repaired = True

    @precondition(lambda self: self.is_finished)
    @rule()
    def retry(self) -> None:
        self._run(retry=True)
        if self.is_repaired:
            assert not [row for row in rows(self.out) if row["status"] == "failed"]

    @precondition(lambda self: self.is_finished)
    @rule(step=st.integers(0, _MOST_STEPS))
    def interrupt_retry(self, step: int) -> None:
        with interrupted_at(step):
            run(*self.job, self.out, True, report=False)

    @invariant()
    def sources_are_untouched(self) -> None:
        files = storage.list_files(f"{self.root}/data/source")
        assert len(files) == 6 and not [file for file in files if outputs.SCRATCH_FOLDER in file]


_SETTINGS = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    stateful_step_count=8,
    print_blob=True,
)


@pytest.mark.medium
def test_any_order_gives_one_row_per_image():
    run_machine(examples=15)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_orders_give_one_row_per_image():
    run_machine(examples=2000)
