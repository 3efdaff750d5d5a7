"""Candidates: the nucleus centres of a field, the ones that could be a mitosis first."""

import math

import cv2
import numpy as np

from dasc.run import InputError

WORKING_UM_PER_PX = 0.5  # every field is brought to this resolution, so that scanners differ little
SMOOTH_UM = 0.7  # Gaussian that turns a nucleus into one maximum
APART_UM = 2.7  # two candidates are at least this far apart
PER_MM2 = 1800.0  # candidates kept per square millimetre of field
AT_LEAST = 8  # kept however small the field is
BLACK = 12  # a pixel whose brightest channel is not above this is padding, not tissue


def find_candidates(
    image: np.ndarray, um_per_px: float, per_mm2: float | None = PER_MM2
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nuclei of a field, ranked by how likely a mitosis or a look-alike sits there.

    image: (H, W, 3) uint8 RGB. per_mm2: the most candidates per square millimetre, None for all.
    Returns points_px, (N, 2) float64 x, y in the field's own pixels, and score, (N,) float64, descending.
    Raises InputError when um_per_px lies outside 0.1-1.0 or the image is not RGB of 8 bits.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"find_candidates: found {image.dtype} {image.shape}, expected (H, W, 3) uint8 RGB")
    if not 0.1 <= um_per_px <= 1.0:
        raise InputError(f"find_candidates: um_per_px is {um_per_px}, expected 0.1-1.0; check --um_per_px")
    height, width = image.shape[:2]
    scale = um_per_px / WORKING_UM_PER_PX
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    density_of = (-np.log((np.arange(256, dtype=np.float32) + 1) / 256)).astype(np.float32)
    density = cv2.LUT(small[:, :, 0], density_of)
    black = (small.max(axis=2) <= BLACK).astype(np.uint8)
    black = cv2.dilate(black, np.ones((3, 3), np.uint8))
    density[black > 0] = 0
    smooth = cv2.GaussianBlur(density, (0, 0), SMOOTH_UM / WORKING_UM_PER_PX)
    radius = math.ceil(APART_UM / WORKING_UM_PER_PX)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    peak = (smooth >= cv2.dilate(smooth, disk)) & (smooth > cv2.erode(smooth, disk) + 0.02) & (black == 0)
    _, labels, _, centres = cv2.connectedComponentsWithStats(peak.astype(np.uint8), connectivity=8)
    centres = centres[1:]
    column, row = np.round(centres).astype(int).T
    score = smooth[row, column].astype(np.float64)
    order = np.argsort(-score, kind="stable")
    if per_mm2 is not None:
        area_mm2 = height * width * um_per_px**2 / 1e6
        order = order[: max(AT_LEAST, int(per_mm2 * area_mm2))]
    field_per_working = np.array([width / size[0], height / size[1]])
    points = (centres[order] + 0.5) * field_per_working - 0.5
    return points, score[order]
