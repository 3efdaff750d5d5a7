"""Open one image of tissue, whatever its kind, and find the images in a folder."""

import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from dasc.errors import InputError

MAX_PIXELS = 1_000_000_000  # a field is held in memory whole, 3 bytes per pixel
UM_PER_PX_RANGE = (0.1, 2.0)  # what a microscope gives; 72 dpi of an image editor is 352.8 um/px
IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi")

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
APERIO_YCBCR_JPEG2000 = 33003  # tifffile hands its pixels out as YCbCr
JPEG_FRAMES = [bytes([0xC0 + kind]) for kind in range(16) if kind not in (4, 8, 12)]  # markers before a JPEG's size

STREAMS = (
    7,
    33003,
    33005,
    34712,
)  # compressions whose strips and tiles are JPEG, or JPEG2000, with headers of their own
JPEG2000 = b"\xff\x4f\xff\x51"  # its first two markers
END_MARKER = b"\xff\xd9"  # of JPEG and JPEG2000; in neither does it occur in what is coded

logger = logging.getLogger(__name__)
Image.MAX_IMAGE_PIXELS = None  # one limit for every format: MAX_PIXELS, checked below before decoding


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
                um_per_px = _stated_um_per_px(full_page(tif))
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
    with Image.open(file) as image:
        check_size(*image.size)
        if kind in ("jpeg", "png"):
            file.seek(0)
            data = file.read()
            if kind == "jpeg":
                _check_jpeg(data)
                if image.mode == "RGB":  # the same pixels as Pillow's in half the time
                    return imagecodecs.jpeg8_decode(data)
            elif data[24] == 16:  # bit depth; Pillow would drop the low byte
                return to_rgb(imagecodecs.png_decode(data), 16, path)
        if image.has_transparency_data:
            return to_rgb(np.asarray(image.convert("RGBA")), 8, path)
        return np.array(image.convert("RGB"))


def _check_jpeg(data: bytes) -> tuple[int, int]:
    """Return width and height (0, 0 where it states none) of a JPEG.

    Raises ValueError when no end marker follows the first scan: decoders fill what is missing with gray and say
    nothing.
    """
    place, width, height = 2, 0, 0
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":
        if data[place + 1 : place + 2] == b"\xff":
            place += 1
            continue
        if data[place + 1 : place + 2] in JPEG_FRAMES:
            height, width = (int.from_bytes(data[place + at : place + at + 2], "big") for at in (5, 7))
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if data.find(END_MARKER, place) < 0:
        raise ValueError("truncated JPEG: its end is missing; copy or download it again")
    return width, height


def full_page(tif: tifffile.TiffFile) -> tifffile.TiffPage:
    """Return the page of full resolution: the first that is not marked as a reduced copy."""
    if not len(tif.pages):  # counting them also finds pages linked in a circle, which tif.series would follow for ever
        raise ValueError("holds no image")
    series = next((one for one in tif.series if not one.keyframe.is_reduced), tif.series[0])
    if series.size != series.keyframe.size:
        raise ValueError(f"holds several images ({series.axes} {series.shape}); save each as a file of its own")
    return series.keyframe


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


def check_colours(page: tifffile.TiffPage) -> tifffile.PHOTOMETRIC:
    """Return how a page codes its colours; ValueError where they cannot be shown as 8-bit RGB without loss."""
    planes, depth, _, _, samples = page.shaped
    if depth != 1 or planes * samples > 4 or not isinstance(page.bitspersample, int):
        raise ValueError(f"shape {page.shape}, {page.bitspersample} bits; save it as 8-bit RGB")
    if page.dtype.kind not in "bu" or page.bitspersample > 16:
        raise ValueError(f"pixels of type {page.dtype}; expected 8 or 16 bit; save it as 8-bit RGB")
    photometric = tifffile.PHOTOMETRIC(page.photometric)
    is_ycbcr = photometric == tifffile.PHOTOMETRIC.YCBCR and (
        page.compression not in (6, 7, 34892) or page.extrasamples  # JPEG's decoder turns it into RGB
    )
    if is_ycbcr or page.compression == APERIO_YCBCR_JPEG2000 or photometric not in (0, 1, 2, 3, 6):
        raise ValueError(f"colours {photometric.name}, {page.compression!r}; save it as 8-bit RGB")
    return photometric


def check_segments(page: tifffile.TiffPage, file_size: int) -> None:
    """Raise when strips or tiles are missing or reach past the end; tiles left out on purpose become white."""
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    expected = 1 if page.is_contiguous else math.prod(page.chunked)
    if len(ends) < expected or max(ends) > file_size:
        raise ValueError("truncated TIFF: its pixels reach past the end of the file; copy or download it again")
    if 0 in page.databytecounts:
        if not page.is_tiled or page.dtype != np.uint8:
            raise ValueError("incomplete TIFF: some strips were never written; save or download it again")
        page.nodata = 255


def check_segment(page: tifffile.TiffPage, data: bytes) -> None:
    """Raise where the JPEG or JPEG2000 of a strip or tile ends too early, or would unpack to more than its place."""
    if page.compression not in STREAMS or not data:
        return
    size = 0, 0
    if page.compression == tifffile.COMPRESSION.JPEG:
        size = _check_jpeg(data)
    elif data.startswith(JPEG2000):
        size = tuple(int.from_bytes(data[at : at + 4], "big") for at in (8, 12))
        if END_MARKER not in data:
            raise ValueError("truncated JPEG2000: its end is missing; copy or download it again")
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else page.shaped[2:4]
    if size[0] > width or size[1] > height:
        raise ValueError(f"a strip or tile of {size[0]} x {size[1]} px, expected at most {width} x {height}")


def _stated_um_per_px(page: tifffile.TiffPage) -> float | None:
    aperio = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description)
    if aperio:
        return float(aperio[1])
    um_per_unit = {2: 25400, 3: 10000}.get(page.tags.valueof("ResolutionUnit", default=2))
    pixels = [page.tags.valueof(name, default=(0, 1)) for name in ("XResolution", "YResolution")]
    if um_per_unit is None or not all(numerator and denominator for numerator, denominator in pixels):
        return None
    x, y = (um_per_unit * denominator / numerator for numerator, denominator in pixels)
    return x if math.isclose(x, y, rel_tol=0.01) else None


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
