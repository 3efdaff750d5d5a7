"""Matching against the challenge's evaluator, scores by hand, the threshold against trying them all."""

import time

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score

from dasc.errors import InputError
from dasc.judge.metrics import (
    average_precision,
    bootstrap_f1,
    choose_threshold,
    counts_to_scores,
    evaluate,
    match_detections,
    match_field,
    match_uts,
    plateau_threshold,
)

NOTHING = np.empty((0, 2))


def brute_force_f1(fields, threshold, radius):
    """Pooled F1 with everything below the threshold thrown away before the matching."""
    tp = fp = fn = 0
    for truth, points, probability in fields:
        taken = match_detections(truth, points[probability >= threshold], radius)
        tp += (taken >= 0).sum()
        fn += (taken < 0).sum()
        fp += (probability >= threshold).sum() - (taken >= 0).sum()
    return float(counts_to_scores(tp, fp, fn)[2])


def random_fields(rng, fields, crowding=40.0, steps=None):
    """Crowded points, so that annotations compete for detections; few `steps` give equal probabilities."""
    made = []
    for _ in range(fields):
        truth = rng.uniform(0, crowding, (rng.integers(0, 6), 2))
        points = rng.uniform(0, crowding, (rng.integers(0, 12), 2))
        probability = rng.uniform(size=len(points))
        made.append((truth, points, probability if steps is None else np.round(probability * steps) / steps))
    return made


@pytest.mark.parametrize("grid", [False, True])
def test_matching_equals_the_challenge_evaluator(grid):
    """On a grid of whole numbers 3-4-5 triangles put distances exactly on the radius, which is included."""
    scorers = pytest.importorskip("grand_challenge_metrics.scorers")
    rng = np.random.default_rng(1)
    competed = on_the_radius = 0
    for _ in range(600):
        truth, points, _ = random_fields(rng, 1, crowding=20)[0]
        if grid:
            truth, points = truth.round(), points.round()
            distances = np.hypot(*(truth[:, None] - points[None]).T)
            on_the_radius += (distances == 5).any()
            if any(len(np.unique(row)) < len(row) for row in distances.T):
                continue  # of equally near detections the evaluator takes an unspecified one
        taken = match_detections(truth, points, 5.0)
        hits = taken[taken >= 0]
        assert len(hits) == len(set(hits))
        oracle = scorers.score_detection(ground_truth=truth.tolist(), predictions=points.tolist(), radius=5.0)
        assert oracle.true_positives == len(hits)
        assert oracle.false_negatives == (taken < 0).sum()
        assert oracle.false_positives == len(points) - len(hits)
        competed += match_uts(truth, points, 5.0)[0].sum() != len(hits)
    assert competed > 10
    assert on_the_radius > 10 or not grid


def test_annotations_take_their_nearest_free_detection_in_order():
    detections = np.array([[4.0, 0], [1, 0], [100, 0]])
    assert match_detections([[0, 0], [2, 0], [3, 0]], detections, 5).tolist() == [1, 0, -1]
    assert match_detections([[3, 0], [2, 0], [0, 0]], detections, 5).tolist() == [0, 1, -1]
    assert match_detections([[0, 0]], [[0, 5.0]], 5).tolist() == [0]
    assert match_detections([[0, 0]], [[0, 5.001]], 5).tolist() == [-1]
    assert match_detections([[0, 0]], [[0, 2.0], [2, 0]], 5).tolist() == [0]
    assert match_detections([[0, 0]], NOTHING, 5).tolist() == [-1]
    assert match_detections(NOTHING, detections, 5).shape == (0,)


def test_uts_rule_by_hand():
    """Two detections on one mitosis and one between two mitoses are all right; 31 px is too far."""
    truth = [[0, 0], [50, 0], [500, 500], [900, 900]]
    detections = [[25, 0], [0, 5], [500, 530], [900, 931]]
    found, right = match_uts(truth, detections)
    assert found.tolist() == [True, True, True, False]
    assert right.tolist() == [True, True, True, False]
    one_to_one = match_detections(truth, detections, 30)
    assert one_to_one.tolist() == [1, 0, 2, -1]


def test_the_radius_is_in_micrometres():
    found, right = match_field(np.array([[0, 0], [100, 0]]), np.array([[0, 30.0], [100, 31]]), 0.25)
    assert found.tolist() == right.tolist() == [True, False]
    assert not match_field([[0, 0]], [[0, 30.0]], 0.5)[0].any()
    assert match_field([[0, 0]], [[0, 30.0]], None, match="uts")[0].all()
    for unknown in (None, float("nan"), 0.0):
        with pytest.raises(InputError, match="--um_per_px"):
            match_field([[0, 0]], [[0, 0]], unknown)
    with pytest.raises(InputError, match="iou"):
        match_field([[0, 0]], [[0, 0]], 0.25, match="iou")


def test_scores_by_hand_and_where_undefined():
    assert [float(score) for score in counts_to_scores(6, 2, 4)] == pytest.approx([0.75, 0.6, 12 / 18])
    assert [float(score) for score in counts_to_scores(0, 0, 0)] == [0, 0, 0]
    assert counts_to_scores([1, 0], [0, 1], [0, 1])[2].tolist() == [1, 0]


def test_bootstrap_follows_the_spread_of_the_fields():
    same = bootstrap_f1([3] * 20, [1] * 20, [2] * 20)
    assert same == pytest.approx((6 / 9, 6 / 9))
    assert bootstrap_f1([], [], []) == (0, 0)
    rng = np.random.default_rng(0)
    tp, fp, fn = rng.poisson([[3], [2], [1]], (3, 60))
    low, high = bootstrap_f1(tp, fp, fn, seed=1)
    assert (low, high) == bootstrap_f1(tp, fp, fn, seed=1) != bootstrap_f1(tp, fp, fn, seed=2)
    draws = []
    for _ in range(1500):
        drawn = rng.integers(0, 60, 60)
        draws.append(float(counts_to_scores(tp[drawn].sum(), fp[drawn].sum(), fn[drawn].sum())[2]))
    assert (low, high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.02)
    narrow_low, narrow_high = bootstrap_f1(tp, fp, fn, seed=1, level=0.5)
    assert low < narrow_low < narrow_high < high


@pytest.mark.parametrize("steps", [None, 5])
def test_threshold_is_the_best_of_all(steps):
    rng = np.random.default_rng(3)
    for _ in range(40):
        fields = random_fields(rng, 4, crowding=25, steps=steps)
        threshold, curve = choose_threshold(fields, 5.0)
        by_hand = {t: brute_force_f1(fields, t, 5.0) for t in np.concatenate([f[2] for f in fields])}
        assert curve["threshold"].tolist() == sorted(by_hand, reverse=True)
        assert curve["f1"].tolist() == pytest.approx([by_hand[t] for t in curve["threshold"]])
        best = max(by_hand.values(), default=0)
        if best == 0:
            assert threshold == 0.5
            continue
        assert brute_force_f1(fields, threshold, 5.0) == pytest.approx(best)
        at = max(t for t, f1 in by_hand.items() if f1 > best - 1e-12)
        below = max((t for t in by_hand if t < at), default=at)
        assert threshold == pytest.approx((at + below) / 2)


def curve_of(odds, f1):
    return pd.DataFrame({"threshold": expit(np.asarray(odds, float)), "f1": f1})


def test_a_plateau_threshold_is_the_middle_of_what_nearly_reaches_the_best():
    # 0.6 is the best, 0.51 is 85 % of it: from log odds 5 to just above -2, where F1 falls to 0.5
    curve = curve_of([6, 5, 4, 3, 0, -2], [0.4, 0.52, 0.6, 0.2, 0.52, 0.5])
    assert logit(plateau_threshold(curve)) == pytest.approx((5 - 2) / 2)
    assert logit(plateau_threshold(curve[:5])) == pytest.approx((5 + 0) / 2)  # nothing is known below the last
    assert plateau_threshold(curve_of([1.0], [0.5])) == pytest.approx(expit(1.0))
    for nothing in (curve_of([], []), curve_of([1.0, 0.0], [0.0, 0.0])):
        assert plateau_threshold(nothing) == 0.5


def test_threshold_by_hand_and_when_there_is_nothing_to_choose_by():
    field = (np.array([[0.0, 0]]), np.array([[1.0, 0], [50, 50]]), np.array([0.9, 0.3], dtype=np.float32))
    threshold, curve = choose_threshold([field], 5)
    assert threshold == pytest.approx(0.6)
    assert curve["precision"].tolist() == [1, 0.5]
    assert curve["recall"].tolist() == [1, 1]
    for fields in ([], [(NOTHING, NOTHING, np.empty(0))], [(NOTHING, *field[1:])]):
        threshold, curve = choose_threshold(fields, 5)
        assert threshold == 0.5
        assert list(curve.columns) == ["threshold", "precision", "recall", "f1"]


def test_average_precision_is_scikit_learns_where_every_mitosis_is_found():
    rng = np.random.default_rng(0)
    probability, right = rng.uniform(size=200).round(2), rng.uniform(size=200) < 0.3
    far = 100.0 * np.arange(200)[:, None] * [1, 0]  # every detection matches its own annotation or none
    expected = average_precision_score(right, probability)
    assert average_precision(choose_threshold([(far[right], far, probability)], 1.0)[1]) == pytest.approx(expected)
    # as many mitoses again that nothing finds: every recall halves
    missed = np.concatenate([far[right], -far[right] - 1000])
    assert average_precision(choose_threshold([(missed, far, probability)], 1.0)[1]) == pytest.approx(expected / 2)
    assert average_precision(choose_threshold([(far, NOTHING, np.empty(0))], 1.0)[1]) == 0


def test_threshold_of_many_fields_is_fast():
    rng = np.random.default_rng(0)
    points = [(rng.uniform(0, 1500, (8, 2)), rng.uniform(0, 1500, (300, 2))) for _ in range(100)]
    fields = [(*pair, rng.uniform(size=300)) for pair in points]
    start = time.perf_counter()
    choose_threshold(fields, 33)
    assert time.perf_counter() - start < 2


def tables():
    annotations = pd.DataFrame(
        [("a", 10, 10, 1), ("a", 200, 200, 1), ("b", 50, 50, 1), ("a", 400, 400, 0), ("other", 5, 5, 1)],
        columns=["image", "x_px", "y_px", "label"],
    )
    detections = pd.DataFrame(
        [
            ("a", 12, 10, 0.9),
            ("a", 14, 10, 0.8),
            ("a", 400, 400, 0.7),
            ("b", 50, 85, 0.6),
            ("b", 50, 50, 0.4),
        ],
        columns=["image", "x_px", "y_px", "probability"],
    )
    return annotations, detections


def test_evaluation_by_hand():
    """The hard negative at 400, 400 is no mitosis, the field of no interest is left out, the empty one counts."""
    annotations, detections = tables()
    um_per_px = {"a": 0.25, "b": 0.25, "empty": 0.25}
    figures, per_field = evaluate(annotations, detections, um_per_px, threshold=0.6)
    assert per_field.to_numpy().tolist() == [["a", 1, 2, 1], ["b", 0, 1, 1], ["empty", 0, 0, 0]]
    keys = ["tp", "fp", "fn", "precision", "recall", "f1", "f1_low", "f1_high"]
    assert list(figures) == [*keys, "fields", "mitoses", "threshold", "match"]
    assert figures["precision"] == pytest.approx(1 / 4)
    assert figures["recall"] == pytest.approx(1 / 3)
    assert figures["f1"] == pytest.approx(2 / 7)
    assert figures["f1_low"] <= figures["f1"] <= figures["f1_high"]
    assert [figures[key] for key in ("fields", "mitoses", "threshold", "match")] == [3, 3, 0.6, "um"]
    assert evaluate(annotations, detections, um_per_px, 0.4)[0]["tp"] == 2
    assert evaluate(annotations, detections, {**um_per_px, "b": 0.2}, 0.6)[0]["tp"] == 2
    kinder, _ = evaluate(annotations, detections, dict.fromkeys(um_per_px), 0.6, match="uts")
    assert [kinder[key] for key in ("tp", "fp", "fn")] == [1, 2, 2]


def test_evaluation_without_detections_or_without_anything():
    annotations, detections = tables()
    figures, _ = evaluate(annotations, detections[:0], {"a": 0.25}, 0.5)
    assert [figures[key] for key in ("tp", "fp", "fn", "f1")] == [0, 0, 2, 0]
    figures, per_field = evaluate(annotations[:0], detections[:0], {}, 0.5)
    assert [figures[key] for key in ("fields", "mitoses", "f1")] == [0, 0, 0]
    assert per_field.empty


def test_evaluation_refuses_what_would_give_a_wrong_figure():
    annotations, detections = tables()
    with pytest.raises(InputError, match=r"^b: .*--um_per_px"):
        evaluate(annotations, detections, {"a": 0.25, "b": float("nan")}, 0.5)
    with pytest.raises(InputError, match="'b', which is not among"):
        evaluate(annotations, detections, {"a": 0.25}, 0.5)
    detections["x_px"] = detections["x_px"].astype(float)
    detections.loc[0, "x_px"] = np.nan
    with pytest.raises(InputError, match=r"^a: .*no number"):
        evaluate(annotations, detections, {"a": 0.25, "b": 0.25}, 0.5)
