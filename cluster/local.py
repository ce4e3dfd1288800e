"""Start Ray on this machine, sized to it, or join the cluster of `RAY_ADDRESS`."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import ray
from joblib import cpu_count
from ray.exceptions import AuthenticationError

from cluster import ray_internals
from cluster.resources import Cluster, ClusterError, is_joined

# Pipelines hold several actors. Without enough logical CPUs for all, they deadlock without an error.
_SPARE_LOGICAL_CPUS = 4
# Reserved for a submitted job: one model and the task that loads its images.
_FOR_JOBS = 2
CREDENTIALS_HINT = (
    "set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH"
)
_AUTH_MODE, _AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
_QUIET_LOGGERS = ("ray.serve", "ray.train")
# PyTorch's waiting threads sleep instead of spinning on cores that others need: of two models on two cores,
# each took 13 times as long. GNU's OpenMP spins for some 10 us before it sleeps: training steps were 1.19
# times as fast as without (EfficientNet-lite0, 160 px; Xception 1.05), two models on two cores no slower.
SLEEPING_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"}
# Gloo (PyTorch's communication between CPU workers) listens on the address of the host name by default.
_GLOO_ON_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
_OBJECT_STORE_SHARE = 0.25
_CONNECT_TIMEOUT_S = 5
_ANSWER_TIMEOUT_S = 8
# A process that dies while it loads a model is restarted; Ray's default fails the whole run.
_MOST_DEATHS_WHILE_LOADING = 3


def _logical_cpus(jobs: bool) -> int:
    return cpu_count() + _SPARE_LOGICAL_CPUS + (_FOR_JOBS if jobs else 0)


def connect(jobs: bool = False) -> Cluster:
    """Connect this process to Ray. A repeated call keeps the connection.

    The environment variable `SCALP_RAY_LOGS=1` shows the output of Ray and the workers.

    Args:
        jobs: Start a local Ray with a dashboard on loopback, so that jobs can be submitted.

    Raises:
        ClusterError: The cluster of `RAY_ADDRESS` does not answer, or the environment turns off the token of
            a local Ray.
    """
    if not ray.is_initialized():
        _start(jobs)
    quiet_loggers()
    resources = ray.cluster_resources()
    # A head node without CPUs runs no work.
    nodes = max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()))
    cpus = int(resources.get("CPU", 0))
    return Cluster(
        cpus=cpus,
        gpus=int(resources.get("GPU", 0)),
        nodes=nodes,
        grows=is_joined() and has_autoscaler(),
        cores_per_node=max(1, cpus // nodes) if is_joined() else cpu_count(),
    )


def quiet_loggers() -> None:
    """Silence what Ray Serve and Ray Train log about each step."""
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def object_store_size() -> int:
    """Bytes of memory of this machine for shared objects, such as decoded images."""
    return int(ray_internals.system_memory() * _OBJECT_STORE_SHARE)


def require_token() -> None:
    """Turn on token authentication for a Ray that this process starts, and for its child processes.

    Some ports of Ray execute the data that they receive, and Ray Serve's gRPC listens on all interfaces. The
    token is the one that Ray finds (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token). Otherwise a
    random one is set in the environment of these processes; nothing is written to disk.

    Raises:
        ClusterError: RAY_AUTH_MODE sets another mode.
    """
    mode = os.environ.get(_AUTH_MODE)
    if mode is not None and mode.lower() != "token":
        raise ClusterError(
            f"{_AUTH_MODE}={mode} turns off the token that protects the ports of a local Ray; "
            f"unset {_AUTH_MODE}, or set {_AUTH_MODE}=token"
        )
    os.environ[_AUTH_MODE] = "token"
    if not ray_internals.has_token():
        os.environ[_AUTH_TOKEN] = _random_token()
    if not ray_internals.is_token_required():
        raise ClusterError(
            f"this Ray {ray.__version__} does not turn token authentication on; install the version that "
            "scalp's requirements name"
        )


@cache
def _random_token() -> str:
    """Random token, constant for the life of this process, whose connection to Ray may be open."""
    return secrets.token_hex(32)


def has_autoscaler() -> bool:
    """Whether the connected Ray has an autoscaler (version 2; version 1 is not detected)."""
    address = ray.get_runtime_context().gcs_address
    return bool(ray_internals.autoscaling_state(address).autoscaler_state_version > 0)


def _start(jobs: bool) -> None:
    verbose = bool(os.environ.get("SCALP_RAY_LOGS"))
    address = os.environ.get("RAY_ADDRESS")
    ray_internals.set_local_defaults(cpu_count(), _logical_cpus(jobs), verbose, joins=bool(address))
    # Output of the workers stays in Ray's logs: the commands print what matters through the driver.
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": verbose}
    if not address:
        require_token()
        settings |= {
            "num_cpus": _logical_cpus(jobs),
            "object_store_memory": object_store_size(),
            "include_dashboard": jobs,
            "dashboard_host": "127.0.0.1",
        }
    try:
        with ExitStack() as stack:
            if not verbose:
                stack.enter_context(_silent_stderr())
            if address:
                _check_reachable(address)
            if not address or _is_on_loopback(address):
                stack.enter_context(ray_internals.listening_on_loopback())
            if not address:
                stack.enter_context(ray_internals.few_processes(jobs, log_monitor=verbose))
                stack.enter_context(ray_internals.own_address_in_environment())
                for variable, default in (SLEEPING_THREADS | _GLOO_ON_LOOPBACK).items():
                    value = os.environ.get(variable, default)
                    stack.enter_context(ray_internals.environment_variable(variable, value))
            # Without `local`, Ray joins a cluster that runs on this machine.
            ray.init(address=address or "local", **settings)
    except (ConnectionError, ValueError, TimeoutError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise _unreachable(where, str(error).strip().splitlines()[0]) from error


def _check_reachable(address: str) -> None:
    """Raise if no Ray answers at `address`, within seconds; Ray itself retries for minutes."""
    host, _, port = address.rsplit("/", 1)[-1].rpartition(":")
    if not port.isdigit():  # a word such as auto
        return
    named = f"the cluster at RAY_ADDRESS={address}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _unreachable(named, error.strerror or str(error)) from error
    outcome: list[Exception | None] = []

    def query() -> None:
        try:
            ray_internals.autoscaling_state(f"{host}:{port}")
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a daemon thread: a client without TLS blocks without a timeout when the server has TLS.
    thread = threading.Thread(target=query, daemon=True)
    thread.start()
    thread.join(_ANSWER_TIMEOUT_S)
    if not outcome:
        tls = "on" if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true") else "off"
        raise ClusterError(
            f"{named} does not answer as Ray does; TLS is {tls} here: set RAY_USE_TLS, RAY_TLS_CA_CERT, "
            "RAY_TLS_SERVER_CERT and RAY_TLS_SERVER_KEY as on the cluster"
        )
    if isinstance(outcome[0], AuthenticationError):
        raise ClusterError(f"{named} wants a token, other than this one; {CREDENTIALS_HINT}") from outcome[0]


def _is_on_loopback(address: str) -> bool:
    """Whether the Ray at `address` listens on loopback alone, as `listening_on_loopback` starts it.

    Ray replaces 127.0.0.1 by the machine's address, where such a Ray does not listen, and waits forever.
    """
    host, _, port = address.rsplit("/", 1)[-1].rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        node_address = ray_internals.node_address()
        socket.create_connection((node_address, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError:
        return True
    return False


def _unreachable(where: str, reason: str) -> ClusterError:
    return ClusterError(
        f"cannot reach {where} ({reason}); check the address, or unset RAY_ADDRESS to use this machine"
    )


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what Ray's C++ core writes to stderr while it starts; its errors are raised as exceptions."""
    stderr = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(devnull)


def set_up_data() -> None:
    """Set up Ray Data: no progress bars, quiet loggers, restarts of models that die while they load."""
    from ray.data import DataContext  # takes a second, which most commands do without

    context = DataContext.get_current()
    context.max_consecutive_actor_init_deaths = _MOST_DEATHS_WHILE_LOADING
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # keeps the error message of a user's mistake
    for name, level in ray_internals.DATA_LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
