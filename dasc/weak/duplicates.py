"""Near-duplicates: the same picture twice, though stored again, resized, lightened, turned or mirrored."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from dasc.data.patches import read_patch

THUMBNAIL_PX = 16  # coarse enough to forgive compression, fine enough to tell one nucleus from the next
FLAT = 2.0  # grey levels: a patch whose thumbnail varies less shows nothing that could be recognised


def thumbnail(patch: np.ndarray) -> np.ndarray:
    """Grey thumbnail (16, 16) uint8 of a patch (S, S, 3) uint8 RGB."""
    grey = cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)


def thumbnails(paths: list[Path], workers: int) -> np.ndarray:
    """Thumbnails (N, 16, 16) uint8 of patches on disk, in their order; InputError as `read_patch`."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        made = list(pool.map(lambda path: thumbnail(read_patch(path)), paths))
    return np.array(made, dtype=np.uint8).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX)


def near_duplicates(pictures: np.ndarray, protected: np.ndarray, correlation: float) -> np.ndarray:
    """Which thumbnails `pictures` (N, 16, 16) show what one of `protected` (P, 16, 16) shows: bool (N,).

    Two are near-duplicates when their `correlations` reach `correlation`.
    """
    return correlations(pictures, protected) >= correlation


def correlations(pictures: np.ndarray, protected: np.ndarray, block: int = 256) -> np.ndarray:
    """The highest correlation (N,) of the grey values of each of `pictures` with any of `protected`.

    Every turned and mirrored view of `protected` counts. Correlation does not see a change of brightness
    or contrast; a flat thumbnail has none with anything, 0, and -1 stands where nothing is protected.
    """
    views = [np.rot90(side, turns, axes=(1, 2)) for side in (protected, protected[:, :, ::-1]) for turns in range(4)]
    views = np.concatenate([_directions(view) for view in views]).T
    highest = np.empty(len(pictures))
    for start in range(0, len(pictures), block):
        part = _directions(pictures[start : start + block]) @ views
        highest[start : start + block] = part.max(axis=1, initial=-1.0)
    return highest


def _directions(pictures: np.ndarray) -> np.ndarray:
    """Thumbnails (N, 16, 16) as rows (N, 256) of mean 0 and length 1, flat ones of length 0."""
    rows = pictures.reshape(len(pictures), THUMBNAIL_PX**2).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length < FLAT * THUMBNAIL_PX, 0, rows / length.clip(min=1e-6))
