"""Groups of images that must stay in one split: of one microscope or session, or showing the same.

An image that many microscopes have (a test card, a "no signal" frame) does not show that they belong
together. It joins no groups, and is reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_JOINED = 3
"""An image that shows the same in more microscopes, sessions or groups of a table than these joins none."""

_EXAMPLES = 5


class Joint(NamedTuple):
    """Images that show the same in several microscopes, sessions or groups of a table.

    Args:
        row: One of the images.
        images: How many they are.
        joined: In how many microscopes, sessions or groups they are.
    """

    row: int
    images: int
    joined: int


class Groups(NamedTuple):
    """Groups of images.

    Args:
        of_row: Int (N,), the group of each image.
        joints: Joints that were applied, those of the largest groups first; a few.
        refused: All joints that were not applied.
    """

    of_row: np.ndarray
    joints: list[Joint]
    refused: list[Joint]


def group_images(keys: Iterable[np.ndarray], same: np.ndarray, is_flat: np.ndarray) -> Groups:
    """Group images by keys, and by what they show where that joins few groups.

    Args:
        keys: Uint64 (N,) each: microscope, session, group of a table; 0 for none.
        same: Uint64 (N,), images with one number show the same; 0 for none.
        is_flat: Bool (N,), images of one color.
    """
    keys = list(keys)
    base = unite(keys, len(same))
    in_base = np.logical_or.reduce([key != 0 for key in keys]) if keys else np.zeros(len(same), bool)
    shared, first = _shared_rows(same)
    number = np.unique(first, return_inverse=True)[1]  # of the image that is shown
    images = np.bincount(number)
    known = in_base[shared]
    places = np.unique(np.stack([number[known], base[shared][known]], axis=1), axis=0)[:, 0]
    joined = np.bincount(places, minlength=len(images))
    flat = np.bincount(number, is_flat[shared], len(images)) > 0
    is_refused = (joined > MAX_JOINED) | (flat & (joined > 1))
    applied = ~is_refused[number]
    groups = _joined(base, first[applied], shared[applied])
    rows = np.zeros(len(images), np.int64)
    rows[number] = first
    sizes = np.bincount(groups)
    told = np.flatnonzero(~is_refused & (joined > 1))
    told = told[np.argsort(-sizes[groups[rows[told]]], kind="stable")][:_EXAMPLES]
    refused = np.flatnonzero(is_refused)
    refused = refused[np.argsort(-joined[refused], kind="stable")]

    def as_joints(numbers: np.ndarray) -> list[Joint]:
        return [Joint(int(rows[one]), int(images[one]), int(joined[one])) for one in numbers]

    return Groups(groups, as_joints(told), as_joints(refused))


def unite(keys: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Groups of rows that any chain of shared keys joins; int (rows,).

    Args:
        keys: Uint64 (rows,) each; rows with the same number share the key, 0 is no key.
        rows: Number of rows.
    """
    groups = np.arange(rows)
    for key in keys:
        shared, first = _shared_rows(key)
        groups = _joined(groups, first, shared)
    return groups


def number_components(pairs: np.ndarray, rows: int) -> np.ndarray:
    """Numbers from 1 for rows that chains of pairs join, 0 for rows in no pair; uint64 (rows,)."""
    numbers = np.zeros(rows, np.uint64)
    involved, index = np.unique(pairs, return_inverse=True)
    joined = _joined(np.arange(len(involved)), *index.reshape(pairs.shape).T)
    numbers[involved] = joined.astype(np.uint64) + np.uint64(1)
    return numbers


def _shared_rows(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose key another row has too, and the first row with that key, for each."""
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


def _joined(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Groups after joining those of some rows with those of others; numbered from 0."""
    ends = groups[left], groups[right]
    differ = ends[0] != ends[1]
    if not differ.any():
        return groups
    nodes = int(groups.max()) + 1
    data = np.ones(int(differ.sum()), np.int8), (ends[0][differ], ends[1][differ])
    return connected_components(coo_array(data, shape=(nodes, nodes)), directed=False)[1][groups]
