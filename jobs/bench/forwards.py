"""Runtimes to compare, each in a separate process: `setup` loads the model, the other functions run it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from joblib import cpu_count

from jobs.bench import decoders
from jobs.bench.measure import repeat
from scalp_core.bundles.bundle import GRAPH_FILES, Bundle, Graph
from scalp_core.bundles.loading import load_bundle
from scalp_core.images import statistics
from scalp_core.images.preprocess import decode
from scalp_core.inference.decision import Grading, make_gradings
from scalp_core.inference.openvino_runtime import OpenVinoRuntime
from scalp_core.inference.predictor import Hardware, Predictor, ResolvedRuntime

Forward = Callable[[np.ndarray], np.ndarray]

_PLAIN_BATCH = 16
_BATCH_SIZES: dict[Hardware, int] = {"cpu": 32, "cuda": 256}

# Repetitions of the images per bulk measurement: an archive is longer than the sample.
PASSES = 3


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Args:
        name: Name in rows.
        runtime: Runtime; `plain` is unoptimized PyTorch.
        precision: Precision of the forward pass.
        channels_last: Whether `plain` uses this memory layout; all others do.
    """

    name: str
    runtime: Literal["plain"] | ResolvedRuntime
    precision: Literal["fp32", "bf16", "int8"]
    channels_last: bool = False


@dataclass
class _Here:
    """State of this process."""

    files: list[bytes]
    images: np.ndarray
    size: int
    forward: Forward
    predictor: Predictor | None


_here: _Here


def setup(way: Way, device: Hardware, folder: str, files: list[bytes]) -> None:
    """Load the model in this process.

    Args:
        way: How to run the model.
        device: Device of the model.
        folder: Local folder of the bundle.
        files: JPEG files.
    """
    global _here
    bundle = load_bundle(folder)
    spec = bundle.spec.preprocess
    predictor = None
    if way.runtime == "plain":
        forward = plain_forward(bundle, device, way)
    elif way.precision == "int8" and "int8" not in bundle.spec.graphs:
        xml, weights = (Path(folder, name).read_bytes() for name in GRAPH_FILES["int8"])
        forward = _bare_forward(OpenVinoRuntime(Graph(xml, weights), "int8"))
    elif way.runtime == "torch-compile":
        forward = _compiled_forward(bundle, device, way)
    else:
        predictor = Predictor(bundle, device, way.precision, runtime=way.runtime)
        forward = _bare_forward(predictor.forward)
    _here = _Here(
        files, np.stack([decode(data, spec).pixels for data in files]), spec.size, forward, predictor
    )


def logits() -> np.ndarray:
    """Logits of all images, float32 (N, 4)."""
    batches = range(0, len(_here.images), 8)
    return np.concatenate([_here.forward(_here.images[start : start + 8]) for start in batches])


def bare(batch: int, seconds: float) -> list[float]:
    """Time forward passes of one batch of decoded pixels."""
    copies = ceil(batch / len(_here.images))
    images = np.concatenate([_here.images] * copies)[:batch]
    return repeat(lambda: _here.forward(images), seconds)


def bulk(seconds: float) -> list[float]:
    """Time bytes to grades of all images, repeated `PASSES` times; once in the plain way."""
    predictor = _here.predictor
    if predictor is None:
        return repeat(_plain_loop, seconds)
    return repeat(lambda: grade_files(predictor, _here.files * PASSES), seconds)


def single(seconds: float) -> list[float]:
    """Time bytes to grade of single images, one after the other."""
    assert _here.predictor is not None  # noqa: S101
    predictor, files = _here.predictor, cycle(_here.files)
    spec = predictor.spec.preprocess
    return repeat(lambda: predictor.grade(decode(next(files), spec).pixels[None]), seconds)


def grade_files(predictor: Predictor, files: list[bytes]) -> list[Grading]:
    """Grade image files; threads decode the next ones during the forward pass, as in `scalp grade`."""

    def load(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        pixels = decode(data, predictor.spec.preprocess).pixels
        return pixels, statistics.measure(pixels)

    answers, size = [], _BATCH_SIZES[predictor.device]
    with ThreadPoolExecutor(cpu_count(), "decode") as pool:
        ahead = pool.map(load, files[:size])
        for start in range(size, len(files) + size, size):
            batch, ahead = list(ahead), pool.map(load, files[start : start + size])
            images, measured = (np.stack(values) for values in zip(*batch, strict=True))
            answers += make_gradings(predictor.logits(images), measured, predictor.spec)
    return answers


def _plain_loop() -> None:
    for start in range(0, len(_here.files), _PLAIN_BATCH):
        batch = _here.files[start : start + _PLAIN_BATCH]
        _here.forward(np.stack([decoders.plain(data, _here.size) for data in batch]))


def _bare_forward(runtime: Any) -> Forward:
    """Forward pass without scalp's code around it; on a GPU, PyTorch's captured graphs."""
    if not isinstance(runtime, OpenVinoRuntime):
        return runtime.logits
    (request,) = runtime.requests
    return lambda images: request.infer([images], share_inputs=True)[0]


def _compiled_forward(bundle: Bundle, device: Hardware, way: Way) -> Forward:
    """Forward pass compiled by Inductor, also on CPUs, where `Predictor` refuses it because it is slower."""
    from scalp_core.inference.torch_runtime import TorchRuntime

    precision: Literal["bf16", "fp32"] = "bf16" if way.precision == "bf16" else "fp32"
    return TorchRuntime(bundle, device, precision, compiled=True).logits


def plain_forward(bundle: Bundle, device: Hardware, way: Way) -> Forward:
    """Unoptimized forward pass of PyTorch: uint8 (N, size, size, 3) to float32 (N, 4)."""
    import torch

    from scalp_core.models.architecture import load_model, normalize

    layout = torch.channels_last if way.channels_last else torch.contiguous_format
    model: Any = load_model(bundle).to(device)
    model = model.to(memory_format=layout)
    spec = bundle.spec.preprocess

    @torch.inference_mode()
    def forward(images: np.ndarray) -> np.ndarray:
        batch = normalize(torch.from_numpy(images).to(device), spec).contiguous(memory_format=layout)
        with torch.autocast(device, torch.bfloat16, enabled=way.precision == "bf16"):
            return model(batch).float().cpu().numpy()

    return forward
