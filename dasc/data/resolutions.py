"""What --um_per_px asks for: one number for all images, or a table of them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dasc.data.tables import check_once, read_table
from dasc.errors import InputError

logger = logging.getLogger(__name__)
COLUMNS = {"image": str, "um_per_px": float}


def asked_um_per_px(text: str | float, images: Sequence[str], paths: Sequence[str], insist: bool) -> list[float]:
    """The um/px that is asked for of every image, NaN where nothing is.

    text: a number, empty or 0 for none, or the path of a CSV `image,um_per_px`. images, paths: the names of the images
    and their paths; the CSV may use either. insist: whether what is asked for comes before what is stated.
    Raises: InputError: no such table, an image twice, a number that is not above 0, no row that names one of the
    images, or nothing to insist on.
    """
    try:
        number = float(text or 0)
    except ValueError:
        return _of_table(Path(text), images, paths)
    if insist and not number:
        raise InputError("--insist_um_per_px: nothing to insist on; give --um_per_px too, or leave it out")
    return [number or np.nan] * len(images)


def _of_table(path: Path, images: Sequence[str], paths: Sequence[str]) -> list[float]:
    if not path.is_file():
        raise InputError(f"--um_per_px {path}: no such file; expected a number, or a CSV image,um_per_px")
    table = read_table(path, COLUMNS, "a table image,um_per_px")
    check_once(table["image"], path)
    wrong = ~(table["um_per_px"] > 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InputError(f"{path}, row {row + 2}: um_per_px is {table['um_per_px'][row]}, expected a number above 0")
    asked = dict(zip(table["image"], table["um_per_px"], strict=True))
    names = set(images) | set(paths)
    strange = [image for image in asked if image not in names]
    if len(strange) == len(asked):
        example = next(iter(images), "")
        raise InputError(f"{path}: none of its {len(asked)} rows names an image of this run, such as {example!r}")
    if strange:
        counts = f"{len(strange)} of its {len(asked)} rows"
        logger.warning("%s: %s name no image of this run (first: %s)", path, counts, strange[0])
    return [asked.get(image, asked.get(place, np.nan)) for image, place in zip(images, paths, strict=True)]
