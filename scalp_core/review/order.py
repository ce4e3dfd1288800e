"""Order images by the expected gain of their answers: uncertain ones that look different.

BADGE (Ash et al. 2020, Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds, ICLR): an
answer changes the last layer of the model by the gradient of its loss. The gradient is large for an uncertain
image, and points in the same direction for images that look alike. Large gradients in different directions
come first.
"""

from __future__ import annotations

import numpy as np

from scalp_core.curation.nearest_neighbors import normalize_features

MOST_COMPARED = 5_000
"""Most images of a review that are compared: the least certain ones. The others follow by their margin."""

_COMPONENTS = 64  # of the features: 5,000 images are ordered in 2 s of one core (AMD EPYC, 2026-11-30)
_FIRST = 1e9  # weight of the center that is drawn first


def order_by_gain(features: np.ndarray, probabilities: np.ndarray, seed: int = 0) -> np.ndarray:
    """Order images by what their answers would change in the model, in addition to the answers before.

    Each image is drawn with a probability in proportion to the squared distance of its gradient to the
    nearest one before it (k-means++).

    Args:
        features: float (N, D), inputs of the last layer.
        probabilities: float (N, C), answers of the model.
        seed: Seed of the draws; the same values and seed make the same order on one machine.

    Returns:
        int (N,), indices of the images. The first n are the choice for a batch of n answers. Copies of
        earlier images, and images of which the model is certain, come last.
    """
    from sklearn.cluster import kmeans_plusplus  # slow to import
    from sklearn.decomposition import PCA

    if len(features) < 2:
        return np.arange(len(features))
    likeliest = np.eye(probabilities.shape[1])[probabilities.argmax(axis=1)]
    components = min(_COMPONENTS, len(features) - 1, features.shape[1])
    looks = PCA(components, svd_solver="randomized", random_state=seed)
    with np.errstate(invalid="ignore"):  # equal images have no variance
        reduced = looks.fit_transform(normalize_features(features)).astype(float)
    inputs = np.hstack([reduced, np.ones((len(reduced), 1))])  # with that of the bias
    # Of the loss, if the likeliest grade is true.
    gradients = np.einsum("nc,nd->ncd", probabilities - likeliest, inputs).reshape(len(inputs), -1)
    # The first center is of an answer that changes nothing, so that each draw prefers large gradients.
    centers = np.vstack([np.zeros_like(gradients[:1]), gradients])
    weights = np.r_[_FIRST * len(gradients), np.ones(len(gradients))]
    _, drawn = kmeans_plusplus(
        centers, len(centers), sample_weight=weights, random_state=seed, n_local_trials=1
    )
    # Without distance, such as of equal images, the same index is drawn again.
    return np.array(list(dict.fromkeys([*(drawn[drawn > 0] - 1).tolist(), *range(len(gradients))])))
