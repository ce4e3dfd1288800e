"""Under steady load nothing fails: a grader is killed, another bundle comes in, graders come and go."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

import pytest
from ray import serve as ray_serve

from jobs.bench import processes
from jobs.bench.serve_faults import GRADER
from scalp_core.bundle import load_bundle, save_bundle
from serving import app
from serving.client import AsyncClient, GradeError
from serving.client_tries import Counts
from serving.settings import ModelSettings, Scaling, Settings
from tests.conftest import free_port, jpeg

CALLERS = 4
PHOTOGRAPHS = [jpeg(seed, (160, 120)) for seed in range(8)]


class Load:
    """Callers that ask on and on, from a thread of their own."""

    def __init__(self, url: str) -> None:
        self.counts = Counts()
        self.versions: Counter[str] = Counter()
        self.errors: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        photographs = cycle(PHOTOGRAPHS)
        async with AsyncClient(self._url) as client:
            self.counts = client.counts

            async def call() -> None:
                while not self._over.is_set():
                    try:
                        answer = await client.grade(next(photographs))
                    except GradeError as error:
                        self.errors.append(str(error))
                    else:
                        self.versions[answer.model_version] += 1

            await asyncio.gather(*(call() for _ in range(CALLERS)))

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(60)


def wait(until: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def graders() -> list[int]:
    return [pid for pid in processes.tree(os.getpid()) if processes.name(pid) == GRADER]


def running() -> int:
    states = ray_serve.status().applications["scalp"].deployments["Grader"].replica_states
    return states.get("RUNNING", 0)


def settings(replicas: int) -> Settings:
    grader = Scaling(
        min_replicas=replicas,
        max_replicas=replicas,
        target_ongoing_requests=8,
        max_ongoing_requests=32,
        max_queued_requests=32,
    )
    return Settings(device="cpu", precision="fp32", grader=grader)


@pytest.mark.usefixtures("cluster")
def test_no_call_fails_while_graders_die_change_and_come_and_go(bundle, tmp_path, capsys):
    other = shutil.copytree(bundle, tmp_path / "other")
    save_bundle(str(other), load_bundle(str(other)).spec.model_copy(update={"name": "other"}), {})

    def deploy(name: str, replicas: int) -> None:
        ray_serve.run(app._application(settings(replicas), ModelSettings(bundle=name)), name="scalp")

    port = free_port()
    app.start(str(bundle), "127.0.0.1", port, settings(1))
    try:
        load = Load(f"http://127.0.0.1:{port}")
        with load.running():
            wait(lambda: load.versions.total() > 20)
            (first,) = load.versions

            os.kill(graders()[0], signal.SIGKILL)
            before = load.versions.total()
            wait(lambda: load.versions.total() > before + 20)

            deploy(str(other), 1)
            wait(lambda: len(load.versions) == 2)

            deploy(str(other), 2)
            wait(lambda: running() == 2)
            before = load.versions.total()
            wait(lambda: load.versions.total() > before + 20)
            deploy(str(other), 1)
            wait(lambda: running() == 1 and len(graders()) == 1)
            seen = load.versions[first]
            before = load.versions.total()
            wait(lambda: load.versions.total() > before + 20)
            assert load.versions[first] == seen  # the first bundle answers no more
    finally:
        app.stop()
    assert load.errors == []
    assert load.counts.calls == load.versions.total() > 100
    with capsys.disabled():
        print(f" {load.counts.calls} calls, {load.counts.failed_at_first} would have failed without retries ")
