"""Calibrated probabilities, and thresholds for a wanted precision or recall, both from the val fields.

What a network makes of ordinary nuclei moves with the stain by several units of log odds, and a threshold with it. So
every image's log odds are moved first until its ordinary candidates have those of the val fields: score alignment.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, logit

from dasc.errors import InputError
from dasc.judge.metrics import match_detections

ALIGNMENT_QUANTILE = 0.75  # of the log odds of an image's candidates; well below mitoses, near what resembles them
ALIGNMENT_PRIOR = 32  # candidates that the val fields' level counts for, so that a few cannot set an image's own
FEWEST = 10  # right and wrong detections without which nothing is fitted


@dataclass(frozen=True)
class Calibration:
    """How a network's probabilities become those that say how many detections are right.

    Calibrated: sigmoid((logit(p) + shift) / temperature + offset), where the shift aligns the image.

    alignment: mean `ordinary_odds` of the val fields, which every image is moved to; None: no image is aligned.
    """

    temperature: float = 1.0
    offset: float = 0.0
    alignment: float | None = None

    @property
    def fitted(self) -> bool:
        """Whether the val fields gave a temperature and an offset."""
        return (self.temperature, self.offset) != (1.0, 0.0)

    def shift_of(self, odds: np.ndarray) -> float:
        """What to add to an image's log odds so that its ordinary candidates have those of val.

        It is less for few candidates, and 0 where nothing is aligned.

        odds: (N,), of all candidates of the image, in one view.
        """
        if self.alignment is None or not len(odds):
            return 0.0
        return (self.alignment - ordinary_odds(odds)) * len(odds) / (len(odds) + ALIGNMENT_PRIOR)

    def calibrate(self, probabilities: np.ndarray, shift: float = 0.0) -> np.ndarray:
        """Calibrated probabilities (N,); the same ones where nothing was fitted and nothing is shifted.

        probabilities: (N,), the network's own. shift: of the image, as `shift_of`.
        """
        if not self.fitted and shift == 0.0:
            return np.asarray(probabilities, float)
        return expit((logit(_open(probabilities)) + shift) / self.temperature + self.offset)

    def uncalibrate(self, probability: float, shift: float = 0.0) -> float:
        """The network's own probability that `calibrate` turns into this one."""
        return float(expit((logit(_open(np.float64(probability))) - self.offset) * self.temperature - shift))


UNCALIBRATED = Calibration()


def ordinary_odds(odds: np.ndarray) -> float:
    """The log odds that a quarter of an image's candidates exceed.

    odds: (N,), of all candidates of the image, N > 0.
    """
    return float(np.quantile(odds, ALIGNMENT_QUANTILE))


def right_detections(fields: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], radius: float) -> np.ndarray:
    """Which detections match a mitosis: (N,) bool, in the order of the fields.

    fields: as `metrics.choose_threshold` takes them. radius: in the unit of the places.
    """
    right = [np.zeros(0, bool)]
    for truth_xy, detections_xy, _ in fields:
        matched = np.zeros(len(detections_xy), bool)
        taken_by = match_detections(truth_xy, detections_xy, radius)
        matched[taken_by[taken_by >= 0]] = True
        right.append(matched)
    return np.concatenate(right)


def fit_calibration(probabilities: np.ndarray, right: np.ndarray, weights: np.ndarray | None = None) -> Calibration:
    """Temperature and offset that make probabilities agree with how many detections are right; no alignment.

    The offset stands beside the temperature because training sees as many mitoses as negatives and a field does not; a
    temperature alone would leave 0.5 where it is. Fitted by maximum likelihood with Platt's softened targets (Platt
    1999), so that a few detections cannot give certainty. With fewer than FEWEST of either kind, or where the
    probabilities do not rise with being right, nothing is changed.

    probabilities: (N,), of detections. right: (N,) bool. weights: (N,), how much each counts; None: all alike.
    """
    hits, misses = int(right.sum()), int((~right).sum())
    if min(hits, misses) < FEWEST:
        return UNCALIBRATED
    x = logit(_open(probabilities))
    target = np.where(right, (hits + 1) / (hits + 2), 1 / (misses + 2))

    def loss(parameters: np.ndarray) -> float:
        z = parameters[0] * x + parameters[1]
        return float(np.average(np.logaddexp(0, z) - target * z, weights=weights))

    slope, offset = minimize(loss, np.array([1.0, 0.0]), method="BFGS").x
    if not (np.isfinite([slope, offset]).all() and slope > 0.05):
        return UNCALIBRATED
    return Calibration(temperature=float(1 / slope), offset=float(offset))


def resolve_threshold(text: str, threshold: float, val_curve: dict[str, list] | None, path: Path) -> float:
    """The probability from which a detection counts: a number in 0..1, `best`, or a goal such as `precision=0.8`.

    best: the model's own threshold. precision=P: of the thresholds with at least this precision on val the one with the
    highest recall. recall=R: of those with at least this recall the one with the highest precision.

    threshold, val_curve: of the model at `path`; the curve's columns are threshold, precision and recall.
    Raises: InputError: another text, a model without its val curve, a goal that val never reaches.
    """
    if text == "best":
        return threshold
    goal = re.fullmatch(r"(?:(precision|recall)=)?(\d*\.?\d+)", text)
    if not goal or float(goal[2]) > 1:
        raise InputError(f"--threshold {text}: expected best, a number in 0..1, precision=0.8 or recall=0.9")
    name, value = goal[1], float(goal[2])
    if not name:
        return value
    if not (val_curve or {}).get("threshold"):
        raise InputError(f"{path}: holds no val curve to resolve --threshold {text} by; train again, or give a number")
    curve = pd.DataFrame(val_curve)
    reached = curve[curve[name] >= value]
    if reached.empty:
        raise InputError(f"--threshold {text}: on val {path} reaches a {name} of {curve[name].max():.3f} at most")
    other = "recall" if name == "precision" else "precision"
    return float(reached.sort_values([other, "threshold"], ascending=False)["threshold"].iloc[0])


def _open(probabilities: np.ndarray) -> np.ndarray:
    return np.clip(np.asarray(probabilities, float), 1e-7, 1 - 1e-7)
