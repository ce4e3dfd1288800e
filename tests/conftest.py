"""Shared fixtures and options of the tests. Slow imports are inside the fixtures that need them."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from cluster.resources import Cluster
    from jobs.demo_s3 import S3Server
    from tests.support.pipeline import PipelineRun, SingleWorkerRun
    from tests.support.served import Served

_NIGHTLY = Path(__file__).parent / "nightly"
# Files that use the fixture `endpoint`, and those that use the fixture `cluster` or what was trained with it;
# the others of tests/with_ray start their own. One process runs all that share, so that each is started once.
_SHARE_ENDPOINT = re.compile(r"tests/(browser/|with_ray/test_serve(_intake|_inference)?\.py)")
_OWN_RAY = r"serve_hostile|supervised|grade_(odd|planning)"
_SHARE_RAY = re.compile(rf"tests/with_ray/test_(?!{_OWN_RAY})")
# Threads of PyTorch, scikit-learn and NumPy: the processes of xdist fill the cores, and more would only wait.
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_HAS_ONE_THREAD = "PYTEST_XDIST_WORKER" in os.environ and not _THREADS.keys() & os.environ.keys()
# Variables of session fixtures, whose servers live as long as this process.
_session_environment: dict[str, str] = {}

# Begun first, so that two processes end together: the first starts a Ray, the second the endpoint.
_LONGEST = (
    "tests/with_ray/test_whole_way.py",
    "tests/with_ray/test_serve.py",
    "tests/with_ray/test_serve_hostile.py",
    "tests/serving/api/test_schema.py",
    "tests/with_ray/test_supervised.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--order", type=int, metavar="SEED", help="run files, and the tests of each, in random order"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the profile with many examples; Hypothesis is slow to import.

    Ray reads its variables when it is imported. Tests wait for its metrics, which it exports every 10 s. Its
    processes wait for the next test: a start takes one to three seconds of a core.
    """
    gc.disable()  # until all modules are imported
    os.environ["RAY_metrics_report_interval_ms"] = "5000"  # noqa: SIM112
    os.environ["RAY_idle_worker_killing_time_threshold_ms"] = "20000"  # noqa: SIM112
    os.environ["RAY_num_workers_soft_limit"] = "4"  # noqa: SIM112
    if _HAS_ONE_THREAD:
        os.environ.update(_THREADS)
    if config.getoption("--hypothesis-profile", default=None) == "nightly":
        from hypothesis import settings

        settings.register_profile("nightly")


def pytest_collection_finish() -> None:
    """Keep the number of threads from the processes that tests start; the libraries have read it here.

    Also keep the garbage collector from the modules, which it would look at 0.2 s each time.
    """
    gc.freeze()
    gc.enable()
    if _HAS_ONE_THREAD:
        for name in _THREADS:
            del os.environ[name]


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind reports leaks at the end


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of tests/nightly, order files, skip tests marked `gpu` on a machine without one."""
    for item in items:
        if _NIGHTLY in item.path.parents:
            item.add_marker(pytest.mark.nightly)
    if (seed := config.getoption("--order")) is not None:
        _shuffle(items, random.Random(seed))
    else:
        ranks = {file: rank for rank, file in enumerate(_LONGEST)}
        items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, give all files that share the endpoint, or a Ray, to the same process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if _SHARE_ENDPOINT.match(nodeid):
                return "endpoint"
            return "Ray" if _SHARE_RAY.match(nodeid) else super()._split_scope(nodeid)

    return Scheduling(config, log)


def _shuffle(items: list[pytest.Item], rng: random.Random) -> None:
    """Shuffle the files, and the tests of each file."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shuffled = rng.sample(list(files.values()), len(files))
    items[:] = [item for tests in shuffled for item in rng.sample(tests, len(tests))]


@contextmanager
def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    expected = before | _session_environment
    # Only what differs: threads of Ray read the environment at any time.
    for name in os.environ.keys() - expected.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in expected.items() if os.environ.get(name) != value})


@contextmanager
def _environment_of_session() -> Iterator[None]:
    before = dict(os.environ)
    yield
    _session_environment.update(
        {name: value for name, value in os.environ.items() if before.get(name) != value}
    )


@pytest.fixture(autouse=True, scope="module")
def _module_environment() -> Iterator[None]:
    """Restore the environment after the fixtures of a module."""
    with _restored_environment():
        yield


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment after a test."""
    with _restored_environment():
        yield


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    """`make_bundle(folder, seed)` writes an untrained bundle whose answers differ from image to image."""
    from tests.support.bundles import make_bundle

    return make_bundle


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A local S3 server, set in the environment as a user sets it."""
    from jobs.demo_s3 import s3_server

    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        with _environment_of_session():
            os.environ.update(server.environment)
        yield server


@pytest.fixture(scope="session")
def cluster(s3: S3Server) -> Cluster:
    """A local Ray, started after the S3 credentials are set, which its workers inherit."""
    from cluster.local import connect

    with _environment_of_session():
        return connect()


@pytest.fixture(scope="session")
def endpoint(bundle: Path, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The endpoint as users start it; its tests are those of `_SHARE_ENDPOINT`."""
    from tests.support.served import SHARED, scalp_serve

    folder = tmp_path_factory.mktemp("endpoint")
    with scalp_serve(bundle, SHARED, folder, grpc=True, killed=True) as served:
        yield served


@pytest.fixture(scope="session")
def pipeline(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> PipelineRun:
    """Folders and summaries of a pipeline with a small model; tests must not write to it.

    Two elastic workers train on batches in pieces.
    """
    from tests.support.pipeline import ANY_WORKERS, shared_run

    return shared_run(tmp_path_factory, [*ANY_WORKERS, "accumulate=2"], (1, 2))


@pytest.fixture(scope="session")
def train_single_worker(
    pipeline: PipelineRun, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], SingleWorkerRun]:
    """`train_single_worker(epochs, architecture)` trains with one undisturbed worker."""
    from tests.support.pipeline import train_single_worker

    def train(epochs: int, architecture: str) -> SingleWorkerRun:
        run = str(tmp_path_factory.mktemp("alone"))
        return train_single_worker(pipeline.data, run, epochs, architecture)

    return train
