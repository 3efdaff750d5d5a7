"""Read slides and fields by region: one interface over OpenSlide, tiled and striped TIFF, and plain images.

What a file is, its first bytes say, never its name. OpenSlide reads the formats of the scanners' makers. Any other
TIFF is read by tifffile, since OpenSlide refuses strips and plain JPEG2000 tiles. Everything else is held in memory.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import openslide
import tifffile

from dasc.errors import InputError
from dasc.images.read import image_kind, read_field, reason, to_rgb
from dasc.images.resolution import Stated, is_plausible, read_stated, stated_in
from dasc.images.tiffs import check_colours, check_segment, check_segments, full_page

IN_MEMORY = 50_000_000  # a TIFF of up to this many pixels is read whole, and so may have any kind of colours
BLOCK_PX = 2048  # an overview is read in squares of about this side


class Slide:
    """One image, read by region. Close it, or use it as a context.

    Attributes:
        levels: width and height in px of every stored resolution, the full one first.
        stated: what the file states of the um/px of the full resolution.
        origin_px: x, y where the scanned area begins; viewers that cut the empty rest off count from there.
        reader: what reads it: OpenSlide with the maker's name, tifffile, or memory.
    """

    path: Path
    levels: list[tuple[int, int]]
    stated: Stated
    origin_px: tuple[int, int] = (0, 0)
    reader: str

    @property
    def um_per_px(self) -> float | None:
        """As the file states it; None where it states nothing between 0.1 and 2.0."""
        return self.stated.um_per_px

    @property
    def width(self) -> int:
        return self.levels[0][0]

    @property
    def height(self) -> int:
        return self.levels[0][1]

    def downsample(self, level: int) -> float:
        """Pixels of the full resolution per pixel of this level."""
        return self.width / self.levels[level][0]

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is at least as fine as one pixel in `downsample` of the full resolution."""
        fine = [level for level in range(len(self.levels)) if self.downsample(level) <= downsample * 1.01]
        return max(fine, key=self.downsample, default=0)

    def read_region(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels (height, width, 3) uint8 RGB of one level; x, y, width and height in that level's own pixels.

        What lies outside the image is white. Safe to call from several threads.
        Errors: InputError naming the file and the region where it is broken.
        """
        right, bottom = self.levels[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, right), min(y + height, bottom)
        if left >= right or top >= bottom:
            return np.full((height, width, 3), 255, np.uint8)
        try:
            pixels = self._read(level, left, top, right - left, bottom - top)
        except Exception as error:  # decoders of broken files raise anything
            raise InputError(
                f"{self.path}: the region of {right - left} x {bottom - top} px at {left}, {top} (level {level}) "
                f"cannot be read: {reason(error)}"
            ) from error
        if pixels.shape[:2] == (height, width):
            return pixels
        region = np.full((height, width, 3), 255, np.uint8)
        region[top - y : bottom - y, left - x : right - x] = pixels
        return region

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MakersSlide(Slide):
    """A slide in a format of a scanner's maker, through OpenSlide."""

    def __init__(self, path: Path, maker: str) -> None:
        self.path, self.reader = path, f"OpenSlide {openslide.__library_version__} ({maker})"
        self._slide = openslide.OpenSlide(str(path))
        self.levels = list(self._slide.level_dimensions)
        says = self._slide.properties
        mpp = [float(says.get(name, "nan")) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)]
        self.stated = Stated(mpp[0] if np.isclose(*mpp, rtol=0.01) and is_plausible(mpp[0]) else None)
        if maker == "aperio":  # OpenSlide believes its text
            with tifffile.TiffFile(path) as tif:
                self.stated = stated_in(tif.pages.first)
        bounds = [says.get(name, "0") for name in (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)]
        self.origin_px = (int(bounds[0]), int(bounds[1]))

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        factor = self._slide.level_downsamples[level]
        region = self._slide.read_region((round(x * factor), round(y * factor)), level, (width, height))
        pixels = np.asarray(region)
        colours = np.ascontiguousarray(pixels[:, :, :3])
        colours[pixels[:, :, 3] == 0] = 255  # never scanned
        return colours

    def close(self) -> None:
        self._slide.close()


class TiffSlide(Slide):
    """A TIFF of 8-bit gray or RGB pixels, in tiles or strips, through tifffile, without reading it whole."""

    reader = f"tifffile {tifffile.__version__}"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tif = tifffile.TiffFile(path)
        try:
            page = full_page(self._tif)
            # tifffile takes only copies reduced by 2, 3 or 4 for levels of the series; any other step is one here.
            copies = [level.keyframe for series in self._tif.series for level in series.levels]
            pages = [page, *(copy for copy in copies if copy.is_reduced and _same_aspect(copy, page))]
            for one in pages:
                if not one.imagewidth * one.imagelength:
                    raise ValueError("one of its levels has no pixels; save or download it again")
                check_colours(one)
                check_segments(one, self._tif.filehandle.size)
        except Exception:
            self._tif.close()
            raise
        self.levels = [(one.imagewidth, one.imagelength) for one in pages]
        self.stated = read_stated(path)
        self._pages = pages
        self._lock = threading.Lock()  # of the place in the file

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._pages[level]
        if page.is_memmappable:
            plain = np.memmap(self.path, page.dtype, "r", page.dataoffsets[0], page.shape)
            return to_rgb(np.array(plain[y : y + height, x : x + width]), 8, self.path)
        rows, columns = page.chunks[:2]  # of a tile, or of a strip
        across = -(-page.imagewidth // columns)
        pixels = np.full((height, width, page.samplesperpixel), 255, np.uint8)
        for row in range(y // rows, -(-(y + height) // rows)):
            for column in range(x // columns, -(-(x + width) // columns)):
                segment = self._segment(page, row * across + column)
                if segment is None:
                    continue
                top, left = row * rows - y, column * columns - x
                shown = segment[max(-top, 0) : height - top, max(-left, 0) : width - left]
                top, left = max(top, 0), max(left, 0)
                pixels[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return to_rgb(pixels, 8, self.path)

    def _segment(self, page: tifffile.TiffPage, index: int) -> np.ndarray | None:
        """Pixels (h, w, samples) of one tile or strip, cut at the image's edge; None where it was never written."""
        size = page.databytecounts[index]
        if not size:
            return None
        with self._lock:
            self._tif.filehandle.seek(page.dataoffsets[index])
            data = self._tif.filehandle.read(size)
        if len(data) < size:
            raise ValueError("the file ends too early")
        check_segment(page, data)
        segment, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        return segment[0, : shape[1], : shape[2]]

    def close(self) -> None:
        self._tif.close()


class PictureSlide(Slide):
    """An image that is held in memory whole: PNG, JPEG, BMP, and TIFF that is small or of unusual colours."""

    reader = "memory"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.image = read_field(path)
        self.levels = [self.image.shape[1::-1]]
        self.stated = read_stated(path)

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        return self.image[y : y + height, x : x + width].copy()


def open_slide(path: Path) -> Slide:
    """Open a slide or a field of any kind read here.

    Errors: InputError naming the file when it is missing, broken, too large or of a kind not read here.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            kind = image_kind(file)
        maker = openslide.OpenSlide.detect_format(str(path))
        if maker not in (None, "generic-tiff"):
            return MakersSlide(path, maker)
        if kind == "tiff" and _is_read_by_region(path):
            return TiffSlide(path)
    except Exception as error:  # as in read_region
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    return PictureSlide(path)


def _is_read_by_region(path: Path) -> bool:
    """Whether a TIFF is too large to be read whole, and its pixels need no more than cutting out."""
    with tifffile.TiffFile(path) as tif:
        page = full_page(tif)
        segment = page.chunks if not page.is_memmappable else (1,)
        return (
            page.imagewidth * page.imagelength > IN_MEMORY
            and page.dtype == np.uint8
            and page.bitspersample == 8
            and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
            and page.photometric in (1, 2, 6)
            and np.prod(segment) <= 3 * IN_MEMORY
        )


def read_overview(slide: Slide, downsample: float, workers: int) -> tuple[np.ndarray, float]:
    """A whole slide at about one pixel in `downsample`, (h, w, 3) uint8, and the exact pixels of the slide per pixel.

    It is made of the coarsest level that is fine enough, square by square, so that memory stays small.
    """
    level = slide.level_for(downsample)
    factor = max(1, round(downsample / slide.downsample(level)))
    width, height = (-(-side // factor) for side in slide.levels[level])
    overview = np.empty((height, width, 3), np.uint8)
    side = max(1, BLOCK_PX // factor)

    def fill(place: tuple[int, int]) -> None:
        x, y = place
        part = overview[y : y + side, x : x + side]
        size = part.shape[1], part.shape[0]
        region = slide.read_region(level, x * factor, y * factor, size[0] * factor, size[1] * factor)
        part[:] = cv2.resize(region, size, interpolation=cv2.INTER_AREA)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(fill, [(x, y) for y in range(0, height, side) for x in range(0, width, side)]))
    return overview, factor * slide.downsample(level)


def read_square(slide: Slide, x_px: float, y_px: float, side_px: float, size: int) -> np.ndarray:
    """A square of the image about a point, (size, size, 3) uint8; white beyond the image."""
    return read_resized(slide, np.array([x_px, y_px]) + 0.5 - side_px / 2, (side_px, side_px), (size, size))


def read_resized(slide: Slide, corner: np.ndarray, span: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """A rectangle of the image, (size[1], size[0], 3) uint8, from the level that fits; white beyond the image.

    corner: (2,) x, y in px of the full resolution. span: its width and height, likewise. size: in px, as wanted.
    """
    level = slide.level_for(span[0] / size[0])
    factor = slide.downsample(level)
    x, y = np.round(corner / factor).astype(int).tolist()
    region = slide.read_region(level, x, y, *(max(1, round(side / factor)) for side in span))
    shrinks = region.shape[1] >= size[0]
    return cv2.resize(region, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def _same_aspect(copy: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    """Whether a copy has a page's sides but for their rounding; a label or a macro photograph has others."""
    wanted = copy.imagewidth * page.imagelength / page.imagewidth
    return copy.imagewidth < page.imagewidth and abs(copy.imagelength - wanted) <= 2
