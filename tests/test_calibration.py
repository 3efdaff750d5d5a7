"""Calibrated probabilities say how many are right, and a goal is turned into the threshold that reaches it."""

from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit

from dasc.errors import InputError
from dasc.judge.calibration import (
    UNCALIBRATED,
    Calibration,
    fit_calibration,
    ordinary_odds,
    resolve_threshold,
    right_detections,
)
from dasc.judge.metrics import choose_threshold, counts_to_scores

MODEL = Path("model.pt")


def overconfident(seed=0, number=4000):
    """Probabilities of a network trained on as many mitoses as negatives, and which of them are right."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-1.5, 1.5, number)
    return expit(2.5 * true + 3), rng.random(number) < expit(true)


def test_an_image_is_aligned_by_what_a_quarter_of_its_candidates_exceed():
    odds = np.random.default_rng(0).normal(-5, 2, 4001)
    level = ordinary_odds(odds)
    assert level == pytest.approx(np.quantile(odds, 0.75)) and (odds > level).sum() == 1000
    mitoses = np.concatenate([odds, np.full(40, 9.0)])  # a hundredth more: it hardly moves
    assert ordinary_odds(mitoses) - level < 0.05
    aligned = Calibration(alignment=-3.0)
    assert aligned.shift_of(odds[:0]) == 0
    few = odds[:16]  # half as many as the 32 that val's level counts for: a third of the way
    assert aligned.shift_of(few) == pytest.approx((-3.0 - ordinary_odds(few)) / 3)


def test_an_image_is_aligned_with_val():
    odds = np.random.default_rng(1).normal(-5, 2, 500)
    calibration = Calibration(temperature=2.0, offset=0.5, alignment=ordinary_odds(odds))
    assert calibration.shift_of(odds) == pytest.approx(0, abs=1e-9)
    assert 2.7 < calibration.shift_of(odds - 3) < 3  # a stain on which everything looks less likely, but for the prior
    assert Calibration(temperature=2.0).shift_of(odds - 3) == 0  # nothing is aligned
    moved = calibration.calibrate(expit(odds - 3), shift=3.0)
    assert np.allclose(moved, calibration.calibrate(expit(odds)), atol=1e-6)
    for probability in (0.01, 0.3, 0.9):
        own = calibration.uncalibrate(probability, shift=3.0)
        assert calibration.calibrate(np.array([own]), shift=3.0)[0] == pytest.approx(probability)
    assert UNCALIBRATED.calibrate(np.array([0.2]), shift=1.0)[0] == pytest.approx(expit(logit(0.2) + 1))


def test_the_fit_finds_temperature_and_offset():
    probabilities, right = overconfident()
    fitted = fit_calibration(probabilities, right)
    assert fitted.temperature == pytest.approx(2.5, rel=0.1) and fitted.offset == pytest.approx(-1.2, abs=0.15)
    assert fitted.fitted and fitted.alignment is None
    calibrated = fitted.calibrate(probabilities)
    for low in (0.1, 0.3, 0.5, 0.7):
        group = (calibrated >= low) & (calibrated < low + 0.2)
        assert right[group].mean() == pytest.approx(calibrated[group].mean(), abs=0.06)
    assert abs(probabilities.mean() - right.mean()) > 0.15


def test_calibration_keeps_the_order_and_can_be_undone():
    calibration = Calibration(temperature=2.5, offset=-1.2)
    probabilities = np.linspace(0.001, 0.999, 200)
    calibrated = calibration.calibrate(probabilities)
    assert (np.diff(calibrated) > 0).all()
    assert [calibration.uncalibrate(one) for one in calibrated] == pytest.approx(probabilities.tolist(), abs=1e-9)
    assert np.isfinite(calibration.calibrate(np.array([0.0, 1.0]))).all()


def test_nothing_to_fit_changes_nothing():
    rng = np.random.default_rng(0)
    falling = rng.random(500)
    for probabilities, right in (
        (np.empty(0), np.empty(0, bool)),
        (rng.random(100), np.arange(100) < 5),
        (falling, rng.random(500) > falling),
    ):
        fitted = fit_calibration(probabilities, right)
        assert fitted == Calibration(temperature=1.0, offset=0.0, alignment=None) and not fitted.fitted
        assert fitted.calibrate(probabilities).tolist() == probabilities.tolist()


def test_few_and_perfect_detections_do_not_give_certainty():
    probabilities = np.r_[np.full(12, 0.7), np.full(12, 0.3)]
    fitted = fit_calibration(probabilities, probabilities > 0.5)
    assert fitted.fitted and fitted.calibrate(np.array([0.7]))[0] < 0.95


def test_right_is_what_matches():
    fields = [
        (np.array([[10.0, 10]]), np.array([[11.0, 10], [10.5, 10], [90, 90]]), np.array([0.9, 0.5, 0.4])),
        (np.empty((0, 2)), np.array([[1.0, 1]]), np.array([0.3])),
    ]
    assert right_detections(fields, 7.5).tolist() == [False, True, False, False]


@pytest.fixture(scope="module")
def val():
    rng = np.random.default_rng(1)
    truth = rng.uniform(0, 10_000, (300, 2))
    places = np.concatenate([truth[:270], rng.uniform(0, 10_000, (900, 2))])
    probability = np.r_[rng.beta(4, 2, 270), rng.beta(1.5, 4, 900)]
    _, curve = choose_threshold([(truth, places, probability)], 7.5)
    return (truth, places, probability), curve.to_dict("list")


@pytest.mark.parametrize("goal", ["precision=0.8", "precision=0.6", "recall=0.85", "recall=0.5"])
def test_a_goal_is_reached_on_val_and_not_overshot(val, goal):
    (truth, places, probability), val_curve = val
    threshold = resolve_threshold(goal, 0.42, val_curve, MODEL)

    def scores(kept):
        hits = right_detections([(truth, places[kept], probability[kept])], 7.5).sum()
        return dict(zip(("precision", "recall"), counts_to_scores(hits, kept.sum() - hits, 300 - hits), strict=False))

    name, value = goal.split("=")
    other = "recall" if name == "precision" else "precision"
    reached = scores(probability >= threshold)
    assert reached[name] >= float(value)
    others = [scores(probability >= one) for one in np.quantile(probability, np.linspace(0, 1, 150))]
    assert reached[other] >= max(one[other] for one in others if one[name] >= float(value)) - 1e-9


def test_numbers_and_best(val):
    for val_curve in (val[1], None):
        assert resolve_threshold("0.3", 0.42, val_curve, MODEL) == 0.3
        assert resolve_threshold("1", 0.42, val_curve, MODEL) == 1
        assert resolve_threshold("best", 0.42, val_curve, MODEL) == 0.42


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("high", "expected best"),
        ("1.5", "expected best"),
        ("f1=0.5", "expected best"),
        ("precision=2", "expected best"),
        ("recall=0.99", "at most"),
    ],
)
def test_what_cannot_be_resolved(val, text, says):
    with pytest.raises(InputError, match=says):
        resolve_threshold(text, 0.42, val[1], MODEL)


@pytest.mark.parametrize("val_curve", [None, {"threshold": [], "precision": [], "recall": [], "f1": []}])
def test_a_goal_needs_a_val_curve(val_curve):
    with pytest.raises(InputError, match=r"model\.pt.*val curve"):
        resolve_threshold("recall=0.9", 0.42, val_curve, MODEL)


def test_the_formula():
    calibration = Calibration(temperature=2.0, offset=0.5)
    assert calibration.calibrate(np.array([0.8]))[0] == expit(logit(0.8) / 2 + 0.5)
    assert calibration.calibrate(np.array([0.8]), shift=0.3)[0] == expit((logit(0.8) + 0.3) / 2 + 0.5)
