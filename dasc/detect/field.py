"""Scan a field with a detector: candidates, probabilities, places, merging."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from scipy.special import expit

from dasc.detect.candidates import candidates_of, find_candidates, most_in
from dasc.detect.cutter import PatchCutter
from dasc.images.stain import estimate_stain, tissue_density
from dasc.images.tissue import field_mm2
from dasc.model.checkpoint import Detector
from dasc.model.inference import device_of, log_odds
from dasc.model.network import CamNetwork

SECOND_LOOK_PER_MM2 = 300  # candidates seen again in every view: several times the densest tumours' mitoses
AFTER_FIRST_LOOK_PER_MM2 = 150  # the same for a detector with a first look, which knows better where they are
AT_LEAST = 16  # of them, however small the field is
EDGE_UM = 2.0  # nearer to the image's edge much of a nucleus is cut off, its patch is mirrored: nothing is looked at
CUT_TOGETHER = 1024  # patches cut at once: 13 MB at 64 px, 154 MB at 224 px

logger = logging.getLogger(__name__)


def search_device(device: torch.device) -> torch.device | None:
    """Where candidates are searched for a network on this device, as `candidates.measure_candidates` takes it."""
    return None if device.type == "cpu" else device


def score_points(network: CamNetwork, cutter: PatchCutter, points_px: np.ndarray, batch_size: int) -> np.ndarray:
    """p(mitosis) (N,) at points (N, 2) of the cutter's field, in batches that never lie in memory together."""
    return expit(_log_odds_at(network, cutter, points_px, batch_size))


def _log_odds_at(
    network: CamNetwork, cutter: PatchCutter, points_px: np.ndarray, batch_size: int, views: Sequence[int] = (0,)
) -> np.ndarray:
    odds = [
        log_odds(network, cutter.cut_tensor(points_px[start : start + CUT_TOGETHER]), batch_size, views)
        for start in range(0, len(points_px), CUT_TOGETHER)
    ]
    return torch.cat([torch.empty(0), *odds]).numpy()


def over_all_views(first: np.ndarray, others: np.ndarray, views: int) -> np.ndarray:
    """Log odds (N,) averaged over all views, of those of the first view and the mean of the others."""
    return (first + (views - 1) * others) / views


def off_the_edge(points_px: np.ndarray, width: int, height: int, um_per_px: float) -> np.ndarray:
    """Which points (N, 2), x and y in px of an image, lie at least EDGE_UM from its edge: (N,) bool."""
    inside_px = np.minimum(points_px, np.array([width - 1, height - 1]) - points_px)
    return (inside_px * um_per_px >= EDGE_UM).all(axis=1)


def merge(points_px: np.ndarray, probabilities: np.ndarray, radius_px: float) -> np.ndarray:
    """Indices of the detections that stay, strongest first: none within the radius of a stronger one."""
    order = np.argsort(-probabilities, kind="stable")
    tree = cKDTree(points_px) if len(points_px) else None
    alive = np.ones(len(points_px), dtype=bool)
    kept = []
    for index in order:
        if alive[index]:
            kept.append(index)
            alive[tree.query_ball_point(points_px[index], radius_px)] = False
    return np.array(kept, dtype=int)


class Looked(NamedTuple):
    """What a network makes of a field's candidates.

    points_px: (N, 2), x and y of the likely ones. odds: (N,), their log odds over all views.
    first: (M,), log odds of all candidates in the first view. Both with those of the first look, if there is one.
    """

    points_px: np.ndarray
    odds: np.ndarray
    first: np.ndarray


def look_at(detector: Detector, image: np.ndarray, um_per_px: float, *, batch_size: int) -> Looked:
    """Find a field's candidates, the detector's best per mm2 of tissue, and look at them, at the likely ones again.

    The second look averages the detector's `views` of the best (`most_seen_again`); 1 leaves it out. Nuclei nearer than
    EDGE_UM to the edge are left out: annotators leave them out too (docs/log.md).

    image: (H, W, 3) uint8 RGB. batch_size: patches scored together.
    """
    network, views = detector.network, detector.views
    device = device_of(network)
    stain = estimate_stain(tissue_density(image)) if detector.normalise_stain else None
    area_mm2 = field_mm2(image, um_per_px)
    points_px, added = _candidates(detector, image, um_per_px, area_mm2, stain, device)
    inside = off_the_edge(points_px, image.shape[1], image.shape[0], um_per_px)
    points_px, added = points_px[inside], added[inside]
    cutter = PatchCutter(image, um_per_px, detector.patch_um_per_px, detector.patch_size, device, stain)
    first = _log_odds_at(network, cutter, points_px, batch_size) + added
    if views == 1:
        return Looked(points_px, first, first)
    best = np.argsort(-first, kind="stable")[: most_seen_again(detector, area_mm2)]
    others = _log_odds_at(network, cutter, points_px[best], batch_size, range(1, views)) + added[best]
    return Looked(points_px[best], over_all_views(first[best], others, views), first)


def most_seen_again(detector: Detector, area_mm2: float) -> int:
    """How many candidates of an area are seen again in every view."""
    per_mm2 = SECOND_LOOK_PER_MM2 if detector.first_look is None else AFTER_FIRST_LOOK_PER_MM2
    return max(AT_LEAST, round(per_mm2 * area_mm2))


def _candidates(
    detector: Detector,
    image: np.ndarray,
    um_per_px: float,
    area_mm2: float,
    stain: np.ndarray | None,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """The detector's `per_mm2` best candidates (N, 2), and what its first look adds to their log odds (N,), or 0."""
    most = most_in(area_mm2, detector.per_mm2)
    if detector.first_look is None:
        points_px, _ = find_candidates(image, um_per_px, None, search_device(device))
        return points_px[:most], np.zeros(min(most, len(points_px)), np.float32)
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    points_px, odds = candidates_of(detector.first_look, image, um_per_px, stain, cores)
    return points_px[:most], odds[:most]


def detections_of(looked: Looked, detector: Detector, um_per_px: float, smallest: float) -> pd.DataFrame:
    """What `scan_field` gives, of candidates that were looked at."""
    calibration = detector.calibration
    probabilities = calibration.calibrate(expit(looked.odds), calibration.shift_of(looked.first))
    likely = probabilities >= smallest
    points_px, probabilities = looked.points_px[likely], probabilities[likely]
    kept = merge(points_px, probabilities, detector.merge_um / um_per_px)
    return pd.DataFrame(
        {"x_px": points_px[kept, 0], "y_px": points_px[kept, 1], "probability": probabilities[kept].astype(float)}
    )


def scan_field(
    detector: Detector, image: np.ndarray, um_per_px: float, *, batch_size: int, smallest: float
) -> pd.DataFrame:
    """Detections of one field, strongest first: x_px, y_px in its own pixels, probability.

    Those nearer to each other than the detector's `merge_um` become the strongest of them.

    image: (H, W, 3) uint8 RGB. batch_size: patches scored together.
    smallest: probability below which detections are left out.
    """
    return detections_of(look_at(detector, image, um_per_px, batch_size=batch_size), detector, um_per_px, smallest)
