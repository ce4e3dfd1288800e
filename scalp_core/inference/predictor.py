"""The predictor: evaluation, bulk grading and the endpoint all grade through it."""

from __future__ import annotations

import copy
import ctypes
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Literal

import numpy as np

from scalp_core.bundles.bundle import Bundle, Part
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images import statistics as image_statistics
from scalp_core.inference import openvino_runtime
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.inference.openvino_runtime import OpenVinoRuntime

if TYPE_CHECKING:
    from scalp_core.inference.torch_runtime import TorchRuntime  # imports PyTorch, which takes seconds

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32", "int8"]
Runtime = Literal["auto", "openvino", "torch", "torch-compile"]

Hardware = Literal["cpu", "cuda"]
ResolvedRuntime = Literal["openvino", "torch", "torch-compile"]

# Images from which Inductor pays off on a GPU: compiling takes about 40 s and saves about 0.13 ms per image
# (timm's published rates of this model on an RTX 4090: 2,268 and 3,196 images/s).
COMPILE_FROM = 300_000

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of CUDA's driver API; bf16 needs Ampere or later.
_MAJOR_ATTRIBUTE, _BF16_CAPABILITY = 75, 8

# Packages that decode and resize images.
_DECODERS = ("simplejpeg", "cykooz-resizer", "pillow")


def resolve_device(device: Device) -> Hardware:
    """Resolve `auto` to a GPU if there is one, else to the CPU.

    Raises:
        UserError: cuda is requested and unavailable.
    """
    if device == "cpu" or not _cuda_devices():
        if device == "cuda":
            raise UserError("--device cuda: this machine has no usable NVIDIA GPU; use --device cpu or auto")
        return "cpu"
    return "cuda"


def _cuda_devices() -> int:
    """Count the usable GPUs through the driver, because importing PyTorch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    succeeded = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if succeeded else 0


def _compute_capability() -> int:
    """Return the major compute capability of the first usable GPU; 0 without one."""
    if not _cuda_devices():
        return 0
    driver = ctypes.CDLL("libcuda.so.1")
    handle, major = ctypes.c_int(0), ctypes.c_int(0)
    failed = driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetAttribute(
        ctypes.byref(major), _MAJOR_ATTRIBUTE, handle
    )
    return 0 if failed else major.value


def has_bf16(device: Hardware) -> bool:
    """Whether the hardware has bf16 instructions; emulated bf16 is slower than fp32."""
    return openvino_runtime.cpu_has_bf16() if device == "cpu" else _compute_capability() >= _BF16_CAPABILITY


def resolve_precision(precision: Precision, device: Hardware) -> Literal["bf16", "fp32", "int8"]:
    """Resolve `auto` to bf16 if the hardware has it, else to fp32. int8 changes some grades: opt-in only."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def resolve_runtime(runtime: Runtime, device: Hardware, images: float = 0) -> ResolvedRuntime:
    """Resolve `auto` to OpenVINO on CPUs and PyTorch on GPUs, compiled for long runs.

    Args:
        images: Images that one model will grade; 0 if start-up time matters more, as in an endpoint.

    Raises:
        UserError: `torch-compile` is requested for a CPU.
    """
    if runtime == "torch-compile" and device == "cpu":
        raise UserError("--runtime torch-compile runs on GPUs; use --device cuda, or --runtime auto")
    if runtime != "auto":
        return runtime
    if device == "cpu":
        return "openvino"
    return "torch-compile" if images >= COMPILE_FROM else "torch"


def check_machine(device: Hardware, precision: Precision, versions: Mapping[str, str] | None = None) -> None:
    """Check that this machine has the hardware, precision and library versions of a run.

    Args:
        versions: Versions of the packages that affect answers; None if not known yet.

    Raises:
        UserError: The machine lacks one of them; the message names both.
    """
    start = f"{platform.node()} cannot compute as this run does"
    if device == "cuda" and not _cuda_devices():
        raise UserError(f"{start}: it has no usable NVIDIA GPU; exclude it from the run, or fix its driver")
    if precision == "bf16" and not has_bf16(device):
        raise UserError(
            f"{start}: its {'CPU' if device == 'cpu' else 'GPU'} has no bf16; use machines with bf16, or "
            "another OUT with --precision fp32"
        )
    for name, version in (versions or {}).items():
        if (installed := metadata.version(name)) != version:
            raise UserError(
                f"{start}: it has {name} {installed}, not {version}; install {name} {version} on it"
            )


def deciding_versions(runtime: Runtime, device: Hardware) -> dict[str, str]:
    """Versions of the packages that affect answers: scalp, the runtime, image decoders and resizers."""
    library = "openvino" if resolve_runtime(runtime, device) == "openvino" else "torch"
    return {name: metadata.version(name) for name in ("scalp", library, *_DECODERS)}


def computed_by(device: Hardware, precision: Precision, runtime: Runtime, versions: Mapping[str, str]) -> str:
    """Describe the computation of an answer, as in `cpu bf16 openvino 2026.3.0, scalp 0.1.0`."""
    library = "openvino" if "openvino" in versions else "torch"
    return f"{device} {precision} {runtime} {versions[library]}, scalp {versions['scalp']}"


def needed_part(device: Hardware, precision: Precision, runtime: Runtime) -> Part:
    """Determine the part of a bundle that a predictor runs, for `Bundle.fetch`.

    Raises:
        UserError: The arguments are incompatible.
    """
    resolved = resolve_runtime(runtime, device)
    if resolved == "openvino" and device == "cuda":
        raise UserError("--runtime openvino runs on CPUs; use --device cpu, or --runtime auto")
    if precision == "int8" and resolved != "openvino":
        raise UserError("--precision int8 runs on CPUs by OpenVINO; use --device cpu, or --precision auto")
    if precision == "int8":
        return "int8"
    return "float" if resolved == "openvino" else "weights"


class Predictor:
    """Grade decoded images with a bundle. Thread-safe.

    The result for an image does not depend on the rest of its batch, so online and bulk answers are equal.

    Args:
        threads: CPU threads of the forward pass; None: all cores.

    Raises:
        UserError: The device is unavailable, the arguments are incompatible, or the bundle has no int8 graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
        runtime: Runtime = "auto",
    ) -> None:
        self.spec = bundle.spec
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.runtime = resolve_runtime(runtime, self.device)
        part = needed_part(self.device, self.precision, self.runtime)
        self.forward: OpenVinoRuntime | TorchRuntime
        if part != "weights":
            graph = openvino_runtime.load_graph(bundle, part)
            self.forward = OpenVinoRuntime(graph, self.precision, threads)
            return
        from scalp_core.inference.torch_runtime import TorchRuntime

        compiled = self.runtime == "torch-compile"
        number_format: Literal["bf16", "fp32"] = "bf16" if self.precision == "bf16" else "fp32"
        self.forward = TorchRuntime(bundle, self.device, number_format, compiled=compiled, threads=threads)

    @property
    def model_version(self) -> str:
        """Identifier of the model and precision, as in result rows."""
        return self.spec.version_in(self.precision)

    @property
    def computed_by(self) -> str:
        """Description of device, precision, runtime and versions, as in result rows."""
        versions = deciding_versions(self.runtime, self.device)
        return computed_by(self.device, self.precision, self.runtime, versions)

    def in_streams(self, streams: int) -> Predictor:
        """Copy for parallel forward passes, which divide the threads; shares the graph. OpenVINO alone."""
        if not isinstance(self.forward, OpenVinoRuntime):
            raise ValueError(f"{self.runtime} has no parallel passes")
        other = copy.copy(self)
        other.forward = self.forward.in_streams(streams)
        return other

    def warm_up(self, batch_size: int, *, smaller: bool = True) -> None:
        """Run blank batches of this size, so that no image pays for compilation.

        Args:
            smaller: Whether smaller batches are as frequent, as in an endpoint. On a GPU each size takes
                seconds; without it, smaller batches cost as much as full ones.
        """
        self.forward.warm_up(batch_size, self.spec.preprocess.size, smaller=smaller)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Compute logits of images uint8 (N, size, size, 3) from `preprocess.decode`.

        Returns:
            float32 (N, 4 S): four per symptom, those of `grade` first, then those of `spec.other_symptoms`.
        """
        if not len(images):
            return np.zeros((0, NUM_GRADES * self.spec.symptoms), np.float32)
        return self.forward.logits(images)

    def grade(self, images: np.ndarray) -> list[Grading]:
        """Grade images, uint8 (N, size, size, 3); one answer per image, in order."""
        return make_gradings(self.logits(images), image_statistics.measure_all(images), self.spec)
