"""Find the tissue of a slide at low magnification, and leave out blank glass and pen marks."""

from dataclasses import dataclass

import cv2
import numpy as np

from dasc.images.stain import DENSITY
from dasc.images.stain import TISSUE as DARK

UM_PER_PX = 8.0  # resolution at which tissue is looked for: a nucleus is a pixel
FAINTEST = 0.04  # optical density by which tissue absorbs green more than the mean of red and blue; dust and glass less
FEWEST_MM2 = 0.01  # specks of tissue smaller than this are left out, and gaps in it smaller than this are filled
SMOOTH_PX = 2.0  # Gaussian before the colours are judged
MARGIN_PX = 3  # tissue is taken to reach this much further, so that no nucleus at its edge is lost
PEN_MM2 = 0.02  # ink covers more than this in one piece; less is pigment or blood
PEN_MARGIN_PX = 6  # ink thins out at its edge


def find_tissue(overview: np.ndarray, um_per_px: float) -> np.ndarray:
    """Mask (h, w) bool of the tissue in an overview (h, w, 3) uint8 RGB at about UM_PER_PX.

    Hematoxylin and eosin both absorb green most, so that tissue is purple or pink. Glass and dust have no colour; inks
    absorb another colour most (blue and green pens red, a black pen all alike) or hardly any red at all (a red pen).
    """
    density = cv2.GaussianBlur(DENSITY[overview], (0, 0), SMOOTH_PX)
    red, green, blue = (density[:, :, channel] for channel in range(3))
    tissue = green - (red + blue) / 2 > FAINTEST
    ink = _large_parts(_find_ink(red, green, blue), PEN_MM2, um_per_px)
    ink = cv2.dilate(ink.astype(np.uint8), _disk(PEN_MARGIN_PX)) > 0
    tissue = _large_parts(tissue & ~ink, FEWEST_MM2, um_per_px)
    tissue = ~_large_parts(~tissue, FEWEST_MM2, um_per_px)
    return (cv2.dilate(tissue.astype(np.uint8), _disk(MARGIN_PX)) > 0) & ~ink


def field_mm2(image: np.ndarray, um_per_px: float) -> float:
    """Area of a field (H, W, 3) uint8 RGB that is not glass: tissue with the gaps in it, and what else is dark."""
    height, width = image.shape[:2]
    size = tuple(max(1, round(side * um_per_px / UM_PER_PX)) for side in (width, height))
    overview = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    shown = find_tissue(overview, UM_PER_PX) | (DENSITY[overview].sum(axis=2) > DARK)
    return float(shown.mean()) * width * height * um_per_px**2 / 1e6


def _find_ink(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    total = red + green + blue
    blue_or_green = (total > 0.8) & (red > 1.15 * green)
    green_pen = (total > 0.6) & (green < 0.8 * np.minimum(red, blue))
    red_pen = (total > 1.5) & (red < 0.15 * green) & (blue > 0.6 * green)
    black = (total > 3.0) & (np.maximum(np.maximum(red, green), blue) < 1.15 * total / 3)
    return blue_or_green | green_pen | red_pen | black


def _large_parts(mask: np.ndarray, mm2: float, um_per_px: float) -> np.ndarray:
    """The connected parts of a mask that cover at least `mm2`."""
    _, label, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = facts[:, cv2.CC_STAT_AREA] * um_per_px**2 / 1e6 >= mm2
    large[0] = False  # what is not in the mask
    return large[label]


def _disk(radius: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


@dataclass(frozen=True)
class Tissue:
    """Where the tissue of a slide is: mask (h, w) bool, and how many of the slide's pixels one of the mask's spans."""

    mask: np.ndarray
    pixel_px: float

    def at(self, points_px: np.ndarray) -> np.ndarray:
        """Whether points (N, 2) in the slide's pixels lie on tissue, (N,) bool."""
        column, row = ((points_px + 0.5) / self.pixel_px).astype(int).T
        return self.mask[row.clip(0, self.mask.shape[0] - 1), column.clip(0, self.mask.shape[1] - 1)]

    def area_mm2(self, um_per_px: float) -> float:
        """Area of the tissue in a slide of this resolution."""
        return float(self.mask.sum()) * (self.pixel_px * um_per_px) ** 2 / 1e6
