"""What a TIFF or JPEG file says of its pixels, and whether all of them are there, before they are decoded."""

import math
import re

import numpy as np
import tifffile

APERIO_YCBCR_JPEG2000 = 33003  # tifffile hands its pixels out as YCbCr
JPEG_FRAMES = [bytes([0xC0 + kind]) for kind in range(16) if kind not in (4, 8, 12)]  # markers before a JPEG's size
# Compressions whose strips and tiles are JPEG, or JPEG2000, with headers of their own.
STREAMS = (7, 33003, 33005, 34712)
JPEG2000 = b"\xff\x4f\xff\x51"  # its first two markers
RIVAL = 1.9  # an image of more than 1 / 1.9 of the largest one's pixels is no level of its pyramid
SIDE_PHOTOGRAPH = re.compile(r"\b(label|macro|thumbnail|overview)\b", re.IGNORECASE)  # by its name
AXES = {"Z": "depths (Z)", "C": "channels (C)", "T": "times (T)"}
ADVICE = "save one plane, in RGB, as a file of its own"
END_MARKER = b"\xff\xd9"  # of JPEG and JPEG2000; in neither does it occur in what is coded


def full_page(tif: tifffile.TiffFile) -> tifffile.TiffPage:
    """Return the page of full resolution: of the largest image that is no reduced copy, label or macro photograph.

    Raises: ValueError: no image, several of one order, or a stack of depths, channels or times.
    """
    if not len(tif.pages):  # counting them also finds pages linked in a circle, which tif.series would follow for ever
        raise ValueError("holds no image")
    whole = [one for one in tif.series if not one.keyframe.is_reduced] or [tif.series[0]]
    whole = [one for one in whole if not SIDE_PHOTOGRAPH.search(one.name)] or whole
    series = max(whole, key=_pixels)  # of the same number the first
    rivals = [one for one in whole if _pixels(one) * RIVAL >= _pixels(series)]
    if len(rivals) > 1:
        sizes = ", ".join(f"{one.name or one.index}: {_sides(one)}" for one in rivals)
        raise ValueError(f"holds several images of one order ({sizes}); save each as a file of its own")
    if series.size != series.keyframe.size:
        raise ValueError(f"holds several images ({_stack(series)}, axes {series.axes}, shape {series.shape}); {ADVICE}")
    return series.keyframe


def _pixels(series: tifffile.TiffPageSeries) -> int:
    return series.keyframe.imagewidth * series.keyframe.imagelength


def _sides(series: tifffile.TiffPageSeries) -> str:
    return f"{series.keyframe.imagewidth} x {series.keyframe.imagelength} px"


def _stack(series: tifffile.TiffPageSeries) -> str:
    """What the pages of a series are, in words."""
    lengths = dict(zip(series.axes, series.shape, strict=False))
    gray = series.keyframe.samplesperpixel == 1
    named = [f"{lengths[axis]} {words}" for axis, words in AXES.items() if lengths.get(axis, 1) > 1]
    if gray and series.size == 3 * series.keyframe.size:
        named = ["3 gray pages, perhaps one per colour: merge them into one RGB image"]
    return " and ".join(named) or f"{series.size // series.keyframe.size} pages"


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
        size = check_jpeg(data)
    elif data.startswith(JPEG2000):
        size = tuple(int.from_bytes(data[at : at + 4], "big") for at in (8, 12))
        if END_MARKER not in data:
            raise ValueError("truncated JPEG2000: its end is missing; copy or download it again")
    height, width = (page.tilelength, page.tilewidth) if page.is_tiled else page.shaped[2:4]
    if size[0] > width or size[1] > height:
        raise ValueError(f"a strip or tile of {size[0]} x {size[1]} px, expected at most {width} x {height}")


def check_jpeg(data: bytes) -> tuple[int, int]:
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
