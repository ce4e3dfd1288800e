"""Bulk grading by others, each as a program of its own: `python -m jobs.bench.bulk_ways WAY ARGUMENTS`.

They read what `scalp grade` reads, run the same bundle, write a row of grade and probabilities for each
photograph as Parquet, and write down when how many photographs were done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from jobs.bench.decoders import plain as decoded_by_pillow
from jobs.bench.forwards import Forward, Way, plain_forward
from scalp_core import calibration
from scalp_core.bundle import load_bundle
from scalp_core.predictor import Hardware, Predictor, has_bf16

BATCH = 32


class Arguments(BaseModel):
    """What a way is told.

    Args:
        bundle: local directory of the bundle.
        source: folder or `s3://` prefix of JPEG files.
        out: folder to write.
        device: where the model runs.
        cores: of this machine.
    """

    bundle: str
    source: str
    out: str
    device: Hardware
    cores: int

    @property
    def points_file(self) -> Path:
        return Path(self.out, "points.txt")


def mark(arguments: Arguments, count: int) -> None:
    """Writes down that so many photographs more are done."""
    with arguments.points_file.open("a") as file:
        file.write(f"{time.time()} {count}\n")


def plain(arguments: Arguments) -> None:
    """PyTorch fp32 as a careful person writes it: a process that decodes by Pillow ahead, channels last."""
    import torch
    from torch.utils.data import DataLoader

    bundle = load_bundle(arguments.bundle)
    torch.set_num_threads(arguments.cores)
    forward = plain_forward(bundle, arguments.device, Way("", "plain", "fp32", channels_last=True))
    uris = sorted(str(path) for path in Path(arguments.source).rglob("*.jpg"))
    files: Any = _Files(uris, bundle.spec.preprocess.size)
    # One process decodes more than the model takes on two cores.
    loader = DataLoader(files, batch_size=BATCH, num_workers=max(1, arguments.cores // 2), prefetch_factor=4)
    found = []
    for images in loader:
        found.append(forward(images.numpy()))
        mark(arguments, len(images))
    _write(arguments, uris, np.concatenate(found), bundle.spec.temperature)


class _Files:
    def __init__(self, uris: list[str], size: int) -> None:
        self._uris = uris
        self._size = size

    def __len__(self) -> int:
        return len(self._uris)

    def __getitem__(self, index: int) -> np.ndarray:
        # A copy, because PyTorch takes no array that may not be written to.
        return decoded_by_pillow(Path(self._uris[index]).read_bytes(), self._size).copy()


def engine(arguments: Arguments) -> None:
    """Our engine alone: files in memory, no Ray, no storage, no rows."""
    predictor = _predictor(arguments)
    files = [path.read_bytes() for path in sorted(Path(arguments.source).rglob("*.jpg"))]
    mark(arguments, 0)
    list(predictor.grade_bytes(files))
    mark(arguments, len(files))


def daft_torch(arguments: Arguments) -> None:
    """Daft as its documentation writes batch inference, the model by PyTorch."""

    def load() -> Forward:
        bundle = load_bundle(arguments.bundle)
        best: Literal["bf16", "fp32"] = "bf16" if has_bf16(arguments.device) else "fp32"
        return plain_forward(bundle, arguments.device, Way("", "plain", best, channels_last=True))

    _daft(arguments, load)


def daft_engine(arguments: Arguments) -> None:
    """The same, but for the model: it is run by our engine."""
    _daft(arguments, lambda: _predictor(arguments).logits)


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
    # Daft's own decoder, in all its threads: faster than decoding inside the class, which has one.
    image = col("path").download(io_config=config).decode_image(mode="RGB").resize(size, size)
    logits: Any = Grader().logits(image)  # type: ignore[arg-type]  # an expression here, values when it runs
    table = rows.select(col("path").alias("uri"), logits.alias("logits")).to_arrow()
    found = np.array(table["logits"].to_pylist(), np.float32)
    _write(arguments, table["uri"].to_pylist(), found, spec.temperature)


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


WAYS = {each.__name__: each for each in (engine, plain, daft_torch, daft_engine)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](Arguments.model_validate_json(sys.argv[2]))
