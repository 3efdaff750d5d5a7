"""Which detections are right: matching against annotations, precision, recall, F1, and the threshold."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from dasc.errors import InputError

RADIUS_UM = 7.5  # the MIDOG challenge's radius: about that of a mitotic figure
PLATEAU_SHARE = 0.85  # of the best F1; less takes the middle of a wider stretch of thresholds
UTS_RADIUS_PX = 30  # the radius the paper and its baseline (UTS) count with


def match_detections(truth_xy: np.ndarray, detections_xy: np.ndarray, radius: float) -> np.ndarray:
    """Give every annotation, in their order, its nearest still free detection at a distance <= `radius`.

    truth_xy (T, 2), detections_xy (D, 2) and radius share one unit; of equally near detections the first is
    taken. Returns (T,) int64: the index of the detection, -1 where the annotation is missed. It is the
    one-to-one rule of the MIDOG challenge's evaluator (score_detection of grand-challenge-metrics, formerly
    evalutils).
    """
    truth_xy, detections_xy = _points(truth_xy), _points(detections_xy)
    taken_by = np.full(len(truth_xy), -1, dtype=np.int64)
    free = np.ones(len(detections_xy), dtype=bool)
    for annotation, point in enumerate(truth_xy):
        distance = np.where(free, np.hypot(*(detections_xy - point).T), np.inf)
        if distance.size and distance.min() <= radius:
            taken_by[annotation] = distance.argmin()
            free[taken_by[annotation]] = False
    return taken_by


def match_uts(
    truth_xy: np.ndarray, detections_xy: np.ndarray, radius: float = UTS_RADIUS_PX
) -> tuple[np.ndarray, np.ndarray]:
    """Match many to one: found (T,) where any detection, right (D,) where any annotation is near.

    Both bool, near is a distance <= `radius`. True positives are the mitoses found and false positives the
    detections that are not right, so several detections of one mitosis count once and cost nothing, and one
    detection may find two mitoses: kinder than `match_detections`, and not to be compared with it.
    """
    truth_xy, detections_xy = _points(truth_xy), _points(detections_xy)
    found = np.zeros(len(truth_xy), dtype=bool)
    right = np.zeros(len(detections_xy), dtype=bool)
    for annotation, point in enumerate(truth_xy):
        near = np.hypot(*(detections_xy - point).T) <= radius
        found[annotation] = near.any()
        right |= near
    return found, right


def match_field(
    truth_px: np.ndarray,
    detections_px: np.ndarray,
    um_per_px: float | None,
    match: str = "um",
    radius_um: float = RADIUS_UM,
) -> tuple[np.ndarray, np.ndarray]:
    """Match one field's points (in pixels) by the rule named `match`: found (T,) bool and right (D,) bool.

    "um" is `match_detections` within `radius_um`, "uts" is `match_uts` within 30 px. Raises InputError for
    another name, and for "um" without a known um/px.
    """
    if match == "uts":
        return match_uts(truth_px, detections_px)
    if match != "um":
        raise InputError(f"match {match!r}: expected um (7.5 um, one to one) or uts (30 px, many to one)")
    if um_per_px is None or not um_per_px > 0:
        raise InputError(f"um/px is {um_per_px}, matching within {radius_um} um needs it: give --um_per_px")
    taken_by = match_detections(_points(truth_px) * um_per_px, _points(detections_px) * um_per_px, radius_um)
    right = np.zeros(len(detections_px), dtype=bool)
    right[taken_by[taken_by >= 0]] = True
    return taken_by >= 0, right


def counts_to_scores(tp, fp, fn):
    """Precision, recall and F1 of counts (numbers or arrays); 0 wherever the denominator is 0."""
    tp, fp, fn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn))
    precision = tp / np.maximum(tp + fp, 1)
    recall = tp / np.maximum(tp + fn, 1)
    return precision, recall, 2 * tp / np.maximum(2 * tp + fp + fn, 1)


def bootstrap_f1(
    tp: Sequence[int],
    fp: Sequence[int],
    fn: Sequence[int],
    seed: int = 0,
    repeats: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval (low, high) of the pooled F1 when fields, one count each, are drawn again with replacement."""
    counts = np.stack([tp, fp, fn], axis=1)
    if not len(counts):
        return 0.0, 0.0
    times_drawn = np.random.default_rng(seed).multinomial(
        len(counts), np.full(len(counts), 1 / len(counts)), size=repeats
    )
    f1 = counts_to_scores(*(times_drawn @ counts).T)[2]
    low, high = np.quantile(f1, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def choose_threshold(
    fields: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], radius: float
) -> tuple[float, pd.DataFrame]:
    """Find the threshold with the highest pooled F1 when the detections that reach it are matched one to one.

    fields: per field truth_xy (T, 2), detections_xy (D, 2) and probability (D,), in the unit of `radius`.
    Returns the threshold and the exact curve (threshold, precision, recall, f1), a row per distinct
    probability, descending. A detection counts when its probability >= threshold. Every threshold above the
    next lower probability scores the same as the best one, and the middle of that gap is returned; of equal
    F1, the highest threshold. Without any true positive there is nothing to choose by, and 0.5 is returned.
    """
    steps = [(np.empty(0), np.empty(0))]
    for truth_xy, detections_xy, probability in fields:
        steps.append(_true_positive_steps(truth_xy, detections_xy, np.asarray(probability, np.float64), radius))
    step_at, step = (np.concatenate(column) for column in zip(*steps, strict=True))
    scores = np.concatenate([np.empty(0), *(np.asarray(field[2], np.float64) for field in fields)])
    thresholds, detections_at = np.unique(scores, return_counts=True)
    thresholds, detections = thresholds[::-1], detections_at[::-1].cumsum()
    gained = np.zeros(len(thresholds))
    np.add.at(gained, np.searchsorted(-thresholds, -step_at), step)
    tp = gained.cumsum()
    mitoses = sum(len(_points(field[0])) for field in fields)
    precision, recall, f1 = counts_to_scores(tp, detections - tp, mitoses - tp)
    curve = pd.DataFrame({"threshold": thresholds, "precision": precision, "recall": recall, "f1": f1})
    if not len(f1) or f1.max() == 0:
        return 0.5, curve
    best = int(f1.argmax())
    if best + 1 == len(thresholds):
        return float(thresholds[best]), curve
    middle = (thresholds[best] + thresholds[best + 1]) / 2
    return float(middle if middle > thresholds[best + 1] else thresholds[best]), curve


def plateau_threshold(curve: pd.DataFrame) -> float:
    """The middle, in log odds, of the thresholds whose F1 reaches PLATEAU_SHARE of the best: for other fields.

    The best F1 of a few fields stands on a peak that other fields do not share, the middle of the plateau below it
    depends less on them. curve: of `choose_threshold`; 0.5 where it holds no true positive.
    """
    f1 = curve["f1"].to_numpy(float)
    if not f1.any():
        return 0.5
    odds = logit(np.clip(curve["threshold"].to_numpy(float), 1e-7, 1 - 1e-7))
    reach = np.flatnonzero(f1 >= PLATEAU_SHARE * f1.max())
    below = min(reach[-1] + 1, len(odds) - 1)  # as far down as nothing more is detected
    return float(expit((odds[reach[0]] + odds[below]) / 2))


def average_precision(curve: pd.DataFrame) -> float:
    """Mean precision over the recalls that a curve of `choose_threshold` goes through: the area below its steps.

    It needs no threshold. Recall that no detection reaches adds 0, as in the COCO and PASCAL VOC challenges; precision
    is not interpolated (sklearn.metrics.average_precision_score).
    """
    gained = np.diff(curve["recall"], prepend=0)
    return float((gained * curve["precision"]).sum())


def evaluate(
    annotations: pd.DataFrame,
    detections: pd.DataFrame,
    um_per_px: Mapping[str, float | None],
    threshold: float,
    match: str = "um",
    radius_um: float = RADIUS_UM,
    seed: int = 0,
) -> tuple[dict, pd.DataFrame]:
    """Score detections of probability >= threshold, pooled over fields: the figures, and each field's counts.

    um_per_px: image -> um/px, the fields to judge, those with nothing in them included. annotations: image,
    x_px, y_px; rows of other images or with another `label` than 1 are left out. detections: image, x_px,
    y_px, probability. The figures are those of metrics.json; f1_low and f1_high are a 95 % bootstrap over
    fields. Raises InputError for a detection on a field that is not judged, a point that is no number, and
    as `match_field`.
    """
    unknown = sorted(set(detections["image"]) - set(um_per_px))
    if unknown:
        raise InputError(f"detections on {unknown[0]!r}, which is not among the {len(um_per_px)} fields to judge")
    if "label" in annotations:
        annotations = annotations[annotations["label"] == 1]
    kept = detections[detections["probability"] >= threshold]
    truth_of, detected_of = (_points_by_image(table) for table in (annotations, kept))
    rows = []
    for image, resolution in um_per_px.items():
        nothing = np.empty((0, 2))
        truth, detected = truth_of.get(image, nothing), detected_of.get(image, nothing)
        if not (np.isfinite(truth).all() and np.isfinite(detected).all()):
            raise InputError(f"{image}: a point that is no number; correct x_px and y_px")
        try:
            found, right = match_field(truth, detected, resolution, match, radius_um)
        except InputError as error:
            raise InputError(f"{image}: {error}") from error
        rows.append((image, int(found.sum()), int((~right).sum()), int((~found).sum())))
    per_field = pd.DataFrame(rows, columns=["image", "tp", "fp", "fn"])
    tp, fp, fn = (int(per_field[name].sum()) for name in ("tp", "fp", "fn"))
    precision, recall, f1 = (float(score) for score in counts_to_scores(tp, fp, fn))
    f1_low, f1_high = bootstrap_f1(per_field["tp"], per_field["fp"], per_field["fn"], seed)
    figures = {"tp": tp, "fp": fp, "fn": fn, "precision": precision, "recall": recall, "f1": f1}
    figures |= {"f1_low": f1_low, "f1_high": f1_high, "fields": len(per_field), "mitoses": tp + fn}
    return figures | {"threshold": float(threshold), "match": match}, per_field


def fields_in_um(
    annotations: pd.DataFrame, detections: pd.DataFrame, um_per_px: Mapping[str, float]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The tables that `evaluate` takes as the fields, in um, that `choose_threshold` takes."""
    truth_of, detected_of = (dict(list(table.groupby("image"))) for table in (annotations, detections))
    fields = []
    for image, resolution in um_per_px.items():
        truth, detected = truth_of.get(image, annotations[:0]), detected_of.get(image, detections[:0])
        places = [table[["x_px", "y_px"]].to_numpy(np.float64) * resolution for table in (truth, detected)]
        fields.append((*places, detected["probability"].to_numpy()))
    return fields


def _points(points: np.ndarray) -> np.ndarray:
    return np.asarray(points, dtype=np.float64).reshape(-1, 2)


def _points_by_image(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {image: rows[["x_px", "y_px"]].to_numpy(np.float64) for image, rows in table.groupby("image")}


def _true_positive_steps(
    truth_xy: np.ndarray, detections_xy: np.ndarray, probability: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where the threshold's descent changes one field's true positives: the probabilities, and by how much.

    Only detections near an annotation can change the matching, so it is redone at their probabilities
    alone.
    """
    _, near = match_uts(truth_xy, detections_xy, radius)
    near_xy, near_probability = _points(detections_xy)[near], probability[near]
    at = np.unique(near_probability)[::-1]
    tp = [(match_detections(truth_xy, near_xy[near_probability >= t], radius) >= 0).sum() for t in at]
    return at, np.diff(tp, prepend=0)
