"""Nearest neighbors in pieces are those of one comparison with all images."""

from __future__ import annotations

import numpy as np

from scalp_core.curation.nearest_neighbors import NearestNeighbors, normalize_features


def find(ids, queries, others, features, count, piece):
    nearest = NearestNeighbors(ids, queries, count)
    for start in range(0, len(others), piece):
        nearest.add(others[start : start + piece], features[start : start + piece])
    return nearest.find()


def test_pieces_of_any_size_give_the_neighbors_of_one_comparison():
    rng = np.random.default_rng(0)
    queries, features = rng.normal(size=(5, 8)), rng.normal(size=(50, 8)).astype(np.float16)
    ids, others = [f"q{number}" for number in range(5)], [f"t{number}" for number in range(50)]
    order = np.argsort(-(normalize_features(queries) @ normalize_features(features).T), axis=1)
    expected = [[others[place] for place in row[:6]] for row in order]
    for piece in (1, 7, 50):
        assert find(ids, queries, others, features, 6, piece) == expected


def test_the_length_of_features_does_not_matter():
    features = np.array([[3.0, 0.1], [0.1, 0.1]])
    assert find(["q"], np.array([[0.01, 0]]), ["a", "b"], features, 2, 2) == [["a", "b"]]


def test_an_image_is_not_a_neighbor_of_itself():
    features = np.eye(3)
    assert find(["a", "b"], features[:2], ["a", "b", "c"], features, 3, 2) == [["b", "c"], ["a", "c"]]


def test_few_images_give_few_neighbors_and_no_features_are_no_error():
    assert find(["q"], np.ones((1, 2)), ["a"], np.ones((1, 2)), 6, 1) == [["a"]]
    assert find(["q"], np.zeros((1, 2)), ["a"], np.ones((1, 2)), 6, 1) == [["a"]]
    assert NearestNeighbors(["q"], np.ones((1, 2)), 6).find() == [[]]
