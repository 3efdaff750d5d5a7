"""Candidates: the nucleus centres of a field, those most like a mitosis first.

A candidate is a local maximum of the smoothed optical density of red, where hematoxylin absorbs and eosin hardly does.
Darkness alone ranks badly on a laboratory that stains every nucleus dark, so four measures are taken at each candidate,
each against the field's own candidates (median 0, interquartile range 1: the stain and the scanner drop out), and summed:
contrast to the surroundings, hue of the core, hue of the whole nucleus (negative: a core bluer than its nucleus is
condensed chromatin), and the darkness of the lightest place nearby (negative for nuclei at a gap or a vessel).
The weights are a logistic regression on mitoses against other nuclei, rounded; tests/benchmarks/candidates.py measures them.
"""

import math

import cv2
import numpy as np

from dasc.run import InputError

PER_MM2 = 1800.0  # candidates kept per square millimetre of field
AT_LEAST = 8  # kept however small the field is
WORKING_UM_PER_PX = 0.5  # finer fields are brought to this resolution, so that scanners differ little; coarser stay
CORE_UM = 0.7  # Gaussian that turns a nucleus, or its chromatin, into one maximum
NUCLEUS_UM = 1.5  # Gaussian that averages over a nucleus
SURROUNDINGS_UM = 4.5  # Gaussian that averages over a nucleus and what lies round it
NEARBY_UM = 6.0  # half the side of the square searched for the lightest place
APART_UM = 2.7  # two candidates are at least this far apart
RISE = 0.03  # optical density by which a candidate exceeds the lightest place within APART_UM; below is noise
PALE = 0.15  # optical density added under the hue's fraction, so that white has no hue
BLACK = 12  # a pixel whose brightest channel is not above this is padding, not tissue
WEIGHTS = (2.0, 3.8, -2.7, 0.5)  # contrast, hue of the core, hue of the nucleus, lightest place nearby
SMALLEST_SPREAD = (0.02, 0.01, 0.01, 0.02)  # of each measure, for fields with hardly any nuclei
FARTHEST = (-4.0, 8.0)  # a measure counts no further than this, in interquartile ranges from the median


def find_candidates(
    image: np.ndarray, um_per_px: float, per_mm2: float | None = PER_MM2
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nuclei of a field, ranked by how likely a mitosis or a look-alike sits there.

    image: (H, W, 3) uint8 RGB. per_mm2: the most candidates per square millimetre (AT_LEAST on a tiny field), None: all.
    Returns points_px, (N, 2) float64 x, y in the field's own pixels, and score, (N,) float64, descending: relative to
    the field's other nuclei, not a probability.
    Raises InputError when um_per_px lies outside 0.1-1.0 or the image is not 8-bit RGB.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"image to search: found {image.dtype} {image.shape}, expected (H, W, 3) uint8 RGB")
    if not 0.1 <= um_per_px <= 1.0:
        raise InputError(f"image to search: found {um_per_px} um/px, expected 0.1-1.0; set --um_per_px")
    height, width = image.shape[:2]
    working_um = max(WORKING_UM_PER_PX, um_per_px)
    scale = um_per_px / working_um
    size = max(1, round(width * scale)), max(1, round(height * scale))
    red, total, black = _optical_density(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    column, row, measures = _measure(red, total, black, working_um)
    if len(row) == 0:
        return np.zeros((0, 2)), np.zeros(0)

    lower, middle, upper = np.percentile(measures, [25, 50, 75], axis=0)
    standard = np.clip((measures - middle) / np.maximum(upper - lower, SMALLEST_SPREAD), *FARTHEST)
    score = (standard * WEIGHTS).sum(axis=1)
    order = np.argsort(-score, kind="stable")
    if per_mm2 is not None:
        area_mm2 = height * width * um_per_px**2 / 1e6
        order = order[: max(AT_LEAST, int(per_mm2 * area_mm2))]
    working_points = np.stack([column, row], axis=1)[order].astype(np.float64)
    points_px = (working_points + 0.5) * [width / size[0], height / size[1]] - 0.5
    return points_px, score[order]


def _optical_density(small: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Optical density of red, and of the three channels together, (h, w) float32; black padding, (h, w) bool.

    Padding gets the tissue's median, so that the nuclei beside it are neither hidden nor favoured.
    """
    density_of = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
    red = density_of[small[:, :, 0]]
    total = red + density_of[small[:, :, 1]]
    total += density_of[small[:, :, 2]]
    padding = cv2.max(cv2.max(small[:, :, 0], small[:, :, 1]), small[:, :, 2]) <= BLACK
    # Lossy compression and resampling smear the border of the padding over its neighbours.
    black = cv2.dilate(padding.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    if black.any() and not black.all():
        red[black], total[black] = np.median(red[~black]), np.median(total[~black])
    return red, total, black


def _measure(
    red: np.ndarray, total: np.ndarray, black: np.ndarray, working_um: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column and row of every candidate, (N,), and its four measures in the order of WEIGHTS, (N, 4) float64."""
    core = _smooth(red, CORE_UM / working_um)
    radius = math.ceil(APART_UM / working_um)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    peak = (core >= cv2.dilate(core, disk)) & (core > cv2.erode(core, disk) + RISE) & ~black
    row, column = _first_of_each(peak)
    side = 2 * round(NEARBY_UM / working_um) + 1
    lightest = cv2.erode(core, np.ones((side, side), np.uint8))[row, column]
    core_hue = core[row, column] / (_smooth(total, CORE_UM / working_um)[row, column] + PALE)
    nucleus = _smooth(red, NUCLEUS_UM / working_um)
    surroundings = _smooth_widely(nucleus, working_um)
    contrast = nucleus[row, column] - surroundings[row, column]
    nucleus_hue = nucleus[row, column] / (_smooth(total, NUCLEUS_UM / working_um)[row, column] + PALE)
    return column, row, np.stack([contrast, core_hue, nucleus_hue, lightest], axis=1).astype(np.float64)


def _smooth(density: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(density, (0, 0), sigma)


def _smooth_widely(nucleus: np.ndarray, working_um: float) -> np.ndarray:
    """Smooth what is already smooth by NUCLEUS_UM up to SURROUNDINGS_UM, at half the size: a quarter of the work."""
    height, width = nucleus.shape
    half = cv2.resize(nucleus, ((width + 1) // 2, (height + 1) // 2), interpolation=cv2.INTER_AREA)
    sigma_um = math.sqrt(SURROUNDINGS_UM**2 - NUCLEUS_UM**2)
    half = _smooth(half, sigma_um / (2 * working_um))
    return cv2.resize(half, (width, height), interpolation=cv2.INTER_LINEAR)


def _first_of_each(peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of one pixel of each connected group: equal neighbours on a plateau are one candidate."""
    _, label = cv2.connectedComponents(peak.astype(np.uint8), connectivity=8)
    row, column = np.nonzero(peak)
    _, first = np.unique(label[row, column], return_index=True)
    return row[first], column[first]
