"""Build, start and stop the Ray Serve application; `serve` is the command `scalp serve`."""

from __future__ import annotations

import math
import os
import signal
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from cluster import haproxy
from cluster.local import connect
from cluster.resources import Cluster, is_joined
from scalp_core import storage
from scalp_core.bundles.loading import load_bundle
from scalp_core.bundles.registry import resolve
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Hardware, needed_part, resolve_device
from scalp_core.results.store import StoreWriter
from scalp_core.review.referrals import check_symptom
from scalp_core.settings import parse_settings
from serving.api.review import check_readers
from serving.api.routes import create_api
from serving.auth.keys import Keys
from serving.auth.network import check_address, check_certificate, check_port
from serving.observability import tracing
from serving.replicas.combined import CombinedGrader
from serving.replicas.explainer import Explainer
from serving.replicas.grader import Grader
from serving.replicas.ingress import Ingress
from serving.replicas.reviewer import SCALING, Reviewer, read_review
from serving.settings import ModelSettings, Settings, deployment_options

_APP_NAME = "scalp"
# Ray's default of 20 attempts does not help a bundle that fails to load.
_START_ATTEMPTS = 3
# A core grades as many images per second in passes of 4 as of 16, with a lower latency.
_CPU_BATCH = 4
_MOST_MINUTES_TO_END = 2
_LOGGING = {"log_level": "WARNING", "enable_access_log": False}


def build(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application: an ingress that decodes, a grader with the model, an explainer for heatmaps.

    `serving/config.yaml` names this function. The `user_config` of the deployment Grader names the bundle and
    can be changed while the application runs.

    Raises:
        UserError: A field is unknown or invalid, or `tracing` is set.
    """
    settings = parse_settings(Settings, args, "args of the application")
    if settings.tracing.collector:
        raise UserError(
            "tracing is set in args, but on a cluster the environment of the nodes configures it; remove it, "
            f"and set {tracing.EXPORTER_VARIABLE} there"
        )
    return _application(settings)


def _application(
    settings: Settings,
    model: ModelSettings | None = None,
    candidate: ModelSettings | None = None,
    *,
    combined: bool = False,
) -> ray_serve.Application:
    """Build the application.

    Args:
        model: Model, if no config file names it.
        candidate: Model of the shadow or canary, if no config file names it.
        combined: Put ingress, grader and explainer into one process.
    """
    common: dict[str, Any] = {"max_constructor_retry_count": _START_ATTEMPTS}
    grader = ray_serve.deployment(Grader, **deployment_options(settings.grader, settings), **common)
    others: dict[str, Any] = {}
    if settings.candidate:
        second = grader.options(name="Candidate")
        if candidate:
            second = second.options(user_config=candidate.model_dump())
        others["candidate"] = second.bind(settings)
    user_config = {"user_config": model.model_dump()} if model else {}
    # The deployment that serves HTTP holds as many requests in both forms.
    cpus = settings.grader.cpus if combined else settings.ingress.cpus
    scaling = settings.ingress.model_copy(update={"cpus": cpus})
    serves_http = deployment_options(scaling, settings, is_ingress=True) | common
    if combined:
        one = ray_serve.deployment(ray_serve.ingress()(CombinedGrader), **serves_http)
        return one.options(name=Grader.__name__, **user_config).bind(settings, create_api, **others)
    explainer = ray_serve.deployment(Explainer, **deployment_options(settings.explainer, settings), **common)
    if model:
        explainer = explainer.options(user_config={"bundle": model.bundle})
    if settings.review:
        reviewer = ray_serve.deployment(Reviewer, **deployment_options(SCALING, settings), **common)
        others["reviewer"] = reviewer.bind(settings.review)
    ingress = ray_serve.deployment(ray_serve.ingress()(Ingress), **serves_http)
    first = grader.options(**user_config).bind(settings)
    return ingress.bind(settings, first, explainer.bind(), create_api, **others)


def start(
    bundle: str,
    host: str,
    port: int,
    settings: Settings | None = None,
    candidate: str | None = None,
    grpc_port: int | None = None,
) -> None:
    """Start the endpoint on this machine, or on the cluster of `RAY_ADDRESS`; returns when it is ready.

    Args:
        bundle: Directory of the bundle, local or `s3://`, or `models://NAME[@VERSION]`.
        settings: Settings of the endpoint; None fits the grader to the machine.
        candidate: Bundle of the shadow or canary of `settings.candidate`.
        grpc_port: Port where HAProxy accepts gRPC, for a server that the caller runs.

    Raises:
        UserError: The bundle is damaged, the keys or the certificate are not readable, the address is in use,
            a review has no keys, no images or those of another symptom, the store holds other files, or
            `settings.front`, `settings.tracing` or `grpc_port` is set and no Ray is started here.
    """
    settings = settings or Settings()
    if settings.candidate and candidate is None:
        mode = settings.candidate.mode
        raise UserError(
            f"the settings have a candidate ({mode}) without a bundle; add --{mode} BUNDLE, or remove "
            "candidate from the settings"
        )
    keys = Keys(settings.keys)
    check_address(host, keys, settings.keys.open_to_network_without_keys)
    check_port(host, port)
    if grpc_port is not None:
        check_port(host, grpc_port, "--grpc-port")
        if grpc_port == port:
            raise UserError(f"--port and --grpc-port are both {port}; choose another --grpc-port")
    check_readers(settings.review, keys)
    if settings.store:
        StoreWriter(settings.store.folder, settings.store.max_images).claim()
    referrals = read_review(settings.review).referrals if settings.review else None
    device = resolve_device(settings.device)
    model = _pin_model(bundle, device, settings)
    if referrals and referrals.store:
        check_symptom(bundle, load_bundle(model.bundle).spec.symptom)
    second = _pin_model(candidate, device, settings) if candidate else None
    if not is_joined():
        # On a cluster HAProxy is set up when the cluster starts.
        check_certificate(settings.front.tls_certificate)
        grpc = haproxy.Grpc.of(_haproxy_folder(), host, grpc_port) if grpc_port else None
        os.environ.update(haproxy.environment(_haproxy_folder(), settings.front, grpc))
        tracing.configure(settings.tracing)
    elif "front" in settings.model_fields_set:
        raise UserError(
            "front is set, but a cluster has its own HAProxy; remove front, and set "
            f"{haproxy.POLICY_VARIABLE} in the environment of its nodes"
        )
    elif grpc_port:
        raise UserError(
            "--grpc-port needs the HAProxy of a local Ray, but RAY_ADDRESS is set; unset it, or remove "
            "--grpc-port"
        )
    elif settings.tracing.collector:
        raise UserError(
            "tracing is set, but on a cluster the environment of the nodes configures it; remove it, and set "
            f"{tracing.EXPORTER_VARIABLE} there"
        )
    cluster = connect(jobs=settings.bulk is not None)
    try:
        ray_serve.start(http_options={"host": host, "port": port}, logging_config=_LOGGING)
        combined = _is_combined(settings, device)
        settings = _fit_grader(settings, cluster, device, combined=combined)
        app = _application(settings, model, second, combined=combined)
        ray_serve.run(app, name=_APP_NAME, logging_config=_LOGGING)
    except BaseException:
        stop()
        raise


def stop() -> None:
    """Stop the endpoint after its open requests."""
    ray_serve.shutdown()


def serve(
    bundle: str,
    host: str,
    port: int,
    settings: Settings,
    candidate: str | None = None,
    grpc_port: int | None = None,
) -> None:
    """Run the endpoint until it is interrupted; the command `scalp serve`.

    Raises:
        UserError: As `start`, or the gRPC server has failed.
    """
    start(bundle, host, port, settings, candidate, grpc_port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by systemd and containers
    address = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.front.tls_certificate else "http"
    with ExitStack() as stack:
        server = stack.enter_context(_grpc_server(settings, host, grpc_port)) if grpc_port else None
        grpc = f", gRPC at {address}:{grpc_port}" if grpc_port else ""
        print(f"READY {scheme}://{address}:{port}{grpc} (Ctrl-C ends it)", flush=True)  # noqa: T201
        try:
            if server is None:
                threading.Event().wait()
            else:
                server.join()
                raise UserError(
                    "the gRPC server has failed; start the endpoint again: its log has the reason"
                )
        except KeyboardInterrupt:
            print("stopping", flush=True)  # noqa: T201
        finally:
            _drain()
            if os.environ.get("RAY_ADDRESS"):
                stop()  # a local Ray ends with this process


def _grpc_server(settings: Settings, host: str, port: int) -> AbstractContextManager[threading.Thread]:
    """Run the gRPC server in a thread while the context is open."""
    from serving.api.grpc_server import GrpcServer, running  # most endpoints have no gRPC

    sockets = haproxy.Grpc.of(_haproxy_folder(), host, port)
    keys = Keys(settings.keys)
    server = GrpcServer(settings.limits, keys, settings.answer_seconds, str(sockets.requests))
    return running(server, f"unix:{sockets.calls}")


def _drain() -> None:
    """Delete the application after its open requests; waits two minutes at most, or until another Ctrl-C.

    Open batches are aborted earlier, with a last line `aborted`, because the grader has ended.
    """
    for _ in range(_MOST_MINUTES_TO_END):
        with suppress(TimeoutError):
            ray_serve.delete(_APP_NAME)  # waits up to a minute
            return


@cache
def _haproxy_files() -> tempfile.TemporaryDirectory[str]:
    """Directory that exists as long as this process."""
    return tempfile.TemporaryDirectory(prefix="scalp-haproxy-")


def _haproxy_folder() -> Path:
    return Path(_haproxy_files().name)


def _pin_model(bundle: str, device: Hardware, settings: Settings) -> ModelSettings:
    """Resolve and check a bundle here, so that replicas that start later load the same version."""
    batch = {"max_batch_size": _CPU_BATCH} if device == "cpu" else {}
    model = ModelSettings(bundle=storage.absolute(resolve(bundle)), **batch)
    load_bundle(model.bundle).fetch(needed_part(device, settings.precision, settings.runtime))
    return model


def _is_combined(settings: Settings, device: Hardware) -> bool:
    """Whether one process suffices: on a CPU, with one replica of each deployment."""
    scalings = (settings.ingress, settings.grader, settings.explainer)
    return device == "cpu" and all(scaling.max_replicas == 1 for scaling in scalings)


def _fit_grader(settings: Settings, cluster: Cluster, device: Hardware, *, combined: bool) -> Settings:
    """Fit the grader to the nodes, unless the settings describe it.

    It gets all cores of a node: decoding takes few of them, and one model with all cores is faster than
    several. CPUs for the other deployments stay free, otherwise they would wait forever.
    """
    if "grader" in settings.model_fields_set:
        return settings
    reviewer = SCALING.cpus if settings.review else 0
    others = 0 if combined else math.ceil(settings.ingress.cpus + settings.explainer.cpus + reviewer)
    graders = 2 if settings.candidate else 1
    threads = max(1, min(cluster.cores_per_node, cluster.cpus - others) // graders)
    resources = {"cpus": threads, "gpus": 1 if device == "cuda" else 0}
    return settings.model_copy(update={"grader": settings.grader.model_copy(update=resources)})
