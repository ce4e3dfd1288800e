"""Find near-duplicates: the same image after saving, resizing, toning, mirroring or rotating.

A 64-bit perceptual hash of the field of view finds candidates. The aligned correlation of the texture inside
the field confirms them. docs/data.md has the measurements behind the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from scalp_core.images.signature import MIDDLE, SIDE

MAX_BITS = 6
MIN_CORRELATION = 0.85

MAX_PARTNERS = 128
"""Bound on the work per image: neighbors in a crowded bucket, and rejected candidates."""

# Hashes within MAX_BITS agree in at least 3 of 9 bands (pigeonhole). A bucket of three bands has 21 bits, so
# ten million distinct hashes have five neighbors each instead of thousands.
_BANDS = 9
_AGREEING = 3
_BAND_BITS = np.array_split(np.arange(64, dtype=np.uint64), _BANDS)
_BAND_MASKS = [np.bitwise_or.reduce(np.uint64(1) << bits) for bits in _BAND_BITS]
_INDEX_BITS = np.uint64(40)  # three bands take 22 bits at most, which leaves 42 for the index of a hash
_ROWS_AT_ONCE = 200_000

_MAX_LEADERS = 16
_SHIFT = 2  # pixels of a thumbnail by which two fields of view may differ
_ALIGNABLE = 0.2  # below this correlation no shift helps
_MIN_OVERLAP = 0.75
_PAIRS_AT_ONCE = 10_000


class NearDuplicates(NamedTuple):
    """Near-duplicates among images."""

    pairs: np.ndarray  # int64 (P, 2), positions of two images that show the same, first < second
    # Int64 (C,), positions of images that look like so many others that not all were compared
    crowded: np.ndarray


def find_pairs(
    hashes: np.ndarray, turned_hashes: np.ndarray, thumbnails: Callable[[np.ndarray], np.ndarray]
) -> NearDuplicates:
    """Find images that show the same, in work that is linear in their number.

    An image is paired only with the first image that shows the same, so that a thousand copies give a
    thousand pairs instead of half a million.

    Args:
        hashes: Perceptual hashes, uint64 (N,).
        turned_hashes: Hashes that mirroring and rotation keep, uint64 (N,).
        thumbnails: Returns uint8 (n, 1024) for n sorted distinct positions.
    """
    plain = _Search(thumbnails, _TURNS[:1])
    plain.run(hashes)
    turned = _Search(thumbnails, _TURNS)
    turned.run(turned_hashes)
    pairs = np.concatenate([np.sort(pair, axis=1) for pair in (*plain.pairs, *turned.pairs)])
    return NearDuplicates(
        np.unique(pairs, axis=0), np.unique(np.concatenate([*plain.crowded, *turned.crowded]))
    )


class _Search:
    """Candidates by one hash, each confirmed before it is kept."""

    def __init__(self, thumbnails: Callable[[np.ndarray], np.ndarray], turns: list[_Turn]) -> None:
        self._thumbnails = thumbnails
        self._turns = turns
        self.pairs = [np.zeros((0, 2), np.int64)]
        self.crowded = [np.zeros(0, np.int64)]

    def run(self, hashes: np.ndarray) -> None:
        leaders = self._pair_equal(hashes)
        rejected = np.zeros(len(hashes), np.int32)
        hashes = hashes[leaders]
        for bands in combinations(range(_BANDS), _AGREEING):
            for pairs in self._near_in_bands(hashes, leaders, bands):
                is_crowded = rejected[pairs] >= MAX_PARTNERS
                self.crowded.append(np.unique(pairs[is_crowded]))
                open_pairs = pairs[~is_crowded.any(axis=1)]
                failed = open_pairs[~self._confirm(open_pairs)]
                np.add.at(rejected, failed, 1)

    def _pair_equal(self, hashes: np.ndarray) -> np.ndarray:
        """Pair images of equal hash with the first that shows the same; returns positions of the first."""
        order = np.argsort(hashes, kind="stable")
        leaders = []
        for _ in range(_MAX_LEADERS):
            starts = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
            leaders.append(order[starts])
            of_row = np.repeat(leaders[-1], np.diff(starts, append=len(order)))
            others = order != of_row
            pairs = np.stack([of_row[others], order[others]], axis=1)
            order = pairs[~self._confirm(pairs), 1]
            if not len(order):
                break
        self.crowded.append(order)
        return np.concatenate(leaders)

    def _near_in_bands(
        self, hashes: np.ndarray, positions: np.ndarray, bands: tuple[int, ...]
    ) -> Iterator[np.ndarray]:
        """Yield pairs that agree in these bands and in no earlier one, so that each pair comes once."""
        order = _order_by_bands(hashes, bands)
        full = hashes[order]
        own = np.bitwise_or.reduce([_BAND_MASKS[band] for band in bands])
        earlier = [_BAND_MASKS[band] for band in range(bands[-1]) if band not in bands]
        for start in range(0, len(full), _ROWS_AT_ONCE):
            active = np.arange(start, min(start + _ROWS_AT_ONCE, len(full)))
            for step in range(1, MAX_PARTNERS + 1):
                active = active[: np.searchsorted(active, len(full) - step)]
                differing = full[active] ^ full[active + step]
                agreeing = np.flatnonzero((differing & own) == 0)
                active, differing = active[agreeing], differing[agreeing]
                if not len(active):
                    break
                near = np.flatnonzero(np.bitwise_count(differing) <= MAX_BITS)
                differing = differing[near]
                is_new = differing != 0
                for mask in earlier:
                    is_new &= (differing & mask) != 0
                if is_new.any():
                    left = active[near[is_new]]
                    yield positions[np.stack([order[left], order[left + step]], axis=1)]
            else:
                self.crowded.append(positions[order[active]])

    def _confirm(self, pairs: np.ndarray) -> np.ndarray:
        """Confirm pairs by their thumbnails, and collect them; bool (P,)."""
        is_same = np.zeros(len(pairs), bool)
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            chunk = pairs[start : start + _PAIRS_AT_ONCE]
            distinct, index = np.unique(chunk, return_inverse=True)
            textures = self._thumbnails(distinct).reshape(-1, SIDE, SIDE)
            left, right = index.reshape(chunk.shape).T
            is_same[start : start + len(chunk)] = shows_same(textures[left], textures[right], self._turns)
        self.pairs.append(pairs[is_same])
        return is_same


def _order_by_bands(hashes: np.ndarray, bands: tuple[int, ...]) -> np.ndarray:
    """Indices that sort hashes by some bands, int64 (M,), by sorting one array of bits and index in place."""
    keys = np.zeros(len(hashes), np.uint64)
    for band in bands:
        keys <<= np.uint64(len(_BAND_BITS[band]))
        keys |= (hashes & _BAND_MASKS[band]) >> _BAND_BITS[band][0]
    keys <<= _INDEX_BITS
    keys |= np.arange(len(hashes), dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << _INDEX_BITS) - np.uint64(1)
    return keys.view(np.int64)


# --- confirmation ------------------------------------------------------------------------------------------

_Turn = Callable[[np.ndarray], np.ndarray]


def _transposed(images: np.ndarray) -> np.ndarray:
    return images.swapaxes(1, 2)


_TURNS: list[_Turn] = [
    lambda images: images,
    lambda images: images[:, :, ::-1],
    lambda images: images[:, ::-1],
    lambda images: images[:, ::-1, ::-1],
    _transposed,
    lambda images: _transposed(images)[:, :, ::-1],
    lambda images: _transposed(images)[:, ::-1],
    lambda images: _transposed(images)[:, ::-1, ::-1],
]


def shows_same(left: np.ndarray, right: np.ndarray, turns: list[_Turn]) -> np.ndarray:
    """Compare textures, uint8 (P, 32, 32), in both fields of view, over turns and small shifts; bool (P,)."""
    correlations = np.stack([_correlation(left, turn(right)) for turn in turns])
    best = correlations.max(axis=0, initial=-1)
    chosen = correlations.argmax(axis=0)
    close = (best >= _ALIGNABLE) & (best < MIN_CORRELATION)
    for number, turn in enumerate(turns):
        rows = np.flatnonzero(close & (chosen == number))
        if len(rows):
            best[rows] = _aligned_correlation(left[rows], turn(right[rows]))
    return best >= MIN_CORRELATION


def _aligned_correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    shifts = product(range(-_SHIFT, _SHIFT + 1), repeat=2)
    moved = [
        _correlation(_shifted(left, down, across), _shifted(right, -down, -across)) for down, across in shifts
    ]
    return np.max(moved, axis=0)


def _shifted(images: np.ndarray, down: int, across: int) -> np.ndarray:
    rows = slice(max(0, down), SIDE + min(0, down))
    return images[:, rows, max(0, across) : SIDE + min(0, across)]


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Correlation where both have a texture; 0 where the fields of view hardly overlap."""
    one, other = left > 0, right > 0
    both = one & other
    overlap = both.sum(axis=(1, 2)) / np.maximum(np.maximum(one.sum(axis=(1, 2)), other.sum(axis=(1, 2))), 1)
    first = np.where(both, left.astype(np.float32) - MIDDLE, np.float32(0))
    second = np.where(both, right.astype(np.float32) - MIDDLE, np.float32(0))
    product, ones, others = (
        np.einsum("pij,pij->p", *factors) for factors in ((first, second), (first, first), (second, second))
    )
    return np.where(overlap >= _MIN_OVERLAP, product / np.sqrt(np.maximum(ones * others, 1e-6)), 0.0)
