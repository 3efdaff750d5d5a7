"""What the validation fields fix: score alignment, calibration and threshold."""

from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.corrections import without_unsure
from dasc.data.cut import ValFields
from dasc.detect.field import detections_of, look_at
from dasc.images.read import read_field
from dasc.judge.calibration import Calibration, fit_calibration, ordinary_odds, right_detections
from dasc.judge.metrics import choose_threshold, counts_to_scores, plateau_threshold
from dasc.model.checkpoint import Detector

SMALLEST = 0.01  # detections below this probability, not calibrated yet, are left out


def fit_to_val(
    detector: Detector, val: ValFields, *, batch_size: int, match_um: float, align: bool = True
) -> tuple[Detector, pd.DataFrame, np.ndarray, np.ndarray]:
    """Fix calibration and threshold by scanning the val fields as predict.py would, with the same scan settings.

    What readers are unsure of is left out, as in judging, and so are detections on it.

    batch_size: patches scored together. match_um: a detection this near to a mitosis is right.
    align: False: for a detector that aligns no image.
    Returns: the detector with calibration, threshold (`metrics.plateau_threshold`) and val_curve; the curve, in
    calibrated probabilities; of all detections the aligned probability, (N,), not calibrated, and whether it is right,
    (N,) bool.
    Raises: InputError: a field that cannot be read.
    """
    fields = list(val.fields.itertuples())
    looks = [
        look_at(detector, read_field(val.root / field.path), field.um_per_px, batch_size=batch_size)
        for field in tqdm(fields, "val fields", leave=False)
    ]
    levels = [ordinary_odds(looked.first) for looked in looks if len(looked.first)]
    alignment = float(np.mean(levels)) if align and levels else None
    aligned = replace(detector, calibration=Calibration(alignment=alignment))
    found = []
    for field, looked in zip(fields, looks, strict=True):
        detections = detections_of(looked, aligned, field.um_per_px, SMALLEST).assign(image=field.image)
        annotations = val.annotations[val.annotations["image"] == field.image]
        truth, detections = without_unsure(annotations, detections, {field.image: field.um_per_px})
        truth_px = truth.loc[truth["label"] == 1, ["x_px", "y_px"]].to_numpy()
        found_px = detections[["x_px", "y_px"]].to_numpy()
        found.append((truth_px * field.um_per_px, found_px * field.um_per_px, detections["probability"].to_numpy()))
    probabilities = np.concatenate([np.empty(0), *(probability for _, _, probability in found)])
    right = right_detections(found, match_um)
    calibration = replace(fit_calibration(probabilities, right), alignment=alignment)
    if not calibration.fitted:
        print(
            f"the val fields do not calibrate the probabilities ({right.sum()} of {len(right)} detections right): a "
            "threshold chosen on them may not suit other fields; annotate more of them"
        )
    found = [(truth, places, calibration.calibrate(probability)) for truth, places, probability in found]
    _, curve = choose_threshold(found, match_um)
    fitted = replace(
        detector, calibration=calibration, threshold=plateau_threshold(curve), val_curve=curve.to_dict("list")
    )
    return fitted, curve, probabilities, right


def fit_to_patches(detector: Detector, labels: np.ndarray, scores: np.ndarray) -> tuple[Detector, pd.DataFrame]:
    """As `fit_to_val`, for patches that come from no fields: the detector with the threshold of best F1, and the curve.

    labels: (N,), 0 or 1. scores: (N,), p(mitosis) of the val patches.
    """
    here, nowhere = np.zeros((1, 2)), np.empty((0, 2))
    found = [(here if label else nowhere, here, np.array([score])) for label, score in zip(labels, scores, strict=True)]
    threshold, curve = choose_threshold(found, radius=1.0)  # every patch is a field with one detection in it
    return replace(detector, threshold=threshold), curve


def judge_patches(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict:
    """How well patches are told by a threshold: tp, fp, fn, tn, precision, recall, f1, threshold.

    labels: (N,), 0 or 1. scores: (N,), p(mitosis).
    """
    found, real = scores >= threshold, labels == 1
    tp, fp, fn = (int(part.sum()) for part in (found & real, found & ~real, ~found & real))
    precision, recall, f1 = (float(score) for score in counts_to_scores(tp, fp, fn))
    counts = {"tp": tp, "fp": fp, "fn": fn, "tn": len(labels) - tp - fp - fn}
    return counts | {"precision": precision, "recall": recall, "f1": f1, "threshold": float(threshold)}
