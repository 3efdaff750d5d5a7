"""Agreement of readers: against scikit-learn, and against figures worked by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score

from dasc.review.agreement import (
    cohen_kappa,
    crosses,
    fleiss_kappa,
    fleiss_sums,
    positive_agreement,
    share_right,
    with_interval,
)

# Fleiss (1971) as worked in textbooks: 10 cells, 14 readers, 5 answers; kappa 0.210.
FLEISS_COUNTS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


@pytest.mark.parametrize("seed", range(5))
def test_cohen_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 3, 200)
    second = np.where(rng.random(200) < 0.6, first, rng.integers(0, 3, 200))
    table = crosses(first, second, 3).sum(axis=0)
    assert cohen_kappa(table) == pytest.approx(cohen_kappa_score(first, second))
    missing = rng.random(200) < 0.2
    second = np.where(missing, -1, second)
    table = crosses(first, second, 3).sum(axis=0)
    assert cohen_kappa(table) == pytest.approx(cohen_kappa_score(first[~missing], second[~missing]))


def test_cohen_of_many_tables_at_once():
    tables = np.array([[[20, 5], [10, 15]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    kappa = cohen_kappa(tables)
    assert kappa[0] == pytest.approx(0.4)  # 0.7 observed, 0.5 by chance
    assert np.isnan(kappa[1:]).all()  # one answer throughout, or no cell: nothing beyond chance


def test_fleiss_by_hand():
    answers = np.array([np.repeat(np.arange(5), counts) for counts in FLEISS_COUNTS])
    sums = fleiss_sums(answers, 5)
    assert sums[0, -1] == 1 and sums[1, -1] == pytest.approx((2 * 1 + 6 * 5 + 4 * 3 + 2 * 1) / (14 * 13))
    assert fleiss_kappa(sums.sum(axis=0), 14) == pytest.approx(0.210, abs=5e-4)


def test_fleiss_of_readers_that_agree_is_one_and_of_one_answer_undefined():
    answers = np.repeat([[0], [1], [2], [0]], 3, axis=1)
    assert fleiss_kappa(fleiss_sums(answers, 3).sum(axis=0), 3) == pytest.approx(1)
    assert np.isnan(fleiss_kappa(fleiss_sums(np.zeros((4, 3), int), 3).sum(axis=0), 3))


def test_positive_agreement_by_hand():
    assert positive_agreement(np.array([[8, 2, 0], [4, 30, 1], [0, 0, 5]])) == pytest.approx(16 / 22)
    assert np.isnan(positive_agreement(np.array([[0, 0], [0, 9]])))


def test_accuracy_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 2, (2, 50))
    found = with_interval(share_right, np.column_stack([np.ones(50), truth == given]), rng.integers(0, 9, 50), 0)
    assert found["value"] == pytest.approx(accuracy_score(truth, given), abs=1e-4)


def test_intervals_are_by_case():
    """Cells of one case that agree or differ together: drawing cells would give too short an interval."""
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(10) < 0.5, 30)
    sums = np.column_stack([np.ones(300), right])
    by_case = with_interval(share_right, sums, np.repeat(np.arange(10), 30), 0)
    by_cell = with_interval(share_right, sums, np.arange(300), 0)
    assert by_case["cases"] == 10 and by_case["cells"] == by_cell["cells"] == 300
    assert by_case["low"] < by_case["value"] < by_case["high"]
    assert by_case["high"] - by_case["low"] > 3 * (by_cell["high"] - by_cell["low"])
    assert with_interval(share_right, sums, np.repeat(np.arange(10), 30), 0) == by_case


def test_the_interval_of_kappa_holds():
    """Of 200 samples of readers whose kappa is known, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    table = np.array([[0.35, 0.1], [0.15, 0.4]])
    true = float(cohen_kappa(table))
    held = 0
    for _ in range(200):
        pairs = rng.choice(4, 120, p=table.ravel())
        found = with_interval(cohen_kappa, crosses(pairs // 2, pairs % 2, 2), np.repeat(np.arange(60), 2), 0)
        held += found["low"] <= true <= found["high"]
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 200) <= held / 200 <= 0.995


def test_nothing_to_measure_is_said():
    found = with_interval(cohen_kappa, np.zeros((0, 3, 3)), np.zeros(0), 0)
    assert found == {"value": None, "low": None, "high": None, "cells": 0, "cases": 0}
    one = with_interval(share_right, np.array([[1.0, 1.0], [1.0, 0.0]]), np.array(["A", "A"]), 0)
    assert one["value"] == 0.5 and one["low"] is None and one["cases"] == 1
