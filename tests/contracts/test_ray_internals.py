"""Ray's private parts: each part that scalp depends on exists, and one module imports them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from cluster import haproxy, ray_internals

ROOT = Path(__file__).parents[2]
RAY = Path(ray.__file__).parent
_PB2 = "ray.core.generated.autoscaler_pb2"
_CALLBACKS = "ray.train.v2._internal.callbacks"
_EXECUTION = "ray.train.v2._internal.execution"
_DIRECT = "ray.serve._private.direct_ingress_http_util"
# `module:attribute`, with the reason and the public way that is missing. An attribute may also be one that
# the class assigns to `self`; a field of a protobuf message is named by its FIELD_NUMBER.
DEPENDENCIES = {
    # A Ray on this machine.
    "ray._common.utils:get_system_memory": "memory of the container; ray.init uses it and exports nothing",
    "ray._private.parameter:RayParams": "ray.init has no argument for the agent's port and the log monitor",
    "ray._private.parameter:RayParams.dashboard_agent_listen_port": "0 takes a free port",
    "ray._private.parameter:RayParams.include_log_monitor": "one process less where output is off",
    "ray._private.parameter:RayParams.no_monitor": "one process less: a local Ray has no autoscaler",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": "False listens on loopback; no option of ray.init does",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTERS_ENV_VAR": "loopback for Ray's child processes",
    "ray._private.ray_constants:GCS_PORT_ENVIRONMENT_VARIABLE": "ray.init has no argument for the GCS port",
    "ray._private.ray_constants:PROCESS_TYPE_DASHBOARD": "the kind of the dashboard's process",
    "ray._private.ray_constants:DASHBOARD_ADDRESS": "Ray's agent asks for it without end",
    "ray._private.ray_constants:KV_NAMESPACE_DASHBOARD": "where it asks",
    "ray._private.services:start_api_server": "starts the dashboard's process whether or not it is wanted",
    "ray._private.services:start_ray_process": "ray.init has no argument for the dashboard's modules",
    "ray.dashboard.modules.job.job_head:JobHead": "the module with the Job API",
    "ray.dashboard.modules.node.node_head:NodeHead": "the module that tells JobHead of the node for jobs",
    "ray.dashboard.modules.reporter.reporter_head:ReportHead": "the module with the list for Prometheus",
    "ray._raylet:InnerGcsClient.internal_kv_put": "sets the dashboard's address",
    "ray._private.services:node_ip_address_from_perspective": "address that Ray uses instead of 127.0.0.1",
    "ray._raylet:Config.initialize": "rereads RAY_AUTH_MODE; Ray reads it once, at import",
    "ray._raylet:AuthenticationMode.TOKEN": "value of the mode that require_token verifies",
    "ray._raylet:get_authentication_mode": "Ray has no public query for the mode",
    "ray._raylet:AuthenticationTokenLoader.instance": "Ray has no public query for a token",
    "ray._raylet:AuthenticationTokenLoader.has_token": "whether Ray finds a token in environment or file",
    "ray._raylet:AuthenticationTokenLoader.reset_cache": "a token that was set after the import",
    # The state of a cluster.
    "ray._raylet:GcsClient": "state of the autoscaler; `ray status` prints text alone",
    "ray._raylet:InnerGcsClient.get_cluster_status": "the method of GcsClient for that",
    f"{_PB2}:GetClusterStatusReply": "the message with that state",
    f"{_PB2}:GetClusterStatusReply.AUTOSCALING_STATE_FIELD_NUMBER": "last report of the autoscaler",
    f"{_PB2}:AutoscalingState.AUTOSCALER_STATE_VERSION_FIELD_NUMBER": "above 0 with an autoscaler",
    f"{_PB2}:AutoscalingState.INFEASIBLE_GANG_RESOURCE_REQUESTS_FIELD_NUMBER": "groups that no node can hold",
    # Workers.
    "ray._private.worker:global_worker": "the worker whose task runs",
    "ray._private.worker:Worker.connected": "whether this process is part of a Ray",
    "ray._private.worker:Worker.mode": "whether it is a worker",
    "ray._private.worker:WORKER_MODE": "value of Worker.mode in a worker",
    "ray._raylet:CoreWorker.get_current_task_attempt_number": "RuntimeContext has the task's id alone",
    # The Job API.
    "ray.dashboard.utils:get_address_for_submission_client": "dashboard of the connected Ray",
    "ray.job_submission:JobSubmissionClient._do_request": "the client has no timeout",
    "ray.job_submission:JobSubmissionClient._raise_error": "its errors have no type",
    "ray.job_submission:JobSubmissionClient._server_ray_version": "Ray version; get_version is the API's",
    # Ray Data's loggers: what they log is also raised.
    "ray.data._internal.progress": "its progress bars are off, which it warns of",
    "ray.data._internal.execution.streaming_executor_state": "logs exceptions with their traceback",
    # Ray Train's helper processes.
    "ray.train.torch:TorchTrainer._create_default_callbacks": "RunConfig adds callbacks and removes none",
    "ray.train.torch:TorchTrainer._register_sigint_handler": "RunConfig has no setting to omit the handler",
    f"{_CALLBACKS}.datasets:DatasetsCallback": "a callback to remove",
    f"{_CALLBACKS}.placement_group_callback:PlacementGroupCleanerCallback": "a callback to remove",
    # Ray Train in one process.
    f"{_EXECUTION}.train_fn_utils:LocalTrainFnUtils.report": "Ray's local mode stores no checkpoint",
    f"{_EXECUTION}.train_fn_utils:LocalTrainFnUtils.get_checkpoint": "and resumes from none",
    f"{_EXECUTION}.train_fn_utils:set_train_fn_utils": "TorchTrainer has no setting for them",
    f"{_EXECUTION}.checkpoint.checkpoint_manager:CheckpointManager.register_checkpoint": "Ray's own record",
    f"{_EXECUTION}.checkpoint.checkpoint_manager:CheckpointManager.latest_checkpoint_result": "to resume",
    f"{_EXECUTION}.context:StorageContext.persist_current_checkpoint": "copies a checkpoint to storage",
    f"{_EXECUTION}.training_report:_TrainingReport": "what a CheckpointManager takes",
    # Ray Serve's queue of a body, which has no setting for its length.
    "ray.serve._private.constants:RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "whether Ray can wait",
    f"{_DIRECT}:ASGIDIReceiveProxy._queue": "created with a limit",
    f"{_DIRECT}:ASGIDIReceiveProxy.queue": "replaced by one with a limit",
    # Node providers of the autoscaler.
    "ray.autoscaler._private.aws.node_provider:AWSNodeProvider.create_node": "extended with on-demand nodes",
}

# Undocumented environment variables, by the file of the package `ray` that must contain the name. The
# binaries hold the names of `RAY_lowercase` without the prefix.
VARIABLES = {
    "RAY_worker_maximum_startup_concurrency": "core/src/ray/raylet/raylet",
    "RAY_prestart_worker_first_driver": "core/src/ray/raylet/raylet",
    "RAY_num_workers_soft_limit": "core/src/ray/raylet/raylet",
    "RAY_idle_worker_killing_time_threshold_ms": "core/src/ray/raylet/raylet",
    "RAY_worker_niceness": "core/src/ray/raylet/raylet",
    "RAY_BACKEND_LOG_LEVEL": "_raylet.so",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "serve/_private/constants.py",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "serve/_private/constants.py",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "serve/_private/constants.py",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "serve/_private/constants.py",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "serve/_private/constants.py",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "train/v2/_internal/constants.py",
}
PRIVATE = re.compile(r"\bray(\.\w+)*\.(_[a-z]\w*|core\.generated|serve\.generated)\b")


def is_assigned(owner: object, name: str) -> bool:
    """Whether a class or one of its bases assigns `self.NAME`."""
    for each in owner.__mro__[:-1] if isinstance(owner, type) else ():
        with suppress(OSError):  # a class of the C++ core has no source
            if re.search(rf"\bself\.{name}\b.*=", inspect.getsource(each)):
                return True
    return False


@pytest.mark.parametrize("path", DEPENDENCIES)
def test_ray_has(path):
    module, _, attributes = path.partition(":")
    owner = importlib.import_module(module)
    for name in filter(None, attributes.split(".")):
        if not hasattr(owner, name) and is_assigned(owner, name):
            return
        assert hasattr(owner, name), f"Ray {ray.__version__} has no {path}: {DEPENDENCIES[path]}"
        owner = getattr(owner, name)


@pytest.mark.parametrize("name", VARIABLES)
def test_ray_reads_the_variable(name):
    file = VARIABLES[name]
    stored = name if name.isupper() else name.removeprefix("RAY_")
    assert stored.encode() in (RAY / file).read_bytes(), (
        f"Ray {ray.__version__} does not read {name} in {file}"
    )


def test_ray_reads_the_variables_of_haproxy(tmp_path):
    constants = (RAY / "serve/_private/constants.py").read_text()
    names = haproxy.environment(tmp_path).keys() - {haproxy.POLICY_VARIABLE}
    assert {name for name in names if name not in constants} == set()


def test_every_variable_of_ray_internals_is_listed(monkeypatch):
    environment: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(ray_internals.os, "environ", environment)
        ray_internals.set_local_defaults(cores=2, logical_cpus=6, verbose=False, joins=False)
    documented = {"RAY_USAGE_STATS_ENABLED"}
    assert environment.keys() - documented == VARIABLES.keys()


def test_every_private_import_of_ray_internals_is_listed():
    tree = ast.parse(Path(ray_internals.__file__).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ray."):
            for alias in node.names:
                prefixes = (f"{node.module}:{alias.name}", f"{node.module}.{alias.name}:")
                assert any(path.startswith(prefixes) for path in DEPENDENCIES), alias.name


@pytest.mark.parametrize("package", ["cluster", "jobs", "scalp_core", "serving"])
def test_no_other_module_reaches_into_ray(package):
    own = Path(ray_internals.__file__)
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in (ROOT / package).rglob("*.py")
        if path != own
        for match in PRIVATE.finditer(path.read_text())
    }
    assert found == set()
