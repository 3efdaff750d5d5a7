"""Subclasses of stage 8: clusters of features by direction, inside each label."""

import numpy as np
from sklearn.cluster import KMeans

STARTS = 3  # random starts of k-means
ROUGH = 10  # iterations of every start; the best one goes on
ROUGH_PATCHES = 10_000  # of a label at most, drawn at random, that the starts are tried on; more take longer
ITERATIONS = 100  # of that one at most; features that form no clusters would take many more
SMOOTHING = 10  # patches added to a subclass's size under the logarithm, so that small ones are not all tight


def subclasses(features: np.ndarray, labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Subclass (N,) int of every patch: cosine k-means per label, numbered through, label 0 first.

    On features of length 1 the squared distance of k-means is 2 - 2 cosine. A label with fewer different patches than
    `number` gets as many subclasses as it has.

    Args:
        features: (N, D), not all 0 in any row. labels: (N,) int.
    """
    result = np.empty(len(labels), dtype=np.int64)
    used = 0
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        directions = _normalised(features[members])
        different = np.unique(directions, axis=0)
        clusters = min(number, len(different))
        # drawn from the different ones, so that there are enough for every cluster
        drawn = np.random.default_rng(seed).permutation(different)[: max(ROUGH_PATCHES, clusters)]
        rough = KMeans(clusters, n_init=STARTS, max_iter=ROUGH, random_state=seed).fit(drawn)
        found = KMeans(clusters, init=rough.cluster_centers_, n_init=1, max_iter=ITERATIONS).fit(directions)
        result[members] = used + found.labels_
        used += clusters
    return result


def concentration(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How widely each subclass is spread, phi (S,): mean distance to its centre / log(patches + SMOOTHING).

    Li et al. 2021 (prototypical contrastive learning), equation 12.

    Args:
        features: (N, D). groups: (N,) int in 0..S-1, none of them empty.
    """
    directions = _normalised(features)
    sizes = np.bincount(groups)
    centres = np.stack([directions[groups == group].mean(axis=0) for group in range(len(sizes))])
    distances = np.linalg.norm(directions - centres[groups], axis=1)
    return np.bincount(groups, distances) / sizes / np.log(sizes + SMOOTHING)


def _normalised(features: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, length, out=np.zeros_like(features), where=length > 0)
