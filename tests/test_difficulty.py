"""Verdicts one by one, levels of clear clusters and every fallback, and tables that do not belong together."""

import numpy as np
import pandas as pd
import pytest

from dasc.errors import InputError
from dasc.model.difficulty import (
    difficulty_levels,
    forget_rate,
    join_by_patch,
    read_hard,
    read_memory,
    validated,
    verdicts,
)

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


def write(path, rows, columns):
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


MEMORY = ["patch", "label", *COUNTS, "centroid_distance", "noise_score"]
GOOD = ["a.png", 1, 5, 3, 2, 6, 4, 0.5, 0.1]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("label", 2, "label 2"),
        ("clean", -1, "clean is -1"),
        ("noise_score", "", "noise_score is nan"),
        ("centroid_distance", "inf", "centroid_distance is 'inf'"),
        ("hard", "many", "hard is 'many'"),
    ],
)
def test_bad_cell_is_named_with_its_row(tmp_path, column, value, says):
    bad = ["b.png", *GOOD[1:]]
    bad[MEMORY.index(column)] = value
    with pytest.raises(InputError, match=says):
        read_memory(write(tmp_path / "memory.csv", [GOOD, bad], MEMORY))


def test_single_epoch_is_said(tmp_path):
    uncounted = ["b.png", 1, 0, 0, 0, 0, 0, 0.5, 0.1]
    path = write(tmp_path / "memory.csv", [GOOD, uncounted], MEMORY)
    with pytest.raises(InputError, match=r"1 of 2 patches have no counted epoch.*COUNT_AFTER"):
        read_memory(path)


def test_patch_twice(tmp_path):
    with pytest.raises(InputError, match="twice"):
        read_memory(write(tmp_path / "memory.csv", [GOOD, GOOD], MEMORY))


HARD = ["patch", "label", "verdict", "level", "forget_rate", "centroid_distance", "noise_score"]


@pytest.mark.parametrize(
    ("verdict", "level", "says"),
    [
        ("hrad", "", "verdict 'hrad'"),
        ("hard", "", "expected 0 to 2"),
        ("hard", 3, "LEVELS must be the same"),
        ("hard", 0.5, "level 0.5"),
        ("clean", 1, "expected none"),
    ],
)
def test_verdict_and_level_must_agree(tmp_path, verdict, level, says):
    path = write(tmp_path / "hard.csv", [["a", 1, verdict, level, 0.1, 0.1, 0.1]], HARD)
    with pytest.raises(InputError, match=says):
        read_hard(path, 3)


def test_join_keeps_the_order_of_the_first_and_never_goes_by_row():
    left = pd.DataFrame({"patch": ["a", "b", "c"], "label": [0, 1, 0]})
    right = pd.DataFrame({"patch": ["c", "a", "b"], "label": [0, 0, 1], "level": [2, 0, 1]})
    joined = join_by_patch(left, right, "l.csv", "r.csv")
    assert joined.to_dict("list") == {"patch": ["a", "b", "c"], "label": [0, 1, 0], "level": [0, 1, 2]}


def test_join_refuses_tables_of_different_runs():
    left = pd.DataFrame({"patch": ["a", "b"], "label": [0, 1]})
    with pytest.raises(InputError, match=r"r.csv: lacks 1 of the 2 patches of l.csv.*first: b"):
        join_by_patch(left, left[:1], "l.csv", "r.csv")
    with pytest.raises(InputError, match=r"l.csv: lacks 1 of the 2 patches of r.csv.*first: b"):
        join_by_patch(left[:1], left, "l.csv", "r.csv")
    with pytest.raises(InputError, match=r"r.csv: patch b has label 0, l.csv has 1"):
        join_by_patch(left, left.assign(label=0), "l.csv", "r.csv")


def test_join_of_empty_tables():
    empty = pd.DataFrame({"patch": [], "label": []})
    assert join_by_patch(empty, empty.assign(level=[]), "l.csv", "r.csv").columns.tolist() == [
        "patch",
        "label",
        "level",
    ]
