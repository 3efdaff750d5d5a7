"""What the training loops share: the order of an epoch, the learning rate, and how a network does on val."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import precision_recall_curve
from torch import Tensor
from tqdm import tqdm

from dasc.calibration import UNCALIBRATED, background, calibrate, fit_calibration, reliability, right_detections
from dasc.detect import detections_of, look_at
from dasc.errors import InputError
from dasc.fields import read_field
from dasc.manifest import LABELS
from dasc.metrics import choose_threshold, counts_to_scores, plateau_threshold
from dasc.network import SearchNetwork


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of one epoch: as many as there are patches, half of each label, every patch as evenly as can be."""
    halves = []
    for label in LABELS:
        members = torch.nonzero(labels == label).flatten()
        wanted = len(labels) // 2
        rounds = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-wanted // len(members)))]
        halves.append(torch.cat(rounds)[:wanted])
    both = torch.cat(halves)
    return both[torch.randperm(len(both), generator=generator)]


def batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """An epoch's order in batches; a last one of a single patch, which batch norm cannot take, joins its neighbour."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def check_batch(batch_size: int, patch_size: int, stride: int) -> None:
    """Raise InputError where batch norm would have one value per channel: batches of one patch, maps of one cell."""
    if batch_size == 1 and patch_size <= stride:
        raise InputError(
            f"--batch_size 1: patches of {patch_size} px at stride {stride} give one value per channel, and batch norm "
            "needs two; expected 2 or more"
        )


def cosine(progress: float) -> float:
    """Falls from 1 to 0 as progress goes from 0 to 1."""
    return 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    """F1 at the best threshold for these patches: labels (N,) 0 or 1, scores (N,).

    Raises:
        InputError: scores that are not finite, as those of a network whose last step went too far.
    """
    if not np.isfinite(scores).all():
        raise InputError("the network's probabilities on val are not finite: the training has diverged; lower --lr")
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float((2 * precision * recall / (precision + recall).clip(min=1e-12)).max())


def check_val_fields(data_root: Path, fields: pd.DataFrame) -> None:
    """Raise InputError where an image of a val field is gone, before hours of training rather than after."""
    for path in fields.loc[fields["split"] == "val", "path"]:
        if not (data_root / path).is_file():
            raise InputError(f"{data_root / path}: this val field is gone; --data_root names the dataset's folder")


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
