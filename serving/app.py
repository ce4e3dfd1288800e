"""The Ray Serve application: `build_app` describes it, `start` and `stop` run it, `serve` is the verb."""

from __future__ import annotations

import errno
import ipaddress
import math
import os
import signal
import socket
import threading

import ray
from ray import serve as ray_serve

from cluster.local import Cluster, connect
from scalp_core.bundle import Bundle, load_bundle
from scalp_core.errors import UserError
from scalp_core.predictor import Device, Precision, Runtime, needed_part, resolve_device, resolve_runtime
from serving.api import create_api
from serving.grader import Batching, Grader
from serving.ingress import Ingress

_APP_NAME = "scalp"
_INGRESS_CPUS = 1
# A bundle that cannot start will not start at the twentieth attempt either, which is Ray's default.
_START_ATTEMPTS = 3
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build_app(
    bundle: Bundle,
    device: Device,
    precision: Precision,
    threads: int,
    batching: Batching = Batching(),  # noqa: B008
    runtime: Runtime = "auto",
) -> ray_serve.Application:
    """The application: an ingress that decodes, and a grader that holds the model.

    Args:
        bundle: loaded and checked; every replica gets these weights and no others.
        device: `cpu` or `cuda`; `auto` takes what this process has.
        precision: of the forward pass.
        threads: CPU threads of the forward pass, and the logical CPUs the grader reserves for them.
        batching: how requests share forward passes.
        runtime: what runs the model.
    """
    device = resolve_device(device)
    bundle.fetch(needed_part(device, precision, runtime))
    runtime = resolve_runtime(runtime, device, photographs=math.inf)
    common = {
        "max_ongoing_requests": batching.max_ongoing_requests,
        "max_constructor_retry_count": _START_ATTEMPTS,
    }
    grader = ray_serve.deployment(
        Grader,
        ray_actor_options={"num_cpus": threads, "num_gpus": 1 if device == "cuda" else 0},
        **common,
    )
    ingress = ray_serve.deployment(
        ray_serve.ingress(create_api)(Ingress), ray_actor_options={"num_cpus": _INGRESS_CPUS}, **common
    )
    model = grader.bind(ray.put(bundle), device, precision, threads, batching.max_batch_size, runtime)
    return ingress.bind(model, bundle.spec, bundle.spec.version_in(precision))


def start(
    bundle: str,
    host: str,
    port: int,
    device: Device = "auto",
    precision: Precision = "auto",
    runtime: Runtime = "auto",
) -> None:
    """Starts the endpoint and returns when it is ready.

    Args:
        bundle: directory of the bundle, local or `s3://`.
        host: loopback address to listen on.
        port: to listen on.
        device: where the model runs.
        precision: of the forward pass.
        runtime: what runs the model.

    Raises:
        UserError: the bundle is damaged, or the address cannot be had.
    """
    _check_address(host, port)
    loaded = load_bundle(bundle)
    cluster = connect()
    try:
        ray_serve.start(http_options={"host": host, "port": port}, logging_config=_LOGGING)
        app = build_app(loaded, device, precision, _threads(cluster), runtime=runtime)
        ray_serve.run(app, name=_APP_NAME, logging_config=_LOGGING)
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Ends what `start` began; requests that are being answered are finished first."""
    ray_serve.shutdown()


def serve(bundle: str, host: str, port: int, device: Device, precision: Precision, runtime: Runtime) -> None:
    """`scalp serve`: answers photographs until it is interrupted.

    Raises:
        UserError: as `start`.
    """
    start(bundle, host, port, device, precision, runtime)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how systemd and containers interrupt
    address = f"[{host}]" if ":" in host else host
    print(f"READY http://{address}:{port} (Ctrl-C ends it)", flush=True)  # noqa: T201
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopping", flush=True)  # noqa: T201
    finally:
        ray_serve.delete(_APP_NAME)  # finishes the requests that are being answered
        if os.environ.get("RAY_ADDRESS"):
            stop()  # a local Ray ends with this process, and Serve in it


def _threads(cluster: Cluster) -> int:
    """All the cores of a machine: decoding takes few of them, and one model with all beats several.

    A reservation that leaves the ingress no CPU would wait for ever.
    """
    return max(1, min(cluster.cores_per_node, cluster.cpus - _INGRESS_CPUS))


def _check_address(host: str, port: int) -> None:
    if not _is_loopback(host):
        raise UserError(
            f"--host {host} is open to the network and the endpoint asks for no key yet; use 127.0.0.1 "
            "behind a proxy that authenticates"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
            raise UserError(f"port {port} of {host} {reason}; choose another one with --port") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
