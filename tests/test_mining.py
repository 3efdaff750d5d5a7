"""The nearest pool patches, held against naive loops."""

import numpy as np
import pytest
import torch

from dasc.errors import InputError
from dasc.weak import mining
from dasc.weak.mining import distance, nearest, taken_once

CPU = torch.device("cpu")


def search(queries, pool, k, metric, allowed=None):
    allowed = np.ones(len(pool), dtype=bool) if allowed is None else allowed
    return nearest(queries, lambda start, stop: pool[start:stop], lambda rows: pool[rows], allowed, k, metric, CPU)


def naive_distance(a, b, metric):
    a, b = a.astype(float).tolist(), b.astype(float).tolist()
    if metric == "l2":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5
    product, lengths = sum(x * y for x, y in zip(a, b, strict=True)), sum(x * x for x in a) * sum(y * y for y in b)
    return 1 - product / max(lengths**0.5, 1e-12)


def naive_nearest(query, pool, allowed, k, metric):
    every = [(round(naive_distance(query, pool[row], metric), 12), row) for row in range(len(pool)) if allowed[row]]
    return [row for _, row in sorted(every)[:k]]


@pytest.mark.parametrize("metric", mining.METRICS)
@pytest.mark.parametrize(("size", "block", "k"), [(60, 16, 5), (60, 7, 1), (33, 64, 33), (5, 2, 5)])
def test_as_a_naive_loop(monkeypatch, metric, size, block, k):
    monkeypatch.setattr(mining, "BLOCK", block)
    rng = np.random.default_rng(size + block)
    pool = np.maximum(rng.normal(size=(size, 6)), 0).astype(np.float16)
    queries = np.maximum(rng.normal(size=(9, 6)), 0).astype(np.float32)
    allowed = rng.random(size) < 0.7 if k < size else np.ones(size, dtype=bool)
    rows, distances = search(queries, pool, k, metric, allowed)
    for query, found, lengths in zip(queries, rows, distances, strict=True):
        assert found.tolist() == naive_nearest(query, pool, allowed, k, metric)
        expected = [naive_distance(query, pool[row], metric) for row in found]
        assert lengths == pytest.approx(expected, abs=1e-12)


def test_cosine_takes_the_most_similar():
    pool = np.array([[-1.0, 0.0], [0.0, 5.0], [100.0, 1.0], [0.5, 0.5]], dtype=np.float32)
    rows, distances = search(np.array([[2.0, 0.0]], dtype=np.float32), pool, 4, "cosine")
    assert rows[0].tolist() == [2, 3, 1, 0]
    assert distances[0] == pytest.approx([0, 1 - 0.5**0.5, 1, 2], abs=1e-4)


def test_features_of_zero_are_unlike_everything():
    pool = np.array([[0.0, 0.0], [1.0, 0.1]], dtype=np.float32)
    rows, distances = search(np.array([[1.0, 0.0]], dtype=np.float32), pool, 2, "cosine")
    assert rows[0].tolist() == [1, 0] and distances[0, 1] == 1


def test_order_survives_large_features():
    """Squares of 1000 in single precision would drown distances of hundredths."""
    pool = (1000 + np.arange(40)[::-1, None] * np.array([[0.01, 0.0, 0.0]])).astype(np.float32)
    rows, _ = search(np.full((1, 3), 1000.0, dtype=np.float32), pool, 40, "l2")
    assert rows[0].tolist() == list(range(39, -1, -1))


def test_equally_near_ones_come_in_the_pools_order(monkeypatch):
    monkeypatch.setattr(mining, "BLOCK", 3)
    pool = np.ones((10, 4), dtype=np.float32)
    assert search(pool[:1], pool, 4, "l2")[0].tolist() == [[0, 1, 2, 3]]


def test_k_beyond_the_pool():
    pool = np.ones((10, 4), dtype=np.float32)
    with pytest.raises(InputError, match="only 9 pool patches"):
        search(pool[:1], pool, 10, "l2", np.arange(10) > 0)


def test_features_of_another_shape_are_refused():
    """Not compared by accident, as arrays that broadcast would be."""
    with pytest.raises(InputError, match="pool features"):
        search(np.ones((1, 4), dtype=np.float32), np.ones((10, 1), dtype=np.float32), 2, "l2")


def test_taken_once_as_a_naive_loop():
    rng = np.random.default_rng(0)
    neighbours = np.stack([rng.permutation(12)[:5] for _ in range(8)])
    distances = rng.integers(0, 4, size=neighbours.shape).astype(float)
    best: dict[int, tuple] = {}
    count: dict[int, int] = {}
    for query in range(8):
        for row, length in zip(neighbours[query].tolist(), distances[query].tolist(), strict=True):
            count[row] = count.get(row, 0) + 1
            if row not in best or (length, query) < best[row]:
                best[row] = (length, query)
    rows, queries, lengths, counts = taken_once(neighbours, distances)
    assert rows.tolist() == sorted(best)
    assert [(length, query) for length, query in zip(lengths, queries, strict=True)] == [best[row] for row in rows]
    assert counts.tolist() == [count[row] for row in rows]


def test_distance_is_that_of_numpy():
    rng = np.random.default_rng(1)
    query, pool = rng.normal(size=7), rng.normal(size=(5, 7))
    assert distance(query, pool, "l2") == pytest.approx(np.sqrt(((pool - query) ** 2).sum(axis=1)))
