"""Candidates: the nucleus centres of a field, those most like a mitosis first.

A candidate is a local maximum of the smoothed optical density of red, where hematoxylin absorbs and eosin hardly does.
Darkness alone ranks badly where a laboratory stains every nucleus dark. So four measures are taken at each candidate,
each against the field's own candidates (median 0, interquartile range 1), which cancels stain and scanner:
- contrast of the nucleus to its surroundings: higher for a mitosis;
- hue (red's share of the optical density) of the core: bluer for chromatin, less blue for eosin and pigment;
- hue of the whole nucleus: lower, as condensed chromatin is bluer than the cytoplasm round it;
- density of the lightest place nearby: higher, as a mitosis seldom lies at a gap, a vessel or the tissue's edge.
Their weighted sum is the score. The weights are those of a logistic regression of mitoses against other nuclei of 10
slides and 115 cases, rounded; tests/benchmarks/candidates.py measures what they keep.
"""

import logging
import math

import cv2
import numpy as np
import torch

from dasc.detect.filters import Image, at, enlarge, highest, look_up, lowest, shrink, smooth, to_device, to_numpy
from dasc.errors import InputError
from dasc.images.stain import apply_stain
from dasc.model.first_look import FirstLook
from dasc.model.look_map import odds_map, peaks

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
BLACK = 12  # a pixel whose brightest channel is not above this is black
PADDING_UM = 15.0  # black this wide is padding; less may be the heart of a mitosis on a dark scan
WEIGHTS = (2.0, 3.8, -2.7, 0.5)  # contrast, hue of the core, hue of the nucleus, lightest place nearby
SMALLEST_SPREAD = (0.02, 0.01, 0.01, 0.02)  # of each measure, for fields with hardly any nuclei
MARGIN_UM = 64.0  # how far what lies beside a nucleus may change its measures, padding included
FARTHEST = (-4.0, 8.0)  # a measure counts no further than this, in interquartile ranges from the median

logger = logging.getLogger(__name__)


def find_candidates(
    image: np.ndarray, um_per_px: float, per_mm2: float | None = PER_MM2, device: torch.device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nuclei of a field, ranked by how likely a mitosis or a hard negative sits there.

    image: (H, W, 3) uint8 RGB. per_mm2: the most candidates per square millimetre (but AT_LEAST); None keeps all.
    device: of the search, as `measure_candidates`.
    Returns: points_px, (N, 2) float64, x and y in the field's own pixels; score, (N,) float64, descending, relative to
    the field's other nuclei and no probability.
    Raises: InputError: um_per_px outside 0.1-1.0, or an image that is not 8-bit RGB.
    """
    points_px, measures = measure_candidates(image, um_per_px, device=device)
    if len(points_px) == 0:
        return points_px, np.zeros(0)
    score = score_candidates(measures, *spread_of(measures))
    area_mm2 = image.shape[0] * image.shape[1] * um_per_px**2 / 1e6
    order = np.argsort(-score, kind="stable")[: None if per_mm2 is None else most_in(area_mm2, per_mm2)]
    return points_px[order], score[order]


def most_in(area_mm2: float, per_mm2: float) -> int:
    """How many candidates of an area are kept: `per_mm2`, but AT_LEAST so many."""
    return max(AT_LEAST, int(per_mm2 * area_mm2))


def candidates_of(
    first_look: FirstLook, image: np.ndarray, um_per_px: float, stain: np.ndarray | None, cores: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of a first look: points (N, 2), x and y in px of the image, and log odds (N,), highest first.

    image: (H, W, 3) uint8 RGB, a field or a part of one. stain: of the field, as `stain.apply_stain`. cores: as
    `look_map.odds_map`.
    Raises: InputError: as `find_candidates`.
    """
    _check(image, um_per_px)
    small = at_working_resolution(image, um_per_px)
    points_px, odds = peaks(odds_map(first_look, apply_stain(small, stain), cores))
    return _in_image(points_px, small, image), odds


def measure_candidates(
    image: np.ndarray,
    um_per_px: float,
    padding_density: tuple[float, float] | None = None,
    device: torch.device | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the nuclei of a field or of a part of one, unranked: points_px (N, 2) and measures (N, 4), both float64.

    Nothing about a nucleus depends on what lies farther away than MARGIN_UM, but for black padding.

    image: (H, W, 3) uint8 RGB. padding_density: optical density of red, and of the three channels together, that
    padding is given; None: the median of the image.
    device: None searches with OpenCV on the CPU, anything else with torch there, with the same result up to rounding.
    Raises: InputError: as `find_candidates`.
    """
    _check(image, um_per_px)
    working_um = max(WORKING_UM_PER_PX, um_per_px)
    small = at_working_resolution(image, um_per_px)
    padding = _find_padding(small, working_um)
    if padding.all():
        return np.zeros((0, 2)), np.zeros((0, 4))
    try:
        column, row, measures = _measure(to_device(small, device), padding, padding_density, working_um)
    except torch.OutOfMemoryError:
        logger.warning("the device's memory is full: candidates are searched on the CPU")
        column, row, measures = _measure(small, padding, padding_density, working_um)
    return _in_image(np.stack([column, row], axis=1).astype(np.float64), small, image), measures


def at_working_resolution(image: np.ndarray, um_per_px: float) -> np.ndarray:
    """An image (H, W, 3) uint8 at WORKING_UM_PER_PX, or as it is where it is coarser."""
    scale = um_per_px / max(WORKING_UM_PER_PX, um_per_px)
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _check(image: np.ndarray, um_per_px: float) -> None:
    """Raise InputError where an image cannot be searched."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"image to search: found {image.dtype} {image.shape}, expected (H, W, 3) uint8 RGB")
    if not 0.1 <= um_per_px <= 1.0:
        raise InputError(f"image to search: found {um_per_px} um/px, expected 0.1-1.0; set --um_per_px")


def _in_image(points_px: np.ndarray, small: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Points (N, 2) of the small image in px of the image."""
    return (points_px + 0.5) * np.divide(image.shape[1::-1], small.shape[1::-1]) - 0.5


def spread_of(measures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and interquartile range of each measure, (4,) and (4,), over candidates (N, 4)."""
    lower, middle, upper = np.percentile(measures, [25, 50, 75], axis=0)
    return middle, np.maximum(upper - lower, SMALLEST_SPREAD)


def score_candidates(measures: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Score (N,) of candidates.

    measures: (N, 4). middle, spread: (4,), median and interquartile range of their slide, as `spread_of`.
    """
    return (np.clip((measures - middle) / spread, *FARTHEST) * WEIGHTS).sum(axis=1)


def _optical_density(small: Image) -> tuple[Image, Image]:
    """Optical density of red, and of the three channels together, (h, w) float32."""
    density_of = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
    red = look_up(density_of, small[:, :, 0])
    total = red + look_up(density_of, small[:, :, 1])
    total += look_up(density_of, small[:, :, 2])
    return red, total


def _find_padding(small: np.ndarray, working_um: float) -> np.ndarray:
    """Mask of the black that was put round the tissue, (h, w) bool."""
    brightest = cv2.max(cv2.max(small[:, :, 0], small[:, :, 1]), small[:, :, 2])
    black = (brightest <= BLACK).astype(np.uint8)
    if not black.any():
        return black > 0
    side = 2 * round(PADDING_UM / 2 / working_um) + 1  # odd: OpenCV shifts the opening by an even square
    square = np.ones((side, side), np.uint8)
    # What lies outside the image counts as black, so that a narrow strip along the edge is padding too.
    framed = cv2.copyMakeBorder(black, side, side, side, side, cv2.BORDER_CONSTANT, value=1)
    wide = cv2.morphologyEx(framed, cv2.MORPH_OPEN, square)[side:-side, side:-side]
    padding = cv2.dilate(wide, square) & black  # with the corners that the square did not reach
    # Lossy compression and resampling smear the border of the padding over its neighbours.
    return cv2.dilate(padding, np.ones((5, 5), np.uint8)) > 0


def _measure(
    small: Image, padding: np.ndarray, padding_density: tuple[float, float] | None, working_um: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column and row of every candidate, (N,), and its four measures in the order of WEIGHTS, (N, 4) float64."""
    red, total = _optical_density(small)
    if padding.any():
        # With the tissue's median there, the nuclei beside it are neither hidden nor favoured.
        padding_density = padding_density or [float(np.median(to_numpy(one)[~padding])) for one in (red, total)]
        hidden = torch.from_numpy(padding).to(red.device) if isinstance(red, torch.Tensor) else padding
        red[hidden], total[hidden] = padding_density
    core = smooth(red, CORE_UM / working_um)
    radius = math.ceil(APART_UM / working_um)
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    peak = (core >= highest(core, disk)) & (core > lowest(core, disk) + RISE)
    row, column = _first_of_each(to_numpy(peak) & ~padding)
    side = 2 * round(NEARBY_UM / working_um) + 1
    lightest = at(lowest(core, np.ones((side, side), np.uint8)), row, column)
    core_hue = at(core, row, column) / (at(smooth(total, CORE_UM / working_um), row, column) + PALE)
    nucleus = smooth(red, NUCLEUS_UM / working_um)
    contrast = at(nucleus - _smooth_widely(nucleus, working_um), row, column)
    nucleus_hue = at(nucleus, row, column) / (at(smooth(total, NUCLEUS_UM / working_um), row, column) + PALE)
    return column, row, np.stack([contrast, core_hue, nucleus_hue, lightest], axis=1).astype(np.float64)


def _smooth_widely(nucleus: Image, working_um: float) -> Image:
    """Smooth what is already smooth by NUCLEUS_UM up to SURROUNDINGS_UM, at half the size: a quarter of the work."""
    height, width = nucleus.shape
    half = shrink(nucleus, (height + 1) // 2, (width + 1) // 2)
    sigma_um = math.sqrt(SURROUNDINGS_UM**2 - NUCLEUS_UM**2)
    return enlarge(smooth(half, sigma_um / (2 * working_um)), height, width)


def _first_of_each(peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of one pixel of each connected group: equal neighbours on a plateau are one candidate."""
    _, label = cv2.connectedComponents(peak.astype(np.uint8), connectivity=8)
    row, column = np.nonzero(peak)
    _, first = np.unique(label[row, column], return_index=True)
    return row[first], column[first]
