"""Near-duplicates: the same picture saved, resized or toned again; its bytes differ, and so does their hash.

A 64-bit perceptual hash finds candidates, the correlation of two small grey pictures decides. docs/data.md
has the measurements behind the two limits.
"""

from __future__ import annotations

from collections.abc import Callable

import imagehash
import numpy as np
from PIL import Image

from scalp_core.codecs import read_picture

MAX_BITS = 4
MIN_CORRELATION = 0.95

_SIDE = 16
THUMBNAIL_BYTES = _SIDE * _SIDE

# Hashes within MAX_BITS agree in at least one of so many bands (pigeonhole).
_BANDS = np.array_split(np.arange(64, dtype=np.uint64), MAX_BITS + 1)
_PAIRS_AT_ONCE = 1_000_000


def signature(data: bytes) -> tuple[int, bytes]:
    """Perceptual hash (64 bits) and grey thumbnail, uint8 (16, 16) as bytes, of a file's picture.

    Raises:
        ImageError: the picture cannot be decoded; see `codecs.read_picture`.
    """
    # The hash looks at 32x32 pixels: an eighth of a photograph is plenty.
    grey = Image.fromarray(read_picture(data, lambda _width, _height: (32, 32)).pixels).convert("L")
    thumbnail = grey.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return int(str(imagehash.phash(grey)), 16), thumbnail.tobytes()


def candidates(hashes: np.ndarray) -> np.ndarray:
    """Pairs of positions whose hashes differ in `MAX_BITS` at most; int64 (P, 2), first < second.

    Of many equal hashes each is paired with the first of them alone, so that a picture that was copied a
    thousand times gives a thousand pairs and not half a million.

    Args:
        hashes: uint64 (N,).
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    pairs = [np.stack([first[inverse[copies]], copies], axis=1)]
    for band in _BANDS:
        key = (distinct >> band[0]) & np.uint64((1 << len(band)) - 1)
        pairs += [first[pair] for pair in _near_in_band(distinct, np.argsort(key, kind="stable"), key)]
    found = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(found, axis=0)


def _near_in_band(hashes: np.ndarray, order: np.ndarray, key: np.ndarray) -> list[np.ndarray]:
    """Pairs among those that share a band's value, near enough over all bits."""
    sizes = np.unique(key[order], return_counts=True)[1]
    ends = np.repeat(np.cumsum(sizes), sizes)
    partners = ends - np.arange(len(order)) - 1  # each with those after it in its bucket
    near, start = [], 0
    while start < len(order):
        stop = start + max(1, int(np.searchsorted(np.cumsum(partners[start:]), _PAIRS_AT_ONCE)))
        counts = partners[start:stop]
        left = np.repeat(np.arange(start, start + len(counts)), counts)
        offset = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        pair = np.stack([order[left], order[left + 1 + offset]], axis=1)
        bits = np.bitwise_count(hashes[pair[:, 0]] ^ hashes[pair[:, 1]])
        near.append(pair[bits <= MAX_BITS])
        start = stop
    return near


def confirmed(pairs: np.ndarray, thumbnails: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Those of the pairs whose thumbnails correlate; bool (P,).

    Args:
        pairs: int (P, 2).
        thumbnails: gives uint8 (n, 256) for n positions.
    """
    kept = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 100_000):
        left, right = (_standard(thumbnails(side)) for side in pairs[start : start + 100_000].T)
        kept[start : start + 100_000] = (left * right).mean(axis=1) >= MIN_CORRELATION
    return kept


def _standard(thumbnails: np.ndarray) -> np.ndarray:
    values = thumbnails.astype(np.float32)
    spread = values.std(axis=1, keepdims=True)
    # A picture of one colour is like every other of one colour, and like nothing else.
    flat = np.where(spread < 1, 1.0, 0.0)
    return (values - values.mean(axis=1, keepdims=True) + flat) / np.where(spread < 1, 1.0, spread)
