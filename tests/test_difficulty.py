"""Verdicts one by one, levels of clear clusters and every fallback, hardness."""

import numpy as np
import pandas as pd
import pytest

from dasc.model.difficulty import difficulty_levels, forget_rate, hardness, validated, verdicts

COUNTS = ["clean", "hard", "noisy", "learned", "forgotten"]
# counts of 10 epochs -> verdict by the paper's rule, verdict when noisy asks for more than half of the epochs
ROWS = {
    "always clean": ((10, 0, 0, 10, 0), "clean", "clean"),
    "hard once": ((9, 1, 0, 10, 0), "hard", "hard"),
    "always hard": ((0, 10, 0, 4, 6), "hard", "hard"),
    "noisy once": ((9, 0, 1, 9, 1), "noisy", "hard"),
    "hard and noisy": ((2, 4, 4, 5, 5), "noisy", "hard"),
    "noisy in half": ((5, 0, 5, 5, 5), "noisy", "hard"),
    "noisy in more": ((4, 0, 6, 4, 6), "noisy", "noisy"),
    "never selected, noisy": ((0, 0, 10, 0, 10), "noisy", "noisy"),
    "never selected, hard": ((0, 10, 0, 0, 10), "dropped", "dropped"),
    "never selected, few noisy": ((0, 9, 1, 0, 10), "noisy", "dropped"),
}


def memory(rows):
    return pd.DataFrame(rows, columns=COUNTS)


@pytest.mark.parametrize("name", ROWS)
def test_verdict(name):
    counts, paper, half = ROWS[name]
    assert verdicts(memory([counts]), 0.0, 0.0).tolist() == [paper]
    assert verdicts(memory([counts]), 0.5, 0.0).tolist() == [half]


def test_verdicts_of_many_are_those_of_each():
    table = memory([counts for counts, _, _ in ROWS.values()])
    assert verdicts(table, 0.5, 0.0).tolist() == [half for _, _, half in ROWS.values()]


def test_hard_share():
    table = memory([(7, 2, 1, 10, 0), (8, 2, 0, 10, 0), (8, 1, 1, 10, 0)])
    assert verdicts(table, 0.5, 0.2).tolist() == ["hard", "clean", "clean"]


def test_noisy_in_every_epoch_needs_a_share_below_one():
    assert verdicts(memory([(0, 0, 10, 5, 5)]), 1.0, 0.0).tolist() == ["hard"]


def test_trusted_mitoses_are_hard_at_worst():
    rows = [(0, 0, 10, 0, 10), (0, 10, 0, 0, 10), (4, 0, 6, 4, 6), (2, 8, 0, 8, 2), (10, 0, 0, 10, 0)]
    expected = {0: ["noisy", "dropped", "noisy", "hard", "clean"], 1: ["hard", "hard", "hard", "hard", "clean"]}
    for label, of_label in expected.items():
        assert verdicts(memory(rows).assign(label=label), 0.5, 0.5, trust_mitoses=True).tolist() == of_label
        assert verdicts(memory(rows).assign(label=label), 0.5, 0.5).tolist() == expected[0]


def test_forget_rate():
    assert forget_rate(memory([(1, 1, 0, 3, 1), (1, 1, 0, 0, 4), (1, 1, 0, 4, 0)])).tolist() == [0.25, 1.0, 0.0]


def clusters(seed=0, sizes=(60, 40, 25)):
    """Three clear clusters along both measures, and which one each point came from."""
    rng = np.random.default_rng(seed)
    truth = np.repeat([0, 1, 2], sizes)
    rates = np.array([0.1, 0.4, 0.8])[truth] + rng.normal(0, 0.03, len(truth))
    distances = np.array([0.5, 0.6, 0.75])[truth] + rng.normal(0, 0.01, len(truth))
    order = rng.permutation(len(truth))
    return rates[order], distances[order], truth[order]


@pytest.mark.parametrize("seed", range(3))
def test_clear_clusters_are_found_and_ordered(seed):
    rates, distances, truth = clusters(seed)
    levels, reason = difficulty_levels(rates, distances, 3, seed)
    assert reason == "" and levels.tolist() == truth.tolist()


def test_components_are_ordered_by_both_measures():
    """The cluster with the largest forget rate lies near the centre of its label, and is not the hardest."""
    rng = np.random.default_rng(1)
    truth = np.repeat([0, 1, 2], 40)
    rates = np.array([0.0, 0.9, 0.8])[truth] + rng.normal(0, 0.02, 120)
    distances = np.array([0.1, 0.1, 0.9])[truth] + rng.normal(0, 0.02, 120)
    levels, reason = difficulty_levels(rates, distances, 3, 0)
    assert reason == "" and levels.tolist() == truth.tolist()


def test_levels_do_not_depend_on_the_order_or_the_unit():
    rng = np.random.default_rng(2)
    rates, distances = rng.integers(0, 20, 300) / 20, rng.random(300)
    levels, _ = difficulty_levels(rates, distances, 3, 0)
    order = rng.permutation(300)
    shuffled, _ = difficulty_levels(rates[order], distances[order], 3, 0)
    assert shuffled.tolist() == levels[order].tolist()
    scaled, _ = difficulty_levels(rates, distances * 1024, 3, 0)
    assert scaled.tolist() == levels.tolist()
    mean = [(rates / rates.std() + distances / distances.std())[levels == level].mean() for level in range(3)]
    assert mean == sorted(mean)


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [0]), (2, [0, 2])])
def test_fewer_patches_than_components(count, expected):
    levels, reason = difficulty_levels(np.linspace(0, 1, count), np.full(count, 0.5), 3, 0)
    assert levels.tolist() == expected and "fewer patches than 3" in reason


def test_empty_component_falls_back():
    levels, reason = difficulty_levels(np.full(9, 0.3), np.full(9, 0.1), 3, 0)
    assert "2 of 3 components are empty" in reason and levels.tolist() == [0] * 9


def test_not_converged_falls_back_to_equal_shares():
    rng = np.random.default_rng(3)
    rates, distances = rng.random(90), rng.random(90)
    levels, reason = difficulty_levels(rates, distances, 3, 0, iterations=1)
    assert "not converged in 1 iterations" in reason
    assert np.bincount(levels).tolist() == [30, 30, 30]
    difficulty = rates / rates.std() + distances / distances.std()
    assert difficulty[levels == 0].max() < difficulty[levels == 1].min()
    assert difficulty[levels == 1].max() < difficulty[levels == 2].min()


def test_one_level():
    assert difficulty_levels(np.array([0.2, 0.8]), np.array([0.1, 0.2]), 1, 0)[0].tolist() == [0, 0]


def test_validated():
    seen, correct = pd.Series([10, 10, 10, 0]), pd.Series([5, 4, 10, 0])
    assert validated(seen, correct, 0.5).tolist() == [True, False, True, True]
    assert validated(seen, correct, 0.4).tolist() == [True, True, True, True]


def test_hardness_rises_from_clean_to_the_hardest_level():
    found = hardness(["clean", "hard", "hard", "noisy", "dropped"], [np.nan, 0, 2, np.nan, np.nan], 3)
    assert found[:3].tolist() == [0, 1 / 3, 1] and np.isnan(found[3:]).all()
