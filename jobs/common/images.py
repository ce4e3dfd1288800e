"""Load images in loading tasks: fetch and decode. Imports no module that is slow to load."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core.datasets import locations as datasets_locations
from scalp_core.datasets.locations import LOCATION_COLUMNS, Location, location_of
from scalp_core.errors import ImageError, UserError
from scalp_core.images import statistics as image_statistics
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Decoded, Preprocess, decode

_FETCHES = 8

Columns = dict[str, np.ndarray]

logger = logging.getLogger(__name__)


def select_locations(table: pa.Table, *others: str) -> pa.Table:
    """Select the columns of a manifest that locate its images, and `others`."""
    return table.select([name for name in table.column_names if name in (*LOCATION_COLUMNS, *others)])


def without_nulls(table: pa.Table) -> pa.Table:
    """Replace null members and places by "" or -1: NumPy would change the type of columns with nulls."""
    for name in set(table.column_names) & set(LOCATION_COLUMNS):
        column = table[name]
        if pa.types.is_integer(column.type):
            filled = pc.fill_null(column, -1)
        else:
            filled = pc.fill_null(column.cast(pa.string()), "")
        table = table.set_column(table.column_names.index(name), name, filled)
    return table


def to_columns(table: pa.Table) -> Columns:
    """Convert a table to arrays by column, as Ray Data passes them."""
    table = without_nulls(table)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


class LoadImages:
    """Add decoded pixels to rows of `LOCATION_COLUMNS`, or the error of an image that cannot be decoded.

    Adds `image` uint8 (size, size, 3) and `statistics` float32 (K,) of `images.statistics.measure`, both
    zeros if it failed, and the strings `sha256` (of the file), `notes` (separated by spaces), `error_code`
    and `error`, the last two empty if it did not fail.

    Args:
        spec: Preprocessing of the images.
        measured: Whether to add `statistics`.
    """

    def __init__(self, spec: Preprocess, measured: bool = True) -> None:
        self._spec = spec
        self._measured = measured
        self._blank = Decoded(np.zeros((spec.size, spec.size, 3), np.uint8), ())

    def __call__(self, batch: Columns) -> Columns:
        names = [name for name in LOCATION_COLUMNS if name in batch]
        locations = [
            location_of(dict(zip(names, row, strict=True)))
            for row in zip(*(batch[name] for name in names), strict=True)
        ]
        return self.decoded(batch, fetch(locations), [location.sha256 for location in locations])

    def decoded(
        self, batch: Columns, files: list[bytes | ImageError], hashes: Sequence[str | None] | None = None
    ) -> Columns:
        """Add the columns to rows whose files, or errors, were fetched before; `hashes`: known SHA-256."""
        rows = list(map(self._decode, files, hashes or [None] * len(files)))
        decoded, statistics, digests, errors = zip(*rows, strict=True)
        if self._measured:
            batch = batch | {"statistics": np.stack(statistics)}
        return batch | {
            "image": np.stack([image.pixels for image in decoded]),
            "notes": np.array([" ".join(image.notes) for image in decoded], dtype=object),
            "sha256": np.array(digests, dtype=object),
            "error_code": np.array([error.code if error else "" for error in errors], dtype=object),
            "error": np.array([error.message if error else "" for error in errors], dtype=object),
        }

    def _decode(
        self, data: bytes | ImageError, known: str | None
    ) -> tuple[Decoded, np.ndarray | None, str, ImageError | None]:
        """Pixels, statistics and hash of one file, blank if it failed. Any exception is an image error."""
        blank = np.zeros(len(image_statistics.STATISTICS), np.float32) if self._measured else None
        if isinstance(data, ImageError):
            return self._blank, blank, "", data
        digest = known or sha256(data).hexdigest()
        try:
            decoded = decode(data, self._spec)
            return decoded, image_statistics.measure(decoded.pixels) if self._measured else None, digest, None
        except ImageError as error:
            return self._blank, blank, digest, error
        except Exception as error:
            logger.warning("decoding an image raised %r", error, exc_info=error)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return self._blank, blank, digest, ImageError("internal_error", reason)


class LoadForTraining:
    """Load `image` and `label` alone; an image that cannot be read any more is a `UserError`."""

    def __init__(self, spec: Preprocess) -> None:
        self._load = LoadImages(spec, measured=False)

    def __call__(self, batch: Columns) -> Columns:
        loaded = self._load(batch)
        check_read(loaded)
        return {"image": loaded["image"], "label": loaded["label"]}


def check_read(loaded: Columns) -> None:
    """Refuse a batch of `LoadImages` in which an image failed.

    Raises:
        UserError: An image failed; names the first one.
    """
    columns = (loaded[name] for name in ("error_code", "error", "uri", "member"))
    for code, error, uri, member in zip(*columns, strict=True):
        if code:
            raise unreadable(Location(uri, member or None), ImageError(code, error))


def gather_columns(batches: Iterable[Columns], image_ids: Sequence[str]) -> Columns:
    """Concatenate batches of rows that arrive in any order, and order the rows by `image_ids`.

    Raises:
        UserError: An image failed, so that a result of all rows is impossible.
    """
    checked = []
    for batch in batches:
        check_read(batch)
        checked.append(batch)
    columns = {name: np.concatenate([batch[name] for batch in checked]) for name in checked[0]}
    place = {image_id: index for index, image_id in enumerate(columns["image_id"])}
    if len(columns["image_id"]) != len(image_ids) or set(place) != set(image_ids):
        raise RuntimeError(f"{len(columns['image_id'])} answers for {len(image_ids)} images")
    order = [place[image_id] for image_id in image_ids]
    return {name: values[order] for name, values in columns.items()}


def unreadable(location: Location, error: ImageError) -> UserError:
    """Error of an image that could be read when the data was prepared."""
    what = "has changed since it was prepared" if error.code == "changed" else "cannot be read any more"
    return UserError(
        f"{location} {what} ({error}); restore it, or prepare the source again into another directory"
    )


def fetch(locations: list[Location], parallel: int = _FETCHES) -> list[bytes | ImageError]:
    """Read the files of `locations` in parallel; members of one archive together, to open it once."""
    chunks: dict[str | int, list[int]] = {}
    for index, location in enumerate(locations):
        chunks.setdefault(index if location.member is None else location.uri, []).append(index)
    files: list[bytes | ImageError] = [b""] * len(locations)

    def read(chunk: list[int]) -> None:
        chunk.sort(key=lambda index: locations[index].place or ())  # adjacent members: one request
        data = datasets_locations.read_images([locations[index] for index in chunk], MAX_BYTES)
        for index, value in zip(chunk, data, strict=True):
            files[index] = value

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(read, chunks.values()))
    return files
