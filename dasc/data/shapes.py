"""Annotated objects as other programs keep them: a class, a shape, and how to bring it to the image's own pixels."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import shapely
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from dasc.errors import InputError

UNCLASSIFIED = "Unclassified"  # name of the class of objects that have none
AREAS = ("Polygon", "MultiPolygon")


class Shape(NamedTuple):
    """An annotated object.

    name: its class. geometry: as the file has it. where: file and place in it. votes: classes that single readers gave,
    separated by semicolons. is_um: it is in um, not in px of the full resolution.
    """

    name: str
    geometry: BaseGeometry
    where: str
    votes: str = ""
    is_um: bool = False


class Source(NamedTuple):
    """What one annotation file says of one image.

    image: the image's name that the file states; None: the file's own name says it. start: the pixel coordinate of the
    first pixel's corner less that of its centre: 0.5 where the format counts from the corner, 0 from the centre.
    is_cropped: the program counts from where the slide's scanned area begins (`Slide.origin_px`).
    """

    image: str | None
    shapes: list[Shape]
    start: float = 0.5
    is_cropped: bool = False

    def in_px(self, shape: Shape, um_per_px: float, origin_px: tuple[int, int]) -> BaseGeometry:
        """The shape in the image's own pixels, whose (0, 0) is the centre of the first one."""
        scale = 1 / um_per_px if shape.is_um else 1.0
        x, y = (start - self.start if self.is_cropped else -self.start for start in origin_px)
        return affinity.affine_transform(shape.geometry, [scale, 0, 0, scale, x, y])


def places(geometry: BaseGeometry) -> list[tuple[float, float]]:
    """The points that an object stands for: each of a point set, else the centroid."""
    points = geometry.geoms if geometry.geom_type == "MultiPoint" else [geometry.centroid]
    return [(point.x, point.y) for point in points]


def areas_of(geometry: BaseGeometry) -> BaseGeometry | None:
    """The area that a shape covers; None where it covers none."""
    parts = [part for part in getattr(geometry, "geoms", [geometry]) if part.geom_type in AREAS and part.area > 0]
    return shapely.union_all(parts) if parts else None


def number(value: Any, where: str) -> float:
    """A coordinate as a finite number; InputError naming the place."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or abs(found) > 1e9:
        raise InputError(f"{where}: {str(value)[:60]!r} is no coordinate; expected a number of at most 1e9")
    return found


def pairs(found: Iterable, where: str) -> list[tuple[float, float]]:
    """Coordinates (x, y, ...) as pairs of numbers."""
    if not isinstance(found, list | tuple) or not all(isinstance(one, list | tuple) and len(one) > 1 for one in found):
        raise InputError(f"{where}: {str(found)[:60]!r}; expected a list of x, y")
    return [(number(one[0], where), number(one[1], where)) for one in found]


def polygon(rings: list[list[tuple[float, float]]], where: str) -> BaseGeometry:
    """A polygon of its outer ring and its holes; a line that crosses itself is put right."""
    if not rings or any(len(ring) < 3 for ring in rings):
        raise InputError(f"{where}: a polygon of fewer than three points")
    made = shapely.Polygon(rings[0], rings[1:])
    return made if made.is_valid else shapely.make_valid(made)


def point_set(points: list[tuple[float, float]], where: str) -> BaseGeometry:
    """A point, or several of one object."""
    if not points:
        raise InputError(f"{where}: no coordinates")
    return shapely.Point(points[0]) if len(points) == 1 else shapely.MultiPoint(points)
