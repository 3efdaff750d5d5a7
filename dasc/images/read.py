"""Open one image of tissue, whatever its kind."""

import logging
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
)

MAX_PIXELS = 1_000_000_000  # a field is held in memory whole, 3 bytes per pixel
UM_PER_PX_RANGE = (0.1, 2.0)  # what a microscope gives; 72 dpi of an image editor is 352.8 um/px
# Images and slides that are not read here: the suffix and what they are.
OTHER_SUFFIXES = {
    **dict.fromkeys((".vsi", ".ets"), "a slide of Olympus"),
    **dict.fromkeys((".isyntax", ".i2syntax"), "a slide of Philips"),
    **dict.fromkeys(
        (".kfb", ".tmap", ".sdpc", ".mdsx", ".mds", ".zvi", ".lif", ".nd2", ".oir"), "a slide or micrograph"
    ),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".webp", ".gif", ".heic", ".heif", ".avif", ".jxl"), "an image"),
    **dict.fromkeys((".psd", ".xcf", ".tga", ".ppm", ".pgm"), "an image"),
}
# The first bytes of files that are no image of a kind read here, and what they are.
OTHER_STARTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the image itself; run `git lfs pull` in its folder",
    b"<!doctype html": "a web page (HTML), not an image; the download needs a login or another address",
    b"<html": "a web page (HTML), not an image; the download needs a login or another address",
    b"pk\3\4": "a ZIP archive; unpack it",
    b"\x1f\x8b": "a gzip archive; unpack it",
}
IMAGE_STARTS = (b"GIF8", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"8BPS")  # GIF, JPEG2000, Photoshop
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
                raise ValueError(_what_else(path, file.read(512)))
            return _read_tiff(file, path) if kind == "tiff" else _read_picture(file, kind, path)
    except Exception as error:  # decoders of broken files raise anything: OSError, struct.error, types of their own
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


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


def other_kind(path: Path, start: bytes) -> str | None:
    """Why an image of a kind that is not read here is left out, by its name and first bytes; None if it is none."""
    riff = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    heif = start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"avif")
    kind = OTHER_SUFFIXES.get(path.suffix.lower())
    if kind is None and not (riff or heif or start.startswith(IMAGE_STARTS)):
        return None
    suffix = f" ({path.suffix})" if kind and path.suffix else ""
    what = f"{kind or 'an image of another kind'}{suffix}"
    return f"not a TIFF, PNG, JPEG or BMP image but {what}; convert it to one of them, with its resolution"


def _what_else(path: Path, start: bytes) -> str:
    """What a file is that is no image of a kind read here, and what to do."""
    if not start:
        return "the file is empty (0 bytes); copy or download it again"
    plain = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if plain.startswith(b"<?xml") and b"<html" in plain:
        plain = b"<html"
    if start[128:132] == b"DICM":
        return "a DICOM file that OpenSlide does not read as a slide; convert it to TIFF or PNG"
    known = next((words for mark, words in OTHER_STARTS.items() if plain.startswith(mark)), None)
    other = other_kind(path, start)
    return known or other or "not a TIFF, PNG, JPEG or BMP image; convert it to one of them"


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
