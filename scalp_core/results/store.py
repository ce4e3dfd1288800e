"""The store of an endpoint: images that clients asked to keep, each with its result row.

STORE/scalp.json                     marker of `scalp serve`
STORE/images/IMAGE_ID.jpg or .png    the pixels of the image, in a file without metadata
STORE/results/IMAGE_ID.parquet       its result row, of `schema.SCHEMA`

IMAGE_ID, and the `sha256` of the row, are of the stored bytes, so that labels and data sets find them. They
differ from those of the bytes that were sent if these had metadata. One image has one file and one row,
whichever replica adds it and however often, and it is removed by removing these two files.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.curation.pseudonymize import declares_identity, strip_metadata
from scalp_core.datasets.locations import Location
from scalp_core.datasets.manifest import image_id, location_id
from scalp_core.errors import UserError
from scalp_core.results.schema import RESULTS_FOLDER, SCHEMA
from scalp_core.storage import outputs, parquet

KIND = "serve"
"""Command that makes a store, in its marker."""

IMAGES_FOLDER = "images"

# Files of one image; a hidden one is that of a writer, in progress or killed.
_OF_IMAGE = re.compile(rf"/(?:{IMAGES_FOLDER}|{RESULTS_FOLDER})/\.?([0-9a-f]+)\.[^/]+$")
_COUNT_AGAIN_S = 60.0
_READS = 16


class NotKept(Exception):  # noqa: N818
    """An image may not be added, for this reason."""

    def __init__(self, reason: Literal["identifying", "store_full"]) -> None:
        super().__init__(reason)
        self.reason = reason


class StoreWriter:
    """Adds images to a store; threads may share it, and several processes may write to one store.

    Args:
        folder: Directory of the store, local or `s3://`; it may be new.
        max_images: Number of images from which on none is added. Each process counts the images again after
            a minute, so several may add some more.
        clock: Returns seconds.
    """

    def __init__(self, folder: str, max_images: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = storage.absolute(folder)
        self._max_images = max_images
        self._clock = clock
        self._lock = threading.Lock()
        self._images = 0
        self._counted_at: float | None = None

    def claim(self) -> None:
        """Mark the directory as a store; no change if it is one.

        Raises:
            UserError: The directory holds other files, or storage failed.
        """
        outputs.claim_output(self._folder, KIND)

    def add(self, data: bytes, answer: Mapping[str, Any]) -> str:
        """Write an image and its row, unless they are in the store; return the `image_id` of the stored file.

        Both are on the disk, or in the bucket, when this returns.

        Args:
            data: Bytes of the image as they were sent.
            answer: Columns of `SCHEMA` of the graded image.

        Raises:
            NotKept: The store is full, or the header of a DICOM file declares that it shows identity.
            ImageError: The image cannot be decoded.
            UserError: The directory holds other files, or storage failed; the image may be there in spite of
                it, and may be added again.
        """
        if declares_identity(data):
            raise NotKept("identifying")
        stripped, suffix = strip_metadata(data)
        digest = sha256(stripped).hexdigest()
        stored_id = image_id(digest)
        row_file = storage.join(self._folder, RESULTS_FOLDER, f"{stored_id}.parquet")
        if not self._has_space() and not storage.exists(row_file):
            raise NotKept("store_full")
        uri = storage.join(self._folder, IMAGES_FOLDER, f"{stored_id}{suffix}")
        storage.write(uri, stripped)
        stored = {"uri": uri, "member": None, "location_id": location_id(Location(uri))}
        row = {**answer, **stored, "image_id": stored_id, "sha256": digest}
        # After the image: a row of a killed process always has its image.
        if parquet.create(row_file, pa.Table.from_pylist([row], schema=SCHEMA)):
            with self._lock:
                self._images += 1
        return stored_id

    def _has_space(self) -> bool:
        with self._lock:
            now = self._clock()
            if self._counted_at is None or now - self._counted_at >= _COUNT_AGAIN_S:
                self.claim()
                self._images = len(_row_files(self._folder))
                self._counted_at = now
            return self._images < self._max_images


class StoreReader:
    """Reads the rows of a store to which endpoints add; each file once.

    Args:
        folder: Directory of the store, local or `s3://`.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.absolute(folder)
        self._rows = SCHEMA.empty_table()

    def read(self) -> pa.Table:
        """Read the rows of the images that are in the store now, the oldest first.

        Raises:
            UserError: Storage failed, or a file is not a row of a store.
        """
        names = _row_files(self._folder)
        held = pa.array([name.removesuffix(".parquet") for name in names], pa.string())
        rows = self._rows.filter(pc.is_in(self._rows["image_id"], held))
        known = {f"{stored_id}.parquet" for stored_id in rows["image_id"].to_pylist()}
        with ThreadPoolExecutor(_READS) as pool:
            files = [storage.join(self._folder, RESULTS_FOLDER, name) for name in names if name not in known]
            new = [table for table in pool.map(_read_row, files) if table is not None]
        try:
            rows = pa.concat_tables([rows, *new], promote_options="default").combine_chunks()
        except pa.ArrowException as error:
            raise UserError(
                f"{self._folder} has a file that is not a result row ({error}); move it elsewhere"
            ) from error
        self._rows = rows.sort_by("graded_at")
        return self._rows


def is_store(folder: str) -> bool:
    """Whether a directory is the store of an endpoint, by its marker."""
    return outputs.kind_of(folder) == KIND


def remove_images(folder: str, image_ids: Sequence[str]) -> Iterator[str]:
    """Remove images and their rows from a store; yield the id of each that was removed.

    Files that a killed writer left are removed, too.

    Raises:
        UserError: The directory is not a store, an id is not in it, or storage failed. Nothing is removed if
            an id is unknown.
    """
    folder = storage.absolute(folder)
    if not is_store(folder):
        raise UserError(f"{folder} is not a store of an endpoint; give the folder of scalp serve --store")
    files: dict[str, list[str]] = {}
    for file in storage.walk(folder):
        if match := _OF_IMAGE.search(file.uri):
            files.setdefault(match[1], []).append(file.uri)
    for stored_id in image_ids:
        if stored_id not in files:
            raise UserError(
                f"{folder} has no image {stored_id!r}; kept.image_id of an answer and the audit log have ids"
            )
    for stored_id in image_ids:
        for uri in sorted(files[stored_id], reverse=True):  # the row before the image
            storage.remove_file(uri)
        yield stored_id


def _row_files(folder: str) -> list[str]:
    names = storage.names_in(storage.join(folder, RESULTS_FOLDER))
    return sorted(name for name in names if name.endswith(".parquet") and not name.startswith("."))


def _read_row(uri: str) -> pa.Table | None:
    """Read one file; None if it was removed after it was listed."""
    try:
        return parquet.read(uri)
    except UserError as error:
        if error.__cause__ and storage.is_missing(error.__cause__):
            return None
        raise
