"""Bring a field's stain to a common one, so that a network sees the same colours from every laboratory."""

import cv2
import numpy as np

# Optical density of red, green and blue over tissue: mean and standard deviation that every field is brought to.
# Any fixed numbers serve; these lie in the middle of ten Hamamatsu slides.
MEAN = np.array([0.27, 0.80, 0.38], dtype=np.float32)
SPREAD = np.array([0.18, 0.48, 0.20], dtype=np.float32)
TISSUE = 0.3  # sum of the three optical densities above which a pixel is tissue, not glass
FEWEST = 400  # pixels of tissue (at an eighth of the field's sides) without which nothing can be estimated
SHRINK = 8  # a field's statistics are taken at this fraction of its sides

DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # optical density of a grey level


def normalise_stain(image: np.ndarray) -> np.ndarray:
    """A field (H, W, 3) uint8 RGB with the mean and spread of its tissue's optical density brought to MEAN and SPREAD.

    Per channel, as Reinhard et al. 2001 transfer colour, but in optical density, where stain adds up. A field with
    hardly any tissue, or of one colour, comes back as it is.
    """
    return apply_stain(image, estimate_stain(tissue_density(image)))


def tissue_density(image: np.ndarray) -> np.ndarray:
    """Optical density of the tissue in a field (H, W, 3) uint8 RGB, at an eighth of its sides: (N, 3) float32."""
    size = (max(1, image.shape[1] // SHRINK), max(1, image.shape[0] // SHRINK))
    density = DENSITY[cv2.resize(image, size, interpolation=cv2.INTER_AREA)].reshape(-1, 3)
    return density[density.sum(axis=1) > TISSUE]


def estimate_stain(tissue: np.ndarray) -> np.ndarray | None:
    """Mean and spread of the optical density (N, 3) of tissue, (2, 3); None where nothing can be estimated."""
    if len(tissue) < FEWEST or tissue.std(axis=0).min() < 0.01:
        return None
    return np.stack([tissue.mean(axis=0), tissue.std(axis=0)])


def apply_stain(image: np.ndarray, stain: np.ndarray | None) -> np.ndarray:
    """An image (H, W, 3) uint8 RGB whose stain is that of `estimate_stain`, brought to MEAN and SPREAD."""
    return image if stain is None else cv2.LUT(image, stain_table(stain)[None])


def stain_table(stain: np.ndarray) -> np.ndarray:
    """What `apply_stain` makes of each grey level of red, green and blue: (256, 3) uint8."""
    mean, spread = stain
    moved = (DENSITY[:, None] - mean) / spread * SPREAD + MEAN
    return np.clip(np.round(256 * np.exp(-moved) - 1), 0, 255).astype(np.uint8)
