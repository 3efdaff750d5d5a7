"""What the validation fields fix: score alignment, calibration and threshold."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.detect.field import detections_of, look_at
from dasc.errors import InputError
from dasc.images.read import read_field
from dasc.judge.calibration import UNCALIBRATED, background, calibrate, fit_calibration, reliability, right_detections
from dasc.judge.metrics import choose_threshold, counts_to_scores, plateau_threshold
from dasc.model.network import SearchNetwork


def check_val_fields(data_root: Path, fields: pd.DataFrame) -> None:
    """Raise InputError where an image of a val field is gone, before hours of training rather than after."""
    for path in fields.loc[fields["split"] == "val", "path"]:
        if not (data_root / path).is_file():
            raise InputError(f"{data_root / path}: this val field is gone; --data_root names the dataset's folder")


def threshold_on_val(
    network: SearchNetwork,
    config: dict,
    data_root: Path,
    fields: pd.DataFrame,
    annotations: pd.DataFrame,
    *,
    batch_size: int,
    per_mm2: float,
    match_um: float,
    views: int,
    reliability_path: Path,
    use_background: bool = True,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Scan the val fields as predict.py would: what the checkpoint's config gains, and the whole curve.

    The config gains the mean background of the fields, the calibration (temperature, offset) of the probabilities, the
    threshold (`metrics.plateau_threshold`) and the curve it was chosen from (val_curve), both in calibrated
    probabilities. Draws the reliability plot.

    Args:
        fields, annotations: of all splits, as stage 1 wrote them. use_background: False for a model
        that leaves every image at its own. The rest: as `detect.look_at`.
    """
    of_val = list(fields[fields["split"] == "val"].itertuples())
    looks = [
        look_at(
            network,
            config,
            read_field(data_root / field.path),
            field.um_per_px,
            batch_size=batch_size,
            per_mm2=per_mm2,
            views=views,
        )
        for field in tqdm(of_val, "val fields", leave=False)
    ]
    backgrounds = [background(looked.first) for looked in looks if len(looked.first)]
    common = {"background": float(np.mean(backgrounds))} if use_background and backgrounds else {}
    found = []
    mitoses = annotations[annotations["label"] == 1]
    for field, looked in zip(of_val, looks, strict=True):
        detections = detections_of(looked, common, match_um / field.um_per_px, smallest=0.01)  # not calibrated yet
        truth_px = mitoses.loc[mitoses["image"] == field.image, ["x_px", "y_px"]].to_numpy()
        found_px = detections[["x_px", "y_px"]].to_numpy()
        found.append((truth_px * field.um_per_px, found_px * field.um_per_px, detections["probability"].to_numpy()))
    probabilities = np.concatenate([np.empty(0), *(probability for _, _, probability in found)])
    right = right_detections(found, match_um)
    calibration = fit_calibration(probabilities, right)
    if calibration == UNCALIBRATED:
        print(
            f"the val fields do not calibrate the probabilities ({right.sum()} of {len(right)} detections right): a "
            "threshold chosen on them may not suit other fields; annotate more of them"
        )
    reliability(reliability_path, probabilities, right, calibration)
    found = [(truth, places, calibrate(probability, calibration)) for truth, places, probability in found]
    _, curve = choose_threshold(found, match_um)
    facts = common | calibration | {"threshold": plateau_threshold(curve)}
    return facts | {"val_curve": curve.to_dict("list")}, curve


def threshold_on_patches(labels: np.ndarray, scores: np.ndarray) -> tuple[float, pd.DataFrame]:
    """As `threshold_on_val`, for patches that come from no fields: labels (N,) 0 or 1, scores (N,) of val."""
    here, nowhere = np.zeros((1, 2)), np.empty((0, 2))
    found = [(here if label else nowhere, here, np.array([score])) for label, score in zip(labels, scores, strict=True)]
    return choose_threshold(found, radius=1.0)  # every patch is a field with one detection in it


def judge_patches(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict:
    """How well scores (N,) >= threshold tell the labels (N,) 0 or 1: tp fp fn tn precision recall f1 threshold."""
    found, real = scores >= threshold, labels == 1
    tp, fp, fn = (int(part.sum()) for part in (found & real, found & ~real, ~found & real))
    precision, recall, f1 = (float(score) for score in counts_to_scores(tp, fp, fn))
    counts = {"tp": tp, "fp": fp, "fn": fn, "tn": len(labels) - tp - fp - fn}
    return counts | {"precision": precision, "recall": recall, "f1": f1, "threshold": float(threshold)}
