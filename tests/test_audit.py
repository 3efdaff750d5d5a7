"""A count from a sample: exact where all is seen, and intervals that hold what they promise."""

import numpy as np
import pandas as pd
import pytest

from dasc.review import audit
from dasc.review.audit import Strata, estimate, estimate_within
from dasc.review.queue import audit_sample, strata_of

ABOVE = np.array([1, 1, 1, 0, 0, 0, 0])


def test_estimates_by_hand():
    found = estimate(Strata(np.array([100, 900]), np.array([10, 20]), np.array([6, 1]), np.array([1, 0])))
    assert found["mitoses"][0] == pytest.approx(100 * 0.6 + 900 * 0.05)
    assert found["precision"][0] == pytest.approx(0.6)
    assert found["recall"][0] == pytest.approx(60 / 105, abs=1e-4)
    for best, low, high in found.values():
        assert low < best < high
    assert found["mitoses"][1] >= 7  # those that were seen


def test_a_stratum_seen_whole_has_no_error():
    found = estimate(Strata(np.array([12, 30]), np.array([12, 30]), np.array([9, 3]), np.array([1, 0])))
    assert found == {"mitoses": [12, 12, 12], "precision": [0.75] * 3, "recall": [0.75] * 3}


def test_nothing_above_the_threshold_has_no_precision():
    found = estimate(Strata(np.array([50]), np.array([10]), np.array([0]), np.array([0])))
    assert found["precision"] == [None, None, None] and found["mitoses"][:2] == [0, 0]
    assert found["recall"][0] is None


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        ([0.95, 0.8, 0.4, 0.1, 0.03, 0.01, 0.002], [40] * 3 + [120] * 4),
        ([0.9, 0.6, 0.3, 0.08, 0.02, 0.005, 0.0], [200] * 3 + [2000] * 4),
        ([0.9, 0.6, 0.3, 0.3, 0.2, 0.1, 0.05], [60] * 3 + [100] * 4),
        ([0.5, 0.3, 0.2, 0.05, 0.05, 0.05, 0.05], [300] * 7),
    ],
    ids=["few", "a slide", "a poor threshold", "a poor model"],
)
def test_intervals_hold_95_percent(rates, sizes, monkeypatch):
    """Slides of known mitoses, 98 of their detections judged: how often the truth lies within the interval.

    A whole number may lie on the edge of its interval, so that more than 95 % are held where the numbers are small;
    fewer than 95 % are not, but by the simulation's own error (three standard errors).
    """
    monkeypatch.setattr(audit, "DRAWS", 1000)
    rng, sizes, runs = np.random.default_rng(0), np.array(sizes), 250
    held = dict.fromkeys(("mitoses", "precision", "recall", "window"), 0)
    for run in range(runs):
        mitoses = rng.binomial(sizes, rates)
        judged = np.minimum(sizes, 14)
        seen = rng.hypergeometric(mitoses, sizes - mitoses, judged)
        strata = Strata(sizes, judged, seen, ABOVE)
        truth = {"mitoses": mitoses.sum(), "precision": mitoses[:3].sum() / sizes[:3].sum()}
        truth["recall"] = mitoses[:3].sum() / max(mitoses.sum(), 1)
        found = estimate(strata, run)
        # A window holds a random fifth of the judged and of the unseen.
        inside_seen = rng.binomial(seen, 0.2).sum()
        unseen_true = rng.binomial(mitoses - seen, 0.2)
        unseen_false = rng.binomial(sizes - judged - (mitoses - seen), 0.2)
        truth["window"] = inside_seen + unseen_true.sum()
        found["window"] = estimate_within(strata, inside_seen, unseen_true + unseen_false, run)
        for name, value in truth.items():
            held[name] += found[name][1] - 1e-4 <= value <= found[name][2] + 1e-4
    error = 3 * np.sqrt(0.95 * 0.05 / runs)
    assert all(0.95 - error <= count / runs for count in held.values()), held
    assert all(count / runs <= 0.995 for name, count in held.items() if name != "window"), held


def test_strata_never_cross_the_threshold_and_are_even():
    rng = np.random.default_rng(0)
    cells = pd.DataFrame({"probability": rng.random(500)})
    cells["called"] = (cells["probability"] >= 0.7).astype(int)
    cells["label"] = np.nan
    cells["stratum"] = strata_of(cells)
    groups = cells.groupby("stratum")
    assert groups["called"].nunique().eq(1).all() and len(groups) == 7
    low, high = groups["probability"].min(), groups["probability"].max()
    assert (low.to_numpy()[:-1] >= high.to_numpy()[1:]).all()
    sample = audit_sample(cells, 100, np.random.default_rng(1))
    assert len(sample) == 100 and sample["stratum"].value_counts().between(14, 15).all()
    few = audit_sample(cells[:30], 100, np.random.default_rng(1))
    assert len(few) == 30 and not few.index.duplicated().any()


def test_the_sample_is_random_within_a_stratum():
    cells = pd.DataFrame({"probability": np.linspace(1, 0.5, 60), "called": 1, "label": np.nan})
    times = np.zeros(60)
    for seed in range(300):
        times[audit_sample(cells, 15, np.random.default_rng(seed)).index] += 1
    assert (times > 300 * 0.25 * 0.6).all() and (times < 300 * 0.25 * 1.5).all()
