"""Calibrated probabilities say how many are right, and a goal is turned into the threshold that reaches it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit

from dasc.errors import InputError
from dasc.judge.calibration import (
    background,
    calibrate,
    fit_calibration,
    reliability,
    resolve_threshold,
    right_detections,
    shift_of,
    uncalibrate,
)
from dasc.judge.metrics import choose_threshold, counts_to_scores

CONFIG = {"threshold": 0.42}


def overconfident(seed=0, number=4000):
    """Probabilities of a network trained on as many mitoses as negatives, and which of them are right."""
    rng = np.random.default_rng(seed)
    true = rng.normal(-1.5, 1.5, number)
    return expit(2.5 * true + 3), rng.random(number) < expit(true)


def test_the_background_is_what_a_quarter_of_the_candidates_exceed():
    odds = np.random.default_rng(0).normal(-5, 2, 4001)
    assert background(odds) == pytest.approx(np.quantile(odds, 0.75)) and (odds > background(odds)).sum() == 1000
    mitoses = np.concatenate([odds, np.full(40, 9.0)])  # a hundredth more: it hardly moves
    assert background(mitoses) - background(odds) < 0.05
    config = {"background": -3.0}
    assert shift_of(odds[:0], config) == 0
    few = odds[:16]  # half as many as the 32 that val's background counts for: a third of the way
    assert shift_of(few, config) == pytest.approx((-3.0 - background(few)) / 3)


def test_an_image_is_brought_to_the_background_of_val():
    odds = np.random.default_rng(1).normal(-5, 2, 500)
    config = {"background": background(odds), "temperature": 2.0, "offset": 0.5}
    assert shift_of(odds, config) == pytest.approx(0, abs=1e-9)
    assert 2.7 < shift_of(odds - 3, config) < 3  # a stain on which everything looks less likely, but for the prior
    assert shift_of(odds - 3, {"temperature": 2.0}) == 0  # a checkpoint without a background
    moved = calibrate(expit(odds - 3), config, shift=3.0)
    assert np.allclose(moved, calibrate(expit(odds), config), atol=1e-6)
    for probability in (0.01, 0.3, 0.9):
        own = uncalibrate(probability, config, shift=3.0)
        assert calibrate(np.array([own]), config, shift=3.0)[0] == pytest.approx(probability)
    assert calibrate(np.array([0.2]), {}, shift=1.0)[0] == pytest.approx(expit(logit(0.2) + 1))


def test_the_fit_finds_temperature_and_offset():
    probabilities, right = overconfident()
    fitted = fit_calibration(probabilities, right)
    assert fitted["temperature"] == pytest.approx(2.5, rel=0.1) and fitted["offset"] == pytest.approx(-1.2, abs=0.15)
    calibrated = calibrate(probabilities, fitted)
    for low in (0.1, 0.3, 0.5, 0.7):
        group = (calibrated >= low) & (calibrated < low + 0.2)
        assert right[group].mean() == pytest.approx(calibrated[group].mean(), abs=0.06)
    assert abs(probabilities.mean() - right.mean()) > 0.15


def test_calibration_keeps_the_order_and_can_be_undone():
    config = {"temperature": 2.5, "offset": -1.2}
    probabilities = np.linspace(0.001, 0.999, 200)
    calibrated = calibrate(probabilities, config)
    assert (np.diff(calibrated) > 0).all()
    assert [uncalibrate(one, config) for one in calibrated] == pytest.approx(probabilities.tolist(), abs=1e-9)
    assert np.isfinite(calibrate(np.array([0.0, 1.0]), config)).all()


def test_nothing_to_fit_changes_nothing():
    rng = np.random.default_rng(0)
    falling = rng.random(500)
    for probabilities, right in (
        (np.empty(0), np.empty(0, bool)),
        (rng.random(100), np.arange(100) < 5),
        (falling, rng.random(500) > falling),
    ):
        fitted = fit_calibration(probabilities, right)
        assert fitted == {"temperature": 1.0, "offset": 0.0}
        assert calibrate(probabilities, fitted).tolist() == probabilities.tolist()
    assert calibrate(np.array([0.25]), {}).tolist() == [0.25]


def test_few_and_perfect_detections_do_not_give_certainty():
    probabilities = np.r_[np.full(12, 0.7), np.full(12, 0.3)]
    fitted = fit_calibration(probabilities, probabilities > 0.5)
    assert calibrate(np.array([0.7]), fitted)[0] < 0.95


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
    threshold, curve = choose_threshold([(truth, places, probability)], 7.5)
    return (truth, places, probability), CONFIG | {"threshold": threshold, "val_curve": curve.to_dict("list")}


@pytest.mark.parametrize("goal", ["precision=0.8", "precision=0.6", "recall=0.85", "recall=0.5"])
def test_a_goal_is_reached_on_val_and_not_overshot(val, goal):
    (truth, places, probability), config = val
    threshold = resolve_threshold(goal, config, Path("model.pt"))

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
    assert resolve_threshold("0.3", CONFIG, Path("m.pt")) == 0.3
    assert resolve_threshold("1", CONFIG, Path("m.pt")) == 1
    assert resolve_threshold("best", CONFIG, Path("m.pt")) == 0.42


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
        resolve_threshold(text, val[1], Path("model.pt"))
    with pytest.raises(InputError, match=r"model\.pt.*val curve"):
        resolve_threshold("recall=0.9", CONFIG, Path("model.pt"))


@pytest.mark.parametrize("number", [0, 5, 400])
def test_the_reliability_plot_is_drawn(tmp_path, number):
    probabilities, right = overconfident(number=number)
    reliability(tmp_path / "r.png", probabilities, right, fit_calibration(probabilities, right))
    with Image.open(tmp_path / "r.png") as image:
        assert image.size == (450, 450)


def test_the_formula():
    assert calibrate(np.array([0.8]), {"temperature": 2.0, "offset": 0.5})[0] == expit(logit(0.8) / 2 + 0.5)
