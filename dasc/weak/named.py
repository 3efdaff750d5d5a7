"""Patches whose label and slide stand in their file names: `pos_A00044_5282-12339.png`."""

import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from dasc.errors import InputError
from dasc.images.find import find_images
from dasc.images.read import read_field

FORM = "pos_SLIDE_X-Y or neg_SLIDE_X-Y, as in pos_A00044_5282-12339.png"
_NAME = re.compile(r"(?:(?P<label>pos|neg)_)?(?P<slide>.+)_(?P<x>\d+)-(?P<y>\d+)")
_LABELS = {"neg": 0, "pos": 1}


def labelled_images(folder: Path) -> pd.DataFrame:
    """The labelled patches of a folder: path (to the file), label (0 or 1), case (the slide), in the order of names.

    Raises: InputError: no image in the folder, or one whose name does not say both.
    """
    rows = []
    for path in find_images([folder]):
        name = _NAME.fullmatch(path.stem)
        if name is None or name["label"] is None:
            raise InputError(f"{path}: its name does not say label and slide; expected {FORM}")
        rows.append((path, _LABELS[name["label"]], name["slide"]))
    return pd.DataFrame(rows, columns=["path", "label", "case"])


def slide_of(path: Path) -> str:
    """The slide that a patch's name states, with or without a label before it; empty where it states none."""
    name = _NAME.fullmatch(path.stem)
    return name["slide"] if name else ""


def read_square(path: Path, expected_px: int, patch_px: int) -> np.ndarray:
    """Read a patch that must be `expected_px` square, and bring it to `patch_px`: (S, S, 3) uint8 RGB.

    Raises: InputError: a file that cannot be read, or of another size: its tissue would change scale unseen.
    """
    image = read_field(path)
    if image.shape[:2] != (expected_px, expected_px):
        height, width = image.shape[:2]
        raise InputError(f"{path}: {width} x {height} px, expected {expected_px} x {expected_px} px like the others")
    if expected_px == patch_px:
        return image
    interpolation = cv2.INTER_AREA if patch_px < expected_px else cv2.INTER_LINEAR
    return cv2.resize(image, (patch_px, patch_px), interpolation=interpolation)
