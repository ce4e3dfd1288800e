"""Rivals of bulk grading, each a separate program: `python -m tests.benchmarks.grade.rivals WAY ARGUMENTS`.

They read the same source as `scalp grade`, run the same bundle, write one Parquet row per image with grade
and probabilities, and record their progress.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from jobs.bench.engine import grade_files
from scalp_core.bundles.bundle import Bundle
from scalp_core.bundles.loading import load_bundle
from scalp_core.inference import calibration
from scalp_core.inference.predictor import Hardware, Predictor, has_bf16
from tests.benchmarks.plain import Forward, plain_decode, plain_forward

BATCH = 32


class Arguments(BaseModel):
    """Arguments of a rival.

    Args:
        bundle: Local bundle directory.
        source: Folder or `s3://` prefix of JPEG files.
        out: Folder to write.
        device: Device of the model.
        cores: CPU cores of this machine.
    """

    bundle: str
    source: str
    out: str
    device: Hardware
    cores: int

    @property
    def points_file(self) -> Path:
        """File of the progress: lines of time and number of images."""
        return Path(self.out, "points.txt")


def mark(arguments: Arguments, count: int) -> None:
    """Record that `count` more images are graded."""
    with arguments.points_file.open("a") as file:
        file.write(f"{time.time()} {count}\n")


def plain(arguments: Arguments) -> None:
    """Plain loop: one process, PyTorch fp32 and Pillow, batch after batch."""
    bundle = load_bundle(arguments.bundle)
    _loop(arguments, bundle, plain_forward(bundle, arguments.device), ahead=0)


def tuned(arguments: Arguments) -> None:
    """Tuned loop: one process, channels last, the fastest precision, batches decoded ahead."""
    bundle = load_bundle(arguments.bundle)
    _loop(arguments, bundle, _tuned_forward(arguments, bundle), ahead=4)


def _loop(arguments: Arguments, bundle: Bundle, forward: Forward, ahead: int) -> None:
    size = bundle.spec.preprocess.size
    uris = sorted(str(path) for path in Path(arguments.source).rglob("*.jpg"))

    def batch(start: int) -> np.ndarray:
        files = (Path(uri).read_bytes() for uri in uris[start : start + BATCH])
        return np.stack([plain_decode(data, size) for data in files])

    logits, decoded = [], deque[Future[np.ndarray]]()
    with ThreadPoolExecutor(arguments.cores) as pool:
        for start in range(0, len(uris) + ahead * BATCH, BATCH):
            if start < len(uris):
                decoded.append(pool.submit(batch, start))
            if start >= ahead * BATCH and decoded:
                logits.append(forward(decoded.popleft().result()))
                mark(arguments, len(logits[-1]))
    _write(arguments, uris, np.concatenate(logits), bundle.spec.temperature)


def engine(arguments: Arguments) -> None:
    """scalp's engine alone: files in memory, no Ray, no storage, no rows."""
    predictor = _predictor(arguments)
    files = [path.read_bytes() for path in sorted(Path(arguments.source).rglob("*.jpg"))]
    mark(arguments, 0)
    grade_files(predictor, files)
    mark(arguments, len(files))


def daft_torch(arguments: Arguments) -> None:
    """Daft, as in its documentation of batch inference, with the model in PyTorch."""

    _daft(arguments, lambda: _tuned_forward(arguments, load_bundle(arguments.bundle)))


def daft_engine(arguments: Arguments) -> None:
    """Daft with scalp's engine as the model."""
    _daft(arguments, lambda: _predictor(arguments).logits)


def _tuned_forward(arguments: Arguments, bundle: Bundle) -> Forward:
    precision: Literal["bf16", "fp32"] = "bf16" if has_bf16(arguments.device) else "fp32"
    return plain_forward(bundle, arguments.device, precision, channels_last=True)


def _predictor(arguments: Arguments) -> Predictor:
    predictor = Predictor(load_bundle(arguments.bundle), arguments.device)
    predictor.warm_up(BATCH)
    return predictor


def _daft(arguments: Arguments, load: Callable[[], Forward]) -> None:
    import daft
    from daft import col

    spec = load_bundle(arguments.bundle).spec

    @daft.cls(max_concurrency=1, gpus=int(arguments.device == "cuda"))
    class Grader:
        def __init__(self) -> None:
            self.forward = load()

        @daft.method.batch(return_dtype=daft.DataType.list(daft.DataType.float32()), batch_size=BATCH)
        def logits(self, images: daft.Series) -> list[list[float]]:
            answers = self.forward(np.stack([np.asarray(image) for image in images.to_pylist()]))
            mark(arguments, len(answers))
            return answers.tolist()

    config = _daft_io() if arguments.source.startswith("s3://") else None
    rows = daft.from_glob_path(f"{arguments.source}/**/*.jpg", io_config=config)
    size = spec.preprocess.size
    # Daft's decoder in all its threads is faster than decoding in the class, which has one.
    image = col("path").download(io_config=config).decode_image(mode="RGB").resize(size, size)
    logits: Any = Grader().logits(image)
    table = rows.select(col("path").alias("uri"), logits.alias("logits")).to_arrow()
    values = np.array(table["logits"].to_pylist(), np.float32)
    _write(arguments, table["uri"].to_pylist(), values, spec.temperature)


def _daft_io() -> Any:
    from daft.io import IOConfig, S3Config

    return IOConfig(
        s3=S3Config(
            endpoint_url=os.environ["AWS_ENDPOINT_URL"],
            key_id=os.environ["AWS_ACCESS_KEY_ID"],
            access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
            region_name=os.environ["AWS_REGION"],
        )
    )


def _write(arguments: Arguments, uris: list[str], logits: np.ndarray, temperature: float) -> None:
    probabilities = calibration.probabilities(logits, temperature)
    table = pa.table(
        {"uri": uris, "grade": probabilities.argmax(1), "probabilities": list(probabilities)},
    )
    pq.write_table(table, Path(arguments.out, "rows.parquet"))


WAYS = {way.__name__: way for way in (engine, plain, tuned, daft_torch, daft_engine)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Arguments.model_validate_json(sys.argv[2]))
