"""Regions of an image: polygons that detections are counted in, and that are cut out of a slide as fields."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import shapely
import tifffile
from shapely.geometry.base import BaseGeometry

from dasc.data.annotations import find_annotations, key, match_image, name_of, read_areas
from dasc.data.shapes import areas_of
from dasc.errors import InputError
from dasc.files import replacing, spelt_out
from dasc.images.slides import Slide
from dasc.images.tissue import Tissue

SUFFIXES = (".geojson", ".json", ".gz", ".zip")  # of files that hold regions
BAND_PX = 512  # rows of a region that are read at a time
OUTSIDE_SHARE = 0.01  # of a region beyond the image, from which it is said; less is how a mouse draws along an edge

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Roi:
    """The part of an image that counts: one area in px, in which overlapping polygons are one."""

    area: BaseGeometry

    @property
    def sha256(self) -> str:
        """Hash of the area."""
        return hashlib.sha256(shapely.normalize(self.area).wkb).hexdigest()

    @property
    def place(self) -> tuple[float, float]:
        """A point x, y in the area."""
        point = self.area.representative_point()
        return point.x, point.y

    def at(self, points_px: np.ndarray) -> np.ndarray:
        """Whether points (N, 2) lie in the area or on its border, (N,) bool."""
        points_px = np.asarray(points_px, float).reshape(-1, 2)
        return shapely.covers(self.area, shapely.points(points_px))

    def area_mm2(self, um_per_px: float, box_px: tuple[float, float, float, float] | None = None) -> float:
        """The area, or as much of it as lies in a box of left, top, right, bottom px."""
        area = self.area if box_px is None else shapely.intersection(self.area, shapely.box(*box_px))
        return float(area.area) * um_per_px**2 / 1e6

    def tissue(self, tissue: Tissue) -> Tissue:
        """The tissue that lies in the area, or in a pixel of the mask that it touches."""
        mask = np.zeros(tissue.mask.shape, np.uint8)
        for part in parts_of(self.area):
            rings = [np.array(ring.coords) for ring in (part.exterior, *part.interiors)]
            rings = [np.floor((ring + 0.5) / tissue.pixel_px).astype(np.int32) for ring in rings]
            cv2.fillPoly(mask, rings, 1)
            cv2.polylines(mask, rings, True, 1)  # holes leave out their inside alone
        mask = cv2.dilate(mask, np.ones((3, 3), np.uint8))
        return Tissue(tissue.mask & (mask > 0), tissue.pixel_px)


def parts_of(area: BaseGeometry) -> list[shapely.Polygon]:
    """The polygons of an area."""
    parts = getattr(area, "geoms", [area])
    return [part for part in parts if part.geom_type == "Polygon" and part.area > 0]


def inside(area: BaseGeometry, slide: Slide, where: str) -> BaseGeometry:
    """The part of an area that lies on the image's pixels; says how much does not.

    Raises: InputError naming both where nothing does.
    """
    pixels = shapely.box(-0.5, -0.5, slide.width - 0.5, slide.height - 0.5)
    found = shapely.intersection(area, pixels)
    if not found.area > 0:
        box = ", ".join(f"{edge:.0f}" for edge in area.bounds)
        raise InputError(
            f"{where}: the region at {box} px lies outside {slide.path} of {slide.width} x {slide.height} px; "
            "draw it on this image"
        )
    outside = 1 - found.area / area.area
    if outside >= OUTSIDE_SHARE:
        place = spelt_out(str(where))
        logger.warning("%s: %.0f %% of the region lies outside the image and does not count", place, 100 * outside)
    return areas_of(found)


def find_roi(folder: Path, classes: list[str], slide: Slide) -> Roi:
    """The polygons of an image in a folder of GeoJSON files named after the images.

    classes: those that count; none: all. Detections and cells never count.
    Raises: InputError: no file, or several, of this image; no polygon in it; one outside the image.
    """
    said = slide.path.name
    files = [path for path in find_annotations([folder]) if path.suffix.lower() in SUFFIXES]
    files = [path for path in files if match_image(name_of(path), [slide.path])]
    files = [path for path in files if name_of(path) == said] or files
    if len(files) != 1:
        raise InputError(
            f"{slide.path}: {len(files)} files of regions in {folder}; expected one: {said}.geojson or "
            f"{slide.path.stem}.geojson"
        )
    (source,) = read_areas(files[0])
    named = {key(name) for name in classes}
    areas = []
    for shape in source.shapes:
        area = areas_of(source.in_px(shape, 1.0, slide.origin_px))
        if area is not None and (not named or key(shape.name) in named):
            areas.append(inside(area, slide, shape.where))
    if not areas:
        found = ", ".join(sorted({shape.name for shape in source.shapes})) or "nothing"
        raise InputError(f"{files[0]}: no polygon of class {', '.join(classes) or 'any'}; found {found}")
    return Roi(shapely.union_all(areas))


def box_of(area: BaseGeometry, slide: Slide) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (half-open) of the whole pixels that an area reaches."""
    left, top, right, bottom = (round(edge, 6) for edge in area.bounds)
    left, top = max(0, int(np.floor(left + 0.5))), max(0, int(np.floor(top + 0.5)))
    return left, top, min(slide.width, int(np.ceil(right + 0.5))), min(slide.height, int(np.ceil(bottom + 0.5)))


def cut_region(slide: Slide, area: BaseGeometry) -> np.ndarray:
    """The pixels of an area's bounding box, (h, w, 3) uint8, at full resolution; white where a pixel is not in it.

    White is what a scanner leaves out: no candidate nucleus lies there, so nothing beyond the area becomes a negative.
    It is read in bands, so that beside the region itself little is in memory.
    """
    left, top, right, bottom = box_of(area, slide)
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    for start in range(0, bottom - top, BAND_PX):
        band = pixels[start : start + BAND_PX]
        band[:] = slide.read_region(0, left, top + start, band.shape[1], band.shape[0])
    if abs(area.area - area.envelope.area) > 1e-6 * area.envelope.area:  # no upright rectangle
        mask = np.zeros(pixels.shape[:2], np.uint8)
        for part in parts_of(area):
            rings = [np.array(ring.coords) - [left, top] for ring in (part.exterior, *part.interiors)]
            cv2.fillPoly(mask, [np.round(ring).astype(np.int32) for ring in rings], 1)
        pixels[mask == 0] = 255
    return pixels


def write_region(path: Path, pixels: np.ndarray, um_per_px: float) -> None:
    """Write pixels (h, w, 3) uint8 as a TIFF without loss that states its resolution."""
    with replacing(path) as temporary:
        options = {"photometric": "rgb", "compression": "zlib", "predictor": True, "metadata": None}
        resolution = {"resolution": (1e4 / um_per_px, 1e4 / um_per_px), "resolutionunit": 3}
        tifffile.imwrite(temporary, pixels, tile=(512, 512), **options, **resolution)
