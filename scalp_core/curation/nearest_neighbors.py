"""Nearest neighbors by features: the images whose features point in the most similar direction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class NearestNeighbors:
    """Find the nearest images of each query among pieces of other images, in bounded memory.

    The similarity is the cosine of the angle between features.

    Args:
        ids: Identifiers of the queries; an image is not a neighbor of itself.
        features: float (Q, D), features of the queries.
        count: Most neighbors per query.
    """

    def __init__(self, ids: Sequence[str], features: np.ndarray, count: int) -> None:
        self._ids = np.array(ids, dtype=object)
        self._features = normalize_features(features)
        self._count = count
        self._similarities = np.zeros((len(self._ids), 0), np.float32)
        self._neighbors = np.zeros((len(self._ids), 0), dtype=object)

    def add(self, ids: Sequence[str], features: np.ndarray) -> None:
        """Compare the queries with a piece of the other images: N identifiers, and features float (N, D)."""
        others = np.array(ids, dtype=object)
        similarities = self._features @ normalize_features(features).T
        similarities[self._ids[:, None] == others[None, :]] = -np.inf
        nearest = _largest(similarities, self._count)
        # The nearest of this piece, among the nearest of the earlier ones.
        similarities = np.hstack([self._similarities, np.take_along_axis(similarities, nearest, axis=1)])
        neighbors = np.hstack([self._neighbors, others[nearest]])
        kept = _largest(similarities, self._count)
        self._similarities = np.take_along_axis(similarities, kept, axis=1)
        self._neighbors = np.take_along_axis(neighbors, kept, axis=1)

    def find(self) -> list[list[str]]:
        """Return the identifiers of the neighbors of each query, the nearest first."""
        order = np.argsort(-self._similarities, axis=1, kind="stable")
        similarities = np.take_along_axis(self._similarities, order, axis=1)
        neighbors = np.take_along_axis(self._neighbors, order, axis=1)
        return [list(row[valid]) for row, valid in zip(neighbors, np.isfinite(similarities), strict=True)]


def normalize_features(features: np.ndarray) -> np.ndarray:
    """Scale each row of features (N, D) to length 1, float32; a row of zeros stays."""
    features = np.asarray(features, np.float32)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, lengths, out=np.zeros_like(features), where=lengths > 0)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices (N, count or fewer) of the largest values of each row (N, M), in any order."""
    count = min(count, values.shape[1])
    return np.argpartition(-values, count - 1, axis=1)[:, :count] if count else values[:, :0].astype(int)
