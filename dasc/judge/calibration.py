"""Calibrated probabilities, and thresholds for a wanted precision or recall, both from the val fields.

What a network makes of ordinary nuclei moves with the stain by several units of log odds, and a threshold with it. So
every image's log odds are moved first until its ordinary candidates have those of the val fields: its background.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.optimize import minimize
from scipy.special import expit, logit

from dasc.errors import InputError
from dasc.files import replacing
from dasc.judge.metrics import match_detections

UNCALIBRATED = {"temperature": 1.0, "offset": 0.0}
BACKGROUND_QUANTILE = 0.75  # of the log odds of an image's candidates; well below mitoses, near what resembles them
BACKGROUND_PRIOR = 32  # candidates that the val fields' background counts for, so that a few cannot set an image's own
FEWEST = 10  # right and wrong detections without which nothing is fitted
BINS = 10  # of the reliability plot, equally wide; those with fewer than FEWEST_IN_BIN detections are left out
FEWEST_IN_BIN = 5


def background(odds: np.ndarray) -> float:
    """An image's background: the log odds (N,) that a quarter of its candidates exceed, N > 0."""
    return float(np.quantile(odds, BACKGROUND_QUANTILE))


def shift_of(odds: np.ndarray, config: dict[str, Any]) -> float:
    """What to add to an image's log odds so that its background is that of the val fields; less for few candidates.

    odds: (N,) of all its candidates, in one view. config: a checkpoint's; 0 where it knows no background, as
    those trained on patches without fields, or before there was one.
    """
    if "background" not in config or not len(odds):
        return 0.0
    return (config["background"] - background(odds)) * len(odds) / (len(odds) + BACKGROUND_PRIOR)


def right_detections(fields: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], radius: float) -> np.ndarray:
    """Which detections match a mitosis, (N,) bool in the order of the fields (as `metrics.choose_threshold` takes)."""
    right = [np.zeros(0, bool)]
    for truth_xy, detections_xy, _ in fields:
        mine = np.zeros(len(detections_xy), bool)
        taken_by = match_detections(truth_xy, detections_xy, radius)
        mine[taken_by[taken_by >= 0]] = True
        right.append(mine)
    return np.concatenate(right)


def fit_calibration(probabilities: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Temperature and offset that make the probabilities (N,) of detections agree with how many are right (N,).

    Calibrated: sigmoid(logit(p) / temperature + offset). The offset stands beside the temperature because training
    sees as many mitoses as negatives and a field does not; a temperature alone would leave 0.5 where it is. Fitted by
    maximum likelihood with Platt's softened targets (Platt 1999), so that a few detections cannot give certainty.
    With fewer than FEWEST of either kind, or where the probabilities do not rise with being right, nothing is changed.
    """
    hits, misses = int(right.sum()), int((~right).sum())
    if min(hits, misses) < FEWEST:
        return dict(UNCALIBRATED)
    x = logit(_open(probabilities))
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2))

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * x + parameters[1]
        return float(np.mean(np.logaddexp(0, z) - target * z))

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    if not (np.isfinite([slope, offset]).all() and slope > 0.05):
        return dict(UNCALIBRATED)
    return {"temperature": float(1 / slope), "offset": float(offset)}


def calibrate(probabilities: np.ndarray, config: dict[str, Any], shift: float = 0.0) -> np.ndarray:
    """Calibrated probabilities (N,) by the image's shift and a checkpoint's temperature and offset.

    Without all of them the same probabilities.
    """
    temperature, offset = (config.get(name, default) for name, default in UNCALIBRATED.items())
    if (temperature, offset, shift) == (1.0, 0.0, 0.0):
        return np.asarray(probabilities, float)
    return expit((logit(_open(probabilities)) + shift) / temperature + offset)


def uncalibrate(probability: float, config: dict[str, Any], shift: float = 0.0) -> float:
    """The network's own probability that `calibrate` turns into this one."""
    temperature, offset = (config.get(name, default) for name, default in UNCALIBRATED.items())
    return float(expit((logit(_open(np.float64(probability))) - offset) * temperature - shift))


def resolve_threshold(text: str, config: dict[str, Any], path: Path) -> float:
    """The probability from which a detection counts: a number in 0..1, `best`, or a goal such as `precision=0.8`.

    best: the checkpoint's own, by F1 on val. precision=P: of those with at least this precision on val
    the one with the highest recall. recall=R: of those with at least this recall the one with the highest precision.
    Errors: InputError for another text, for a checkpoint without its val curve, or what val never reaches.
    """
    if text == "best":
        return config["threshold"]
    goal = re.fullmatch(r"(?:(precision|recall)=)?(\d*\.?\d+)", text)
    if not goal or float(goal[2]) > 1:
        raise InputError(f"--threshold {text}: expected best, a number in 0..1, precision=0.8 or recall=0.9")
    name, value = goal[1], float(goal[2])
    if not name:
        return value
    if not config.get("val_curve", {}).get("threshold"):
        raise InputError(f"{path}: holds no val curve to resolve --threshold {text} by; train again, or give a number")
    curve = pd.DataFrame(config["val_curve"])
    reached = curve[curve[name] >= value]
    if reached.empty:
        raise InputError(f"--threshold {text}: on val {path} reaches a {name} of {curve[name].max():.3f} at most")
    other = "recall" if name == "precision" else "precision"
    return float(reached.sort_values([other, "threshold"], ascending=False)["threshold"].iloc[0])


def reliability(path: Path, probabilities: np.ndarray, right: np.ndarray, config: dict[str, Any]) -> None:
    """Draw how many detections of val are right against their probability, before and after calibration."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.8")
    for name, shown in (("network", probabilities), ("calibrated", calibrate(probabilities, config))):
        bins = np.minimum((shown * BINS).astype(int), BINS - 1)
        groups = [bins == one for one in range(BINS) if (bins == one).sum() >= FEWEST_IN_BIN]
        axis.plot([shown[one].mean() for one in groups], [right[one].mean() for one in groups], marker="o", label=name)
    axis.set(xlabel="mean probability", ylabel="share of detections that are right", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"val fields, {len(right)} detections, {int(right.sum())} right", fontsize=10)
    axis.legend(loc="upper left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _open(probabilities: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(probabilities, float), 1e-7, 1 - 1e-7)
