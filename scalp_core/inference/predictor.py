"""The one predictor: evaluation, bulk grading and the endpoint all answer through it."""

from __future__ import annotations

import ctypes
import platform
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from itertools import islice
from typing import Literal, Protocol

import numpy as np
from joblib import cpu_count

from scalp_core.bundles.bundle import Bundle, Part
from scalp_core.errors import ImageError, UserError
from scalp_core.images import statistics as image_statistics
from scalp_core.images.preprocess import decode
from scalp_core.inference import openvino_runtime
from scalp_core.inference.decision import Grading, make_gradings

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp32", "int8"]
Runtime = Literal["auto", "openvino", "torch", "torch-compile"]

Hardware = Literal["cpu", "cuda"]
ResolvedRuntime = Literal["openvino", "torch", "torch-compile"]

# Photographs above which Inductor pays for itself on a GPU: it takes about 40 s and saves about 0.13 ms each
# (timm's published rates of this model on an RTX 4090, 2,268 and 3,196/s).
COMPILE_FROM = 300_000

# Photographs that are decoded, then computed, together, and such pieces decoded ahead.
_PIECES: dict[Hardware, int] = {"cpu": 32, "cuda": 256}
_AHEAD = 2

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR of CUDA's driver API; Ampere and later multiply bf16.
_MAJOR_ATTRIBUTE, _BF16_CAPABILITY = 75, 8

# Packages that make pixels of files.
_DECODERS = ("simplejpeg", "cykooz-resizer", "pillow")

_Measured = tuple[np.ndarray, np.ndarray]
"""Pixels of a photograph and their statistics, both made by the threads that decode."""


class _Forward(Protocol):
    def warm_up(self, batch_size: int, size: int) -> None: ...

    def logits(self, images: np.ndarray) -> np.ndarray: ...


def resolve_device(device: Device) -> Hardware:
    """`auto` takes a GPU when there is one.

    Raises:
        UserError: cuda was asked for and is not there.
    """
    if device == "cpu" or not _cuda_devices():
        if device == "cuda":
            raise UserError("--device cuda: this machine has no usable NVIDIA GPU; use --device cpu or auto")
        return "cpu"
    return "cuda"


def _cuda_devices() -> int:
    """GPUs that this process may use, from the driver: importing PyTorch to ask it would take seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def _compute_capability() -> int:
    """Major compute capability of the first GPU that this process may use; 0 without one."""
    if not _cuda_devices():
        return 0
    driver = ctypes.CDLL("libcuda.so.1")
    handle, major = ctypes.c_int(0), ctypes.c_int(0)
    failed = driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetAttribute(
        ctypes.byref(major), _MAJOR_ATTRIBUTE, handle
    )
    return 0 if failed else major.value


def has_bf16(device: Hardware) -> bool:
    """Whether the hardware multiplies bf16 itself; emulated bf16 is slower than fp32."""
    return openvino_runtime.cpu_has_bf16() if device == "cpu" else _compute_capability() >= _BF16_CAPABILITY


def resolve_precision(precision: Precision, device: Hardware) -> Literal["bf16", "fp32", "int8"]:
    """`auto` takes bf16 where the hardware has it. int8 is never taken unasked: it moves some grades."""
    if precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return precision


def resolve_runtime(runtime: Runtime, device: Hardware, photographs: float = 0) -> ResolvedRuntime:
    """`auto` takes OpenVINO on CPUs and PyTorch on GPUs, compiled when the run is long.

    Args:
        runtime: as asked for.
        device: where the model runs.
        photographs: that one model will grade; 0 where nobody waits for the compiler, as at an endpoint.
    """
    if runtime != "auto":
        return runtime
    if device == "cpu":
        return "openvino"  # faster than what Inductor compiles, and there at once
    return "torch-compile" if photographs >= COMPILE_FROM else "torch"


def check_machine(device: Hardware, precision: Precision, versions: Mapping[str, str] | None = None) -> None:
    """Refuse a machine that would answer by other hardware, numbers or libraries than those of a run.

    Args:
        device: that the run computes on.
        precision: that it computes in.
        versions: of the packages that decide its answers; None where they are not known yet.

    Raises:
        UserError: names the machine and what it lacks.
    """
    here = f"{platform.node()} cannot compute as this run does"
    if device == "cuda" and not _cuda_devices():
        raise UserError(f"{here}: it has no usable NVIDIA GPU; keep it out of the run, or repair its driver")
    if precision == "bf16" and not has_bf16(device):
        raise UserError(
            f"{here}: its {'CPU' if device == 'cpu' else 'GPU'} does not multiply bf16; use machines "
            "that do, or another OUT with --precision fp32"
        )
    for name, version in (versions or {}).items():
        if (found := metadata.version(name)) != version:
            raise UserError(f"{here}: it has {name} {found}, not {version}; install {name} {version} on it")


def deciding_versions(runtime: Runtime, device: Hardware) -> dict[str, str]:
    """Versions of what decides answers: scalp, what runs the model, what decodes and resizes images."""
    library = "openvino" if resolve_runtime(runtime, device) == "openvino" else "torch"
    return {name: metadata.version(name) for name in ("scalp", library, *_DECODERS)}


def computed_by(device: Hardware, precision: Precision, runtime: Runtime, versions: Mapping[str, str]) -> str:
    """Name what computed an answer, as in `cpu bf16 openvino 2026.3.0, scalp 0.1.0`."""
    library = "openvino" if "openvino" in versions else "torch"
    return f"{device} {precision} {runtime} {versions[library]}, scalp {versions['scalp']}"


def needed_part(device: Hardware, precision: Precision, runtime: Runtime) -> Part:
    """What of a bundle such a predictor runs; `Bundle.fetch` takes it.

    Raises:
        UserError: these do not go together.
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
    """Grades decoded photographs with a bundle. May be shared by threads: they take turns.

    A row's result does not depend on the rest of its batch, so online and bulk answers are equal.

    Args:
        bundle: the loaded bundle.
        device: where the model runs.
        precision: of the forward pass.
        threads: CPU threads of the forward pass; None takes all cores.
        runtime: what runs it.
        streams: forward passes at once, which divide the threads; more than one only by OpenVINO.

    Raises:
        UserError: the device is not there, the arguments do not go together, or the bundle has no int8 graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device = "auto",
        precision: Precision = "auto",
        threads: int | None = None,
        runtime: Runtime = "auto",
        streams: int = 1,
    ) -> None:
        self.spec = bundle.spec
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.runtime = resolve_runtime(runtime, self.device)
        part = needed_part(self.device, self.precision, self.runtime)
        self.forward = self._load(bundle, part, threads, streams)

    def _load(self, bundle: Bundle, part: Part, threads: int | None, streams: int) -> _Forward:
        if part != "weights":
            graph = openvino_runtime.load_graph(bundle, part)
            return openvino_runtime.OpenVinoRuntime(graph, self.precision, threads, streams)
        from scalp_core.inference.torch_runtime import TorchRuntime

        return TorchRuntime(
            self.spec.architecture,
            bundle.state,
            self.spec.preprocess,
            self.device,
            "bf16" if self.precision == "bf16" else "fp32",
            compiled=self.runtime == "torch-compile",
            threads=threads,
            head=self.spec.head,
        )

    @property
    def model_version(self) -> str:
        """Names what answers exactly."""
        return self.spec.version_in(self.precision)

    @property
    def computed_by(self) -> str:
        """Names the hardware, numbers and libraries that answer."""
        versions = deciding_versions(self.runtime, self.device)
        return computed_by(self.device, self.precision, self.runtime, versions)

    def warm_up(self, batch_size: int) -> None:
        """Runs blank batches up to this size, so that no photograph pays for a first call."""
        self.forward.warm_up(batch_size, self.spec.preprocess.size)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Raw scores.

        Args:
            images: uint8 (N, size, size, 3) from `preprocess.decode`.

        Returns:
            float32 (N, 4).
        """
        if not len(images):
            return np.zeros((0, len(self.spec.grade_names)), np.float32)
        return self.forward.logits(images)

    def grade(self, images: np.ndarray) -> list[Grading]:
        """Grades uint8 (N, size, size, 3); one answer a row, in order."""
        return make_gradings(self.logits(images), image_statistics.measure_all(images), self.spec)

    def grade_bytes(
        self, files: Iterable[bytes], decode_threads: int | None = None
    ) -> Iterator[Grading | ImageError]:
        """Grades files, decoding the next ones while the model runs; one answer a file, in order.

        Args:
            files: contents; taken in as the work goes on, so that an archive need not fit into memory.
            decode_threads: that decode; None takes one for each core.

        Yields:
            the grading, or why the file cannot be graded.
        """
        threads = decode_threads or cpu_count()
        piece = _PIECES[self.device]
        with ThreadPoolExecutor(threads, "decode") as pool:
            rest = iter(files)
            waiting = deque(self._start(pool, rest, piece) for _ in range(_AHEAD))
            while running := waiting.popleft():
                decoded = [future.result() for future in running]
                waiting.append(self._start(pool, rest, piece))
                yield from self._answers(decoded)

    def _start(
        self, pool: ThreadPoolExecutor, files: Iterator[bytes], count: int
    ) -> list[Future[_Measured | ImageError]]:
        return [pool.submit(self._measured, data) for data in islice(files, count)]

    def _measured(self, data: bytes) -> _Measured | ImageError:
        try:
            pixels = decode(data, self.spec.preprocess).pixels
        except ImageError as error:
            return error
        return pixels, image_statistics.measure(pixels)

    def _answers(self, decoded: list[_Measured | ImageError]) -> Iterator[Grading | ImageError]:
        graded: Iterator[Grading] = iter([])
        if good := [each for each in decoded if not isinstance(each, ImageError)]:
            images, statistics = (np.stack(side) for side in zip(*good, strict=True))
            graded = iter(make_gradings(self.logits(images), statistics, self.spec))
        for each in decoded:
            yield each if isinstance(each, ImageError) else next(graded)
