"""Private parts of Ray that scalp depends on: imports, patched constants, undocumented variables.

Checked with Ray 2.60. tests/contracts/test_ray_internals.py fails with the name of a part that another
release of Ray changes, and keeps other modules from importing private parts. HAProxy's configuration and
variables are in `cluster/haproxy.py`.

Parts that `import ray` does not load are imported by the function that returns them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import ray._private.worker
from ray._common.utils import get_system_memory
from ray._private import parameter, ray_constants, services
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    GcsClient,
    get_authentication_mode,
)
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply

# For Ray Serve, also on a cluster, where cluster/Containerfile sets them.
SERVE_ENVIRONMENT = {
    # Serve calls replicas by value over gRPC, in their own event loop: 1.2 times the images per second.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # That mode buffers 1,000 log lines, which are lost when the replica dies.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # A proxy may import Serve for longer than 5 seconds. After three such checks the start fails.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
DATA_LOG_LEVELS = {
    "ray.data": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
    "ray.data.dataset": logging.ERROR,  # warns while an earlier pipeline still holds its CPUs
}
_IDLE_WORKER_MS = 5000
# JobHead asks NodeHead where jobs run.
_DASHBOARD_MODULES = "--modules-to-load=JobHead,NodeHead,ReportHead"
_NO_DASHBOARD = b"127.0.0.1:9"  # the port of a service that no machine has any more, for root alone
_STATUS_TIMEOUT_S = 10
_BODY_MESSAGES = 16  # in the queue of one request; up to 256 KiB each


def set_local_defaults(cores: int, logical_cpus: int, verbose: bool, joins: bool) -> None:
    """Set the environment variables of a Ray that starts, where the user has not set them.

    Args:
        cores: Cores of this machine.
        logical_cpus: CPUs that Ray is started with.
        verbose: Keep the log of Ray's C++ core.
        joins: The process joins a cluster instead of starting a Ray.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",  # no reports leave the machine
        # A pipeline starts one process per logical CPU, above the limit at which Ray warns.
        "RAY_worker_maximum_startup_concurrency": str(logical_cpus),
        # One process per CPU at the start costs two seconds of all cores.
        "RAY_prestart_worker_first_driver": "0",
        # Every idle process wakes a hundred times per second. One per core is kept for the next task.
        "RAY_num_workers_soft_limit": str(cores),
        "RAY_idle_worker_killing_time_threshold_ms": str(_IDLE_WORKER_MS),
        # With Ray's default of 15 a model loses its core to any other process.
        "RAY_worker_niceness": "0",
        **SERVE_ENVIRONMENT,
        # RAY_SERVE_THROUGHPUT_OPTIMIZED turns this on too; it is useful behind HAProxy alone.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0"),
        # Serve's controller wakes ten times per second, on one of a laptop's two cores.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    }
    if not verbose:
        defaults["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    if not joins:
        # A process that polls every few seconds for the preemption of this machine.
        defaults["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def has_token() -> bool:
    """Reread the authentication mode and return whether Ray finds a token."""
    Config.initialize("")
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    return bool(loader.has_token(ignore_auth_mode=True))


def is_token_required() -> bool:
    """Whether token authentication is on and Ray has a token."""
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    return get_authentication_mode() == AuthenticationMode.TOKEN and bool(loader.has_token())


@contextmanager
def listening_on_loopback() -> Iterator[None]:
    """Make a Ray that starts listen on loopback alone, as on macOS; its workers and jobs inherit that.

    On Linux it would listen on every interface. Ray Serve's gRPC and PyTorch's store still do
    (docs/protection.md). Ray's agent takes a free port instead of a fixed one: with the fixed port, a second
    Ray on this machine takes no jobs.
    """
    original = ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams
    ray_constants.ENABLE_RAY_CLUSTER = False
    parameter.RayParams = partial(parameter.RayParams, dashboard_agent_listen_port=0)
    try:
        with environment_variable(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "0"):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER, parameter.RayParams = original


@contextmanager
def few_processes(jobs: bool, log_monitor: bool) -> Iterator[None]:
    """Start Ray without processes that one machine does not need: of the autoscaler, and of the dashboard.

    Args:
        jobs: Start the processes of the Job API, of its list of nodes, and of that for Prometheus.
            Otherwise start no process: Ray would start one without a use, and wait for it.
        log_monitor: Start the process that forwards what workers print.
    """
    original = parameter.RayParams, services.start_api_server, services.start_ray_process
    parameter.RayParams = partial(parameter.RayParams, no_monitor=True, include_log_monitor=log_monitor)
    if jobs:
        services.start_ray_process = partial(_start_with_few_modules, services.start_ray_process)
    else:
        services.start_api_server = _omit_dashboard
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server, services.start_ray_process = original


def _start_with_few_modules(start: Callable[..., Any], command: list[str], kind: str, **options: Any) -> Any:
    is_dashboard = kind == ray_constants.PROCESS_TYPE_DASHBOARD
    return start([*command, _DASHBOARD_MODULES] if is_dashboard else command, kind, **options)


def _omit_dashboard(
    _include: bool, _raises: bool, _host: str, gcs_address: str, cluster_id: str, *_: Any, **__: Any
) -> tuple[str, None]:
    """Set the address of the dashboard, which Ray's agent would query each second, to one without a server.

    Ray does so too, at port 8265: another program may listen there, and would receive events and the token.
    """
    client = GcsClient(address=gcs_address, cluster_id=cluster_id)
    key, namespace = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
    client.internal_kv_put(key, _NO_DASHBOARD, True, namespace)
    return "", None


@contextmanager
def own_address_in_environment() -> Iterator[None]:
    """Put the address of a Ray that starts into the environment of its processes.

    Without it they join any Ray of the machine. Ray Train's helper takes a run that another Ray does not
    list for dead, and ends it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with (
        environment_variable(ray_constants.GCS_PORT_ENVIRONMENT_VARIABLE, port),
        environment_variable("RAY_ADDRESS", f"127.0.0.1:{port}"),
    ):
        yield


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable while the block runs."""
    original = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if original is None:
            del os.environ[name]
        else:
            os.environ[name] = original


def system_memory() -> int:
    """Memory of this machine in bytes, or the limit of the container."""
    return int(get_system_memory())


def node_address() -> str:
    """Address of this machine that Ray uses in place of 127.0.0.1."""
    return str(services.node_ip_address_from_perspective())


def autoscaling_state(address: str) -> AutoscalingState:
    """Last report of the autoscaler of the Ray at `address`, without joining it."""
    return cluster_status(address).autoscaling_state


def cluster_status(address: str) -> GetClusterStatusReply:
    """State of the Ray at `address`, without joining it."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=_STATUS_TIMEOUT_S))
    return reply


def task_attempt() -> int:
    """Number of earlier attempts of the current task whose process died; 0 outside Ray's workers."""
    worker = ray._private.worker.global_worker
    if not (worker.connected and worker.mode == ray._private.worker.WORKER_MODE):
        return 0
    return int(worker.core_worker.get_current_task_attempt_number())


def dashboard_address(gcs_address: str) -> str:
    """URL of the dashboard of the Ray at `gcs_address`."""
    from ray.dashboard.utils import get_address_for_submission_client

    return str(get_address_for_submission_client(gcs_address))


def train_helpers() -> tuple[type, type]:
    """Callbacks of Ray Train that start a process each: for datasets, and for a dead controller."""
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return DatasetsCallback, PlacementGroupCleanerCallback


@contextmanager
def train_context(
    path: str,
    filesystem: Any,
    name: str,
    checkpoints: Any,
    after_checkpoint: Callable[[dict[str, Any]], None],
) -> Iterator[None]:
    """Let a training function call `ray.train` in this process, without a Ray that runs.

    Ray Train's local mode (`ScalingConfig(num_workers=0)`) does so, but stores no checkpoints. Here they are
    stored as by Ray Train's controller, during the next epoch, so either can resume the run of the other.

    Args:
        path: Parent of the folder of checkpoints, a path of `filesystem`.
        filesystem: Filesystem of pyarrow.
        name: Name of the folder of checkpoints.
        checkpoints: Ray's CheckpointConfig.
        after_checkpoint: Called with the metrics of each checkpoint after it is stored, in another thread.
    """
    from ray.train.v2._internal.execution import train_fn_utils
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.context import StorageContext
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    storage = StorageContext(path, name, filesystem)
    manager = CheckpointManager(checkpoints, storage)

    async def register(report: _TrainingReport) -> None:
        manager.register_checkpoint(report)  # needs an event loop

    def store(metrics: dict[str, Any], local: Any) -> None:
        stored = storage.persist_current_checkpoint(
            local, f"checkpoint_{datetime.now():%Y-%m-%d_%H-%M-%S.%f}"
        )
        asyncio.run(register(_TrainingReport(stored, metrics, False)))
        shutil.rmtree(local.path)
        after_checkpoint(metrics)

    class Utils(train_fn_utils.LocalTrainFnUtils):
        storing: Future[None] | None = None

        def report(self, metrics: dict[str, Any], checkpoint: Any = None, **_: Any) -> None:
            self.wait()
            if checkpoint:
                self.storing = uploads.submit(store, metrics, checkpoint)

        def get_checkpoint(self) -> Any:
            latest = manager.latest_checkpoint_result
            return latest and latest.checkpoint

        def wait(self) -> None:
            if self.storing:
                self.storing.result()

    utils = Utils(name)
    train_fn_utils.set_train_fn_utils(utils)
    try:
        with ThreadPoolExecutor(1, "checkpoints") as uploads:
            yield
            utils.wait()
    finally:
        train_fn_utils.set_train_fn_utils(None)


def bound_request_queue() -> None:
    """Bound the queue of a request's body in the replicas of this process, so that fast clients wait.

    Ray Serve queues a body as fast as it arrives, without a limit or a setting: 400 MB sent to a slow
    application took 390 MB more memory (Ray 2.60, 2026-11-26). Ray waits for space only if replicas receive
    bodies in their own event loop, the mode of RAY_SERVE_THROUGHPUT_OPTIMIZED; otherwise nothing is bounded.
    """
    from ray.serve._private import constants
    from ray.serve._private.direct_ingress_http_util import ASGIDIReceiveProxy

    if constants.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:
        return

    def queue(receiver: Any) -> asyncio.Queue[Any]:
        if receiver._queue is None:
            receiver._queue = asyncio.Queue(_BODY_MESSAGES)
        return receiver._queue

    ASGIDIReceiveProxy.queue = property(queue)


def aws_node_provider() -> Any:
    """Ray's node provider for AWS."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    return AWSNodeProvider
