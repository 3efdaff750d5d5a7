"""Open one image of tissue, whatever its kind, and find the images in a folder."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from dasc.errors import InputError
from dasc.images.tiffs import (
    STREAMS,
    check_colours,
    check_jpeg,
    check_segment,
    check_segments,
    full_page,
    stated_um_per_px,
)

MAX_PIXELS = 1_000_000_000  # a field is held in memory whole, 3 bytes per pixel
UM_PER_PX_RANGE = (0.1, 2.0)  # what a microscope gives; 72 dpi of an image editor is 352.8 um/px
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
logger = logging.getLogger(__name__)
# Opened by their own class: Image.open has a limit of its own, and here MAX_PIXELS is the one for every format.
PICTURES = {"png": PngImageFile, "jpeg": JpegImageFile, "bmp": BmpImageFile}


def read_field(path: Path) -> np.ndarray:
    """Return the pixels of the image at `path`, for a pyramid those of its full resolution.

    Returns: uint8 RGB of shape (H, W, 3), contiguous and writable. EXIF and TIFF orientation are ignored, so that
    annotations stay right. Alpha is dropped; padding (alpha and colour 0) becomes white. More than 8 bits are
    scaled by the image's own maximum, since 12-bit cameras store 16-bit files.
    Errors: InputError naming the file when it is missing, truncated, too large or of a kind not read here.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            kind = image_kind(file)
            if kind is None:
                raise ValueError("not a TIFF, PNG, JPEG or BMP image; convert it to one of them")
            return _read_tiff(file, path) if kind == "tiff" else _read_picture(file, kind, path)
    except Exception as error:  # decoders of broken files raise anything: OSError, struct.error, types of their own
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def read_um_per_px(path: Path) -> float | None:
    """Return the resolution that a TIFF states (Aperio's MPP, else its resolution tags), in um/px.

    Returns: None where nothing is stated, the unit is missing or the value lies outside UM_PER_PX_RANGE.
    Errors: InputError naming the file when it is missing or broken.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if image_kind(file) != "tiff":
                return None
            with tifffile.TiffFile(file) as tif:
                um_per_px = stated_um_per_px(full_page(tif))
    except Exception as error:  # as in read_field
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    low, high = UM_PER_PX_RANGE
    return um_per_px if um_per_px is not None and low <= um_per_px <= high else None


def find_images(paths: list[Path]) -> list[Path]:
    """Return the files among `paths` and the images in the folders among them, sorted, each file once.

    Folders are searched to the bottom, hidden files and folders left out. An image is known by its first bytes; a
    file that only has an image's name is kept, so that reading it names what is broken.
    Errors: InputError when a path is missing or a folder holds no image.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            images = [file for file in _files_below(path) if _may_be_image(file)]
            if not images:
                raise InputError(f"{path}: no image in this folder; expected slides, TIFF, PNG, JPEG or BMP files")
        elif path.exists():
            images = [path]
        else:
            raise InputError(f"{path}: no such file or folder")
        for image in images:
            found.setdefault(image.resolve(), image)
    return sorted(found.values())


def _files_below(folder: Path) -> list[Path]:
    seen = set()  # device and inode of each folder: links may lead in circles
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in sorted(names) if not name.startswith(".")]
    return [file for file in files if file.is_file()]


def _may_be_image(path: Path) -> bool:
    if path.suffix.lower() in (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return image_kind(file) is not None
    except OSError:
        return False


def image_kind(file: BinaryIO) -> str | None:
    """What the first bytes of a file say it is: tiff, png, jpeg, bmp or None."""
    start = file.read(18)
    file.seek(0)
    if start.startswith(TIFF_STARTS):
        return "tiff"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    # "BM" alone begins many a text: the size of the second header, 12 to 124 bytes, must follow.
    if start.startswith(b"BM") and 12 <= int.from_bytes(start[14:18], "little") <= 124:
        return "bmp"
    return None


def reason(error: Exception) -> str:
    """An error of a decoder in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def check_size(width: int, height: int) -> None:
    """Raise ValueError where an image has no pixels, or is too large to be held in memory whole."""
    if not width * height:
        raise ValueError(f"{width} x {height} pixels, expected some; save or download it again")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels is more than {MAX_PIXELS:,} (MAX_PIXELS); cut it into smaller regions"
        )


def _read_picture(file: BinaryIO, kind: str, path: Path) -> np.ndarray:
    with PICTURES[kind](file) as image:
        check_size(*image.size)
        if kind in ("jpeg", "png"):
            file.seek(0)
            data = file.read()
            if kind == "jpeg":
                check_jpeg(data)
                if image.mode == "RGB":  # the same pixels as Pillow's in half the time
                    return imagecodecs.jpeg8_decode(data)
            elif data[24] == 16:  # bit depth; Pillow would drop the low byte
                return to_rgb(imagecodecs.png_decode(data), 16, path)
        if image.has_transparency_data:
            return to_rgb(np.asarray(image.convert("RGBA")), 8, path)
        return np.array(image.convert("RGB"))


def _read_tiff(file: BinaryIO, path: Path) -> np.ndarray:
    with tifffile.TiffFile(file) as tif:
        page = full_page(tif)
        planes, _, height, width, _ = page.shaped
        check_size(width, height)
        photometric = check_colours(page)
        check_segments(page, tif.filehandle.size)
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            tif.filehandle.seek(offset)
            check_segment(page, tif.filehandle.read(size if page.compression in STREAMS else 0))
        image = page.asarray().reshape(page.shaped)[:, 0]
        image = np.moveaxis(image[..., 0], 0, -1) if planes > 1 else image[0]
        if photometric == tifffile.PHOTOMETRIC.PALETTE:
            colours = page.colormap.T[: 2**page.bitspersample]
            return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)[image[..., 0]]
        image = to_rgb(image, page.bitspersample, path)
        return 255 - image if photometric == tifffile.PHOTOMETRIC.MINISWHITE else image


def to_rgb(image: np.ndarray, bits: int, path: Path) -> np.ndarray:
    """Turn (H, W) or (H, W, 1 to 4) of `bits` bits, gray or RGB, with or without alpha, into 8-bit RGB."""
    image = image.reshape(*image.shape[:2], -1)
    samples = image.shape[2]
    padding = None
    if samples in (2, 4):
        padding = image[..., -1] == 0
        for colour in range(samples - 1):
            padding &= image[..., colour] == 0
        image = image[..., :-1]
    if bits != 8:
        top = 2**bits - 1 if bits < 8 else max(int(image.max()), 1)
        if bits > 8:
            logger.warning("%s: %d bits, scaled so that its highest value %d becomes 255", path, bits, top)
        image = np.round(np.arange(top + 1) * (255 / top)).astype(np.uint8)[image.astype(np.uint16, copy=False)]
    if image.shape[2] == 1:
        image = np.broadcast_to(image, (*image.shape[:2], 3))
    image = np.require(image, requirements=["C", "W"])
    if padding is not None:
        image[padding] = 255
    return image


def resolution(path: Path, override: float, stated: float) -> tuple[float, str]:
    """The um/px of a field and where it comes from: `flag` (override > 0), `dataset` (stated > 0) or `file`.

    Errors: InputError when none of them knows it.
    """
    return choose_resolution(path, override, stated, lambda: read_um_per_px(path))


def choose_resolution(
    path: Path, override: float, stated: float, read: Callable[[], float | None]
) -> tuple[float, str]:
    """As `resolution`, with what the file states read by another reader than read_um_per_px."""
    if not override >= 0:
        raise InputError(f"--um_per_px {override}: expected 0.1 to 2.0, or 0 for what the file states")
    if override > 0:
        return override, "flag"
    if stated > 0:
        return stated, "dataset"
    um_per_px = read()
    if um_per_px is None:
        raise InputError(f"{path}: states no resolution between 0.1 and 2.0 um/px; give it with --um_per_px")
    return um_per_px, "file"
