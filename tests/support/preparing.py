"""Small source for `scalp prepare` with all kinds of dropped files, and the jobs of its crash tests."""

from __future__ import annotations

import io
import os
import signal
import tarfile
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from jobs.common.local_executor import LocalExecutor
from jobs.data import tasks
from jobs.data.prepare import prepare
from scalp_core import storage
from scalp_core.archives.base import Placed
from scalp_core.curation.audit import Options
from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.examination import read_content
from scalp_core.errors import ImageError

KEPT, DROPPED = 32, 5
UNFETCHED = (5, 6)  # images in two shards that an outage leaves out
KILLER = 7  # the image whose bytes end the process that decodes them


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def write_source(source: str) -> None:
    """Write `KEPT` images in folders, a zip and a tar, and `DROPPED` without a grade or unreadable."""
    for index in range(24):
        storage.write(f"{source}/{index % 4}/{index}.jpg", picture(index))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index in range(24, 28):
            archive.writestr(f"{index % 4}/{index}.jpg", picture(index))
    storage.write(f"{source}/a.zip", packed.getvalue())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for index in (*range(28, 32), 99):
            info = tarfile.TarInfo(f"{index % 4}/{index}.jpg" if index < 99 else "0/28.jpg")
            data = picture(index)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    storage.write(f"{source}/b.tar", packed.getvalue())
    storage.write(f"{source}/1/cut.jpg", picture(40)[:300])
    storage.write(f"{source}/unsorted/41.jpg", picture(41))
    storage.write(f"{source}/1/both.jpg", picture(42))
    storage.write(f"{source}/2/both.jpg", picture(42))
    storage.write(f"{source}/1/notes.txt", b"a text")


def prepare_in_process(source: str, out: str, retry_failed: bool = False) -> dict[str, Any]:
    tasks.LISTING_TASKS = 2  # two shards show as much as six
    return prepare(source, out, Options(ratio="2:1:1"), executor=LocalExecutor(), retry_failed=retry_failed)


def prepare_in_an_outage(source: str, out: str) -> dict[str, Any]:
    """Prepare while `UNFETCHED` cannot be fetched."""
    read = datasets_locations.read_placed
    names = tuple(f"/{index}.jpg" for index in UNFETCHED)

    def read_in_an_outage(locations: list[datasets_locations.Location], max_bytes: int) -> Iterator[Placed]:
        for location, placed in zip(locations, read(locations, max_bytes), strict=True):
            failed = Placed(ImageError("fetch_failed", "the server did not answer"))
            yield failed if location.uri.endswith(names) else placed

    datasets_locations.read_placed = read_in_an_outage
    return prepare_in_process(source, out)


def deadly_content(kind: str, data: bytes) -> dict[str, Any]:
    if data == picture(KILLER):
        os.kill(os.getpid(), signal.SIGSEGV)
    return read_content(kind, data)


def prepare_with_a_deadly_image(source: str, out: str) -> dict[str, Any]:
    tasks.read_content = deadly_content
    return prepare_in_process(source, out)
