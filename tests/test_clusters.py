"""Subclasses: by direction, inside a label, the same for the same seed, fewer where there is less."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from dasc.model.clusters import concentration, subclasses


def bundles(number: int = 30, seed: int = 0):
    """Three directions per label, each at very different lengths."""
    rng = np.random.default_rng(seed)
    directions = np.eye(6)[rng.integers(0, 6, number * 6)]
    truth = directions.argmax(axis=1)
    features = (directions + 0.05 * rng.normal(size=directions.shape)) * rng.uniform(0.1, 50, (len(directions), 1))
    return features, truth // 3, truth


def test_finds_directions_whatever_the_length():
    features, labels, truth = bundles()
    found = subclasses(features, labels, 3, seed=0)
    assert len({(one, other) for one, other in zip(found, truth, strict=True)}) == 6
    assert set(found[labels == 0]) == {0, 1, 2} and set(found[labels == 1]) == {3, 4, 5}
    assert np.array_equal(found, subclasses(features, labels, 3, seed=0))


def test_fewer_patches_than_subclasses():
    features = np.array([[1.0, 0], [0, 1], [2, 0], [1, 1]])
    found = subclasses(features, np.array([0, 0, 0, 1]), 4, seed=0)
    assert found[0] == found[2] != found[1] and found[3] == 2


def test_many_patches_are_clustered_as_well_as_few(monkeypatch):
    features, labels, _ = bundles(200)
    whole = subclasses(features, labels, 3, seed=0)
    monkeypatch.setattr("dasc.model.clusters.ROUGH_PATCHES", 50)  # of some 600 per label
    assert adjusted_rand_score(whole, subclasses(features, labels, 3, seed=0)) == 1


@pytest.mark.filterwarnings("error")
def test_rare_features_among_many_patches(monkeypatch):
    monkeypatch.setattr("dasc.model.clusters.ROUGH_PATCHES", 10)
    features = np.eye(4)[np.r_[np.zeros(50, int), np.ones(50, int), 2, 3]]
    found = subclasses(features, np.zeros(len(features), int), 5, seed=0)
    assert sorted(np.bincount(found)) == [1, 1, 50, 50]


def test_concentration_is_the_formula():
    features = np.array([[3.0, 0], [0, 1], [0, 2]])
    phi = concentration(features, np.array([1, 1, 0]))
    distance = np.linalg.norm(np.array([1, 0]) - np.array([0.5, 0.5]))
    assert phi == pytest.approx([0, distance / np.log(12)])
