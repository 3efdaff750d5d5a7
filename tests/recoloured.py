"""Images that are no H&E, made of one that is: what a user may give by mistake."""

from collections.abc import Iterator

import cv2
import numpy as np

from dasc.images.stain import DENSITY

HEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)  # Ruifrok and Johnston 2001


def recoloured(image: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The image (h, w, 3) uint8, and what it would be with other colours."""
    yield "as it is", image
    yield "gray", np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2)
    yield "inverted", 255 - image
    for order in ("bgr", "grb", "gbr", "rbg", "brg"):
        yield f"channels {order}", np.ascontiguousarray(image[:, :, ["rgb".index(channel) for channel in order]])
    stains = np.array([HEMATOXYLIN, EOSIN, DAB])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    nuclei = np.clip(DENSITY[image] @ np.linalg.inv(stains).astype(np.float32), 0, None)[:, :, 0]
    patches = cv2.GaussianBlur(np.random.default_rng(0).normal(size=nuclei.shape), (0, 0), 12)
    for share in (0.5, 0.1):  # of the tissue that is brown
        brown = np.where(patches > np.quantile(patches, 1 - share), nuclei, 0)
        blue = 0.8 * np.where(brown, 0.3 * nuclei, nuclei) + 0.03
        density = blue[:, :, None] * stains[0] + 1.2 * brown[:, :, None] * stains[2]
        yield f"DAB on {share:.0%}", np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)
    bright = np.clip(nuclei / np.quantile(nuclei, 0.995), 0, 1)
    green = np.clip(DENSITY[image][:, :, 1] / 1.5, 0, 1)
    yield "fluorescence", np.stack([0 * bright, 150 * green, 220 * bright], axis=2).astype(np.uint8)
