"""Group images that must stay in one split: same microscope, session or group, or near-duplicates.

An image that is the same in many microscopes (a test card, a "no signal" frame) is not evidence that their
images belong together. It joins no groups, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_JOINED = 3
"""An image that is the same in more microscopes, sessions or groups than this joins none of them."""


class Groups(NamedTuple):
    """Groups of images."""

    of_row: np.ndarray  # int (N,), group of each image
    # Int (R, 3), images in too many groups to join them: the row of one of them, their number, and the number
    # of microscopes, sessions or groups with such an image
    refused: np.ndarray


def group_images(keys: Iterable[np.ndarray], same: np.ndarray, is_flat: np.ndarray) -> Groups:
    """Group images by keys, and join groups that share the same image if these are few.

    Args:
        keys: Uint64 (N,) each: microscope, session, group of a table; 0 is a missing key.
        same: Uint64 (N,), equal for images that show the same; 0 for an image without copies.
        is_flat: Bool (N,), images of one color.
    """
    keys = list(keys)
    base = unite(keys, len(same))
    in_base = np.logical_or.reduce([key != 0 for key in keys]) if keys else np.zeros(len(same), bool)
    shared, first = _shared_rows(same)
    number = np.unique(first, return_inverse=True)[1]  # number of the image
    images = np.bincount(number)
    known = in_base[shared]
    places = np.unique(np.stack([number[known], base[shared][known]], axis=1), axis=0)[:, 0]
    joined = np.bincount(places, minlength=len(images))
    flat = np.bincount(number, is_flat[shared], len(images)) > 0
    is_refused = (joined > MAX_JOINED) | (flat & (joined > 1))
    applied = ~is_refused[number]
    groups = _join(base, first[applied], shared[applied])
    row = np.zeros(len(images), np.int64)
    row[number] = first
    refused = np.flatnonzero(is_refused)
    refused = refused[np.argsort(-joined[refused], kind="stable")]
    return Groups(groups, np.stack([row, images, joined], axis=1)[refused])


def unite(keys: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Group rows that are connected by chains of shared keys; int (rows,).

    Args:
        keys: Uint64 (rows,) each; rows with the same number share the key, 0 is a missing key.
        rows: Number of rows.
    """
    groups = np.arange(rows)
    for key in keys:
        shared, first = _shared_rows(key)
        groups = _join(groups, first, shared)
    return groups


def number_components(pairs: np.ndarray, rows: int) -> np.ndarray:
    """Number connected components of pairs from 1, uint64 (rows,); rows without a pair get 0."""
    numbers = np.zeros(rows, np.uint64)
    involved, index = np.unique(pairs, return_inverse=True)
    joined = _join(np.arange(len(involved)), *index.reshape(pairs.shape).T)
    numbers[involved] = joined.astype(np.uint64) + np.uint64(1)
    return numbers


def _shared_rows(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find rows that share their key with another row, and the first row with each such key."""
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    is_same = sorted_key[1:] == sorted_key[:-1]
    is_shared = np.zeros(len(key), bool)
    is_shared[1:] |= is_same
    is_shared[:-1] |= is_same
    is_shared &= sorted_key != 0
    rows, sorted_key = order[is_shared], sorted_key[is_shared]
    del order
    is_first = np.diff(sorted_key, prepend=~sorted_key[:1]) != 0
    return rows, rows[is_first][np.cumsum(is_first) - 1]


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Join the groups of rows `left` with those of rows `right`; groups are numbered from 0."""
    ends = groups[left], groups[right]
    differ = ends[0] != ends[1]
    if not differ.any():
        return groups
    nodes = int(groups.max()) + 1
    data = np.ones(int(differ.sum()), np.int8), (ends[0][differ], ends[1][differ])
    return connected_components(coo_array(data, shape=(nodes, nodes)), directed=False)[1][groups]
