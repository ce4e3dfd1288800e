"""Features of the images of a queue, by the model that graded them, stored in the directory of the label log.

LABELS/features/KEY/HASH.parquet    `image_id` and `features` of up to 4,096 images

KEY names the weights and the preprocessing: features of another model have another folder. Files are written
atomically and not changed, so a stopped command resumes, and several may compute the same features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalp_core import storage
from scalp_core.bundles.contract import BundleSpec
from scalp_core.curation.nearest_neighbors import normalize_features
from scalp_core.storage import parquet

FEATURES_FOLDER = "features"
PIECE = 4_096
"""Images per file; with 2,048 features, 32 MiB in memory."""

_HASH_DIGITS = 20


class FeatureFiles:
    """The features that one model computed of the images of a queue.

    Args:
        spec: Contract of the bundle.
        labels: Directory of the label log.

    Raises:
        UserError: Storage failed.
    """

    def __init__(self, spec: BundleSpec, labels: str) -> None:
        key = hash_words([spec.weights_sha256, spec.preprocess.model_dump_json()])
        self._folder = storage.join(labels, FEATURES_FOLDER, key)
        self._places: dict[str, str] = {}  # file of each image
        for name in sorted(storage.names_in(self._folder)):
            uri = storage.join(self._folder, name)
            self._places |= dict.fromkeys(parquet.read(uri, ["image_id"])["image_id"].to_pylist(), uri)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._places

    def add(self, image_ids: Sequence[str], features: np.ndarray) -> None:
        """Store the features (N, D) of some images, scaled to length 1, in half precision.

        Raises:
            UserError: Storage failed.
        """
        uri = storage.join(self._folder, f"{hash_words(image_ids)}.parquet")
        parquet.write(uri, encode_features(image_ids, features))
        self._places |= dict.fromkeys(image_ids, uri)

    def read(self, image_ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Read the features of those of the images that have some: their ids, and float32 (N, D).

        Raises:
            UserError: Storage failed.
        """
        known = [image_id for image_id in image_ids if image_id in self._places]
        if not known:
            return [], np.zeros((0, 0), np.float32)
        wanted = pa.array(known, pa.string())
        files = sorted({self._places[image_id] for image_id in known})
        # One file at a time: all files of a large log would take gigabytes.
        tables = (parquet.read(uri) for uri in files)
        stored, features = decode_features(
            pa.concat_tables(table.filter(pc.is_in(table["image_id"], wanted)) for table in tables)
        )
        places = {image_id: place for place, image_id in enumerate(stored)}
        return known, features[[places[image_id] for image_id in known]]


def encode_features(image_ids: Sequence[str], features: np.ndarray) -> pa.Table:
    """Make a table of features (N, D) in half precision, whose length is 1."""
    halves = normalize_features(features).astype(np.float16)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(halves.ravel()), halves.shape[1])
    return pa.table({"image_id": pa.array(list(image_ids), pa.string()), "features": lists})


def decode_features(table: pa.Table) -> tuple[list[str], np.ndarray]:
    """Return the ids and float32 (N, D) of a table of `encode_features`."""
    ids = table["image_id"].to_pylist()
    values = table["features"].combine_chunks().flatten().to_numpy()
    return ids, values.reshape(len(ids), -1).astype(np.float32)


def pieces(rows: pa.Table) -> Iterator[pa.Table]:
    """Yield slices of at most `PIECE` rows, whose features have a file."""
    for start in range(0, rows.num_rows, PIECE):
        yield rows.slice(start, PIECE)


def hash_words(words: Iterable[str]) -> str:
    """Hash words to a name of a file or folder."""
    return sha256("\n".join(words).encode()).hexdigest()[:_HASH_DIGITS]
