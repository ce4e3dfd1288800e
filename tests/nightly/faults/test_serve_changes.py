"""Under steady load nothing fails: a grader is killed, another bundle comes in, graders come and go."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle

import httpx
import pytest
from ray import serve as ray_serve

from scalp_core.bundles.bundle import save_bundle
from scalp_core.bundles.loading import load_bundle
from serving import app
from serving.admission.limits import Limits
from serving.client import AsyncClient, GradeError
from serving.settings import ModelSettings, Scaling, Settings
from tests.benchmarks.serve.faults import GRADER, count_attempts
from tests.support import processes
from tests.support.images import jpeg
from tests.support.ports import free_port

CALLERS = 4
PHOTOGRAPHS = [jpeg(seed, (160, 120)) for seed in range(8)]


class Load:
    """Callers that ask on and on, from a thread of their own."""

    def __init__(self, url: str) -> None:
        self.attempts: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.errors: list[str] = []
        self._url = url
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        photographs = cycle(PHOTOGRAPHS)
        async with AsyncClient(self._url) as client:
            self.attempts = count_attempts(client)

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


def ingresses() -> dict[str, int]:
    states = ray_serve.status().applications["scalp"].deployments["Ingress"].replica_states
    return {state: count for state, count in states.items() if count}


def settings(replicas: int) -> Settings:
    grader = Scaling(
        min_replicas=replicas,
        max_replicas=replicas,
        target_ongoing_requests=8,
        max_ongoing_requests=32,
        max_queued_requests=32,
    )
    # Two ingresses at most: a single one would be combined with its grader, in one process.
    ingress = Settings().ingress.model_copy(update={"max_replicas": 2})
    return Settings(device="cpu", precision="fp32", ingress=ingress, grader=grader)


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
    assert len(load.attempts) == load.versions.total() > 100
    with capsys.disabled():
        retried = sum(count > 1 for count in load.attempts.values())
        print(f" {len(load.attempts)} calls, {retried} would have failed without retries ")


class SlowRequest:
    """A request whose body stops in the middle until `finish`."""

    def __init__(self, url: str, path: str, photographs: int) -> None:
        self.is_begun = threading.Event()
        self._may_end = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._answer = self._pool.submit(self._ask, url + path, photographs)

    def release(self) -> None:
        """Lets the body end; without it a failed test would keep pytest from exiting."""
        self._may_end.set()

    def finish(self) -> httpx.Response:
        self.release()
        with self._pool:
            return self._answer.result()

    def _ask(self, url: str, photographs: int) -> httpx.Response:
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        return httpx.post(url, content=self._body(photographs), headers=form, timeout=120)

    def _body(self, photographs: int) -> Iterator[bytes]:
        for number in range(photographs):
            yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            data = PHOTOGRAPHS[number % len(PHOTOGRAPHS)]
            yield data[:1000]
            if number == photographs // 2:
                self.is_begun.set()
                self._may_end.wait()
            yield data[1000:] + b"\r\n"
        yield b"--x--\r\n"


@pytest.mark.usefixtures("cluster")
def test_a_replica_that_is_replaced_finishes_what_it_took_in(bundle):
    """Requests and batches in the middle of their body, while others are sent."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    first = settings(1).model_copy(update={"limits": Limits(grace_seconds=100)})
    app.start(str(bundle), "127.0.0.1", port, first)
    slow: list[SlowRequest] = []
    try:
        load = Load(url)
        with load.running(), ThreadPoolExecutor(1) as pool:
            wait(lambda: load.versions.total() > 4)
            for path, count in (("/v1/grade", 1), ("/v1/grade", 1), ("/v1/grade/batch", 6)):
                slow.append(SlowRequest(url, path, count))
            for each in slow:
                assert each.is_begun.wait(30)
            time.sleep(0.5)  # until HAProxy has sent on what it has
            second = first.model_copy(update={"answer_seconds": first.answer_seconds + 1})
            application = app._application(second, ModelSettings(bundle=str(bundle)))
            deployed = pool.submit(ray_serve.run, application, name="scalp")
            wait(lambda: ingresses() == {"RUNNING": 1, "STOPPING": 1})
            before = load.versions.total()
            wait(lambda: load.versions.total() > before + 4)  # the new one answers
            *grades, batch = [each.finish() for each in slow]
            deployed.result(60)
            wait(lambda: ingresses() == {"RUNNING": 1})
    finally:
        for each in slow:
            each.release()
        app.stop()
    assert load.errors == []
    assert [answer.status_code for answer in grades] == [200, 200]
    lines = [json.loads(line) for line in batch.text.splitlines()]
    assert [line["status"] for line in lines] == ["graded"] * 6 + ["done"]
