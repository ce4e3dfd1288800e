"""Provenance of measurements: machine, library versions and git revision."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from joblib import cpu_count

from scalp_core.inference.predictor import has_bf16, resolve_device

_LIBRARIES = (
    "scalp", "ray", "torch", "torchvision", "timm", "openvino", "nncf",
    "numpy", "pillow", "simplejpeg", "cykooz-resizer", "pyarrow", "scikit-learn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results."""
    return {"python": platform.python_version()} | dict(_library_versions())


@cache
def _library_versions() -> Mapping[str, str]:
    """Versions of `_LIBRARIES`, read once per process: to parse all takes 7 ms."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def git_revision() -> str | None:
    """Commit of the checkout, with `-dirty` if it has changes; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, GPU, and whether each multiplies bf16 in hardware."""
    device = resolve_device("auto")
    return {
        "cpu": _cpu_name(),
        "cores": cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_name() if device == "cuda" else None,
        "bf16": has_bf16(device),
    }


def peak_mib() -> float:
    """Peak resident memory of this process, MiB (VmHWM of the kernel)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024, 1)


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
