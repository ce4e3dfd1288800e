"""Compare JPEG decoders: bytes to the resized square, by several libraries."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from joblib import cpu_count
from PIL import Image

from jobs.bench.measure import Candidate, repeat, time_in_turns
from scalp_core.images.codecs import read_picture
from scalp_core.images.preprocess import Preprocess, decode

OURS = "scalp"

Decoder = Callable[[bytes], np.ndarray]


def decode_rows(files: list[bytes], spec: Preprocess, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure images per second of each library on one core, and of scalp's decoder on all cores.

    `difference_of_255` is the mean absolute difference of pixels from scalp's decoder at full resolution.
    """
    decoders = _decoders(spec)
    cores = cpu_count()
    full = [_at_full_size(data, spec) for data in files]
    with ThreadPoolExecutor(cores) as pool:
        single = {
            name: Candidate(name, partial(repeat, partial(_decode_all, decoder, files)), len(files))
            for name, decoder in decoders.items()
        }
        parallel = Candidate(OURS, partial(repeat, lambda: list(pool.map(decoders[OURS], files))), len(files))
        with _one_torch_thread():
            time_in_turns("decoding", [*single.values(), parallel], rounds, seconds)
    rows = []
    for name, decoder in decoders.items():
        differences = [
            np.abs(decoder(data).astype(int) - best).mean() for data, best in zip(files, full, strict=True)
        ]
        rows.append(_row(single[name], 1, difference_of_255=round(float(np.mean(differences)), 3)))
    rows.append(_row(parallel, cores, threads_help=round(parallel.rate / single[OURS].rate, 2)))
    return rows


def plain(data: bytes, size: int) -> np.ndarray:
    """Decode in the plain way: Pillow, at full resolution."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def _decoders(spec: Preprocess) -> dict[str, Decoder]:
    decoders: dict[str, Decoder] = {
        "Pillow, all pixels": partial(plain, size=spec.size),
        "Pillow, draft": partial(_pillow_draft, size=spec.size),
        "torchvision": partial(torchvision, size=spec.size),
    }
    if importlib.util.find_spec("cv2"):  # optional: not a dependency
        decoders["OpenCV, halved"] = partial(_opencv, size=spec.size)
    return decoders | {OURS: lambda data: decode(data, spec).pixels}


def _pillow_draft(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (size, size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def torchvision(data: bytes, size: int) -> np.ndarray:
    """Decode with torchvision, at full resolution."""
    import torch
    from torchvision.io import decode_jpeg
    from torchvision.transforms.v2 import functional

    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return functional.resize(pixels, [size, size], antialias=True).permute(1, 2, 0).numpy()


def _opencv(data: bytes, size: int) -> np.ndarray:
    import cv2

    cv2.setNumThreads(0)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)[:, :, ::-1]


def _at_full_size(data: bytes, spec: Preprocess) -> np.ndarray:
    stored = io.BytesIO()
    pixels = read_picture(data, lambda width, height: (width, height)).pixels
    Image.fromarray(pixels).save(stored, "BMP")
    return decode(stored.getvalue(), spec).pixels.astype(int)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Limit PyTorch, in whose threads torchvision resizes, to one thread: all compare on one core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _decode_all(decoder: Decoder, files: list[bytes]) -> None:
    for data in files:
        decoder(data)


def _row(candidate: Candidate, threads: int, **more: Any) -> dict[str, Any]:
    rate = round(candidate.rate, 1)
    return {
        "part": "decode",
        "what": candidate.name,
        "threads": threads,
        "photographs_per_second": rate,
        **more,
    }
