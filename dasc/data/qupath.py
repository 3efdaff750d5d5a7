"""Read what QuPath writes: objects as GeoJSON, of all its versions, and measurement tables."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry.base import BaseGeometry

from dasc.data.shapes import UNCLASSIFIED, Shape, Source, number, pairs, point_set, polygon
from dasc.errors import InputError

CENTROID = re.compile(r"centroid ([xy])\b.*?(px|.?.m)\W*$", re.IGNORECASE)  # "Centroid X µm", in any encoding
CLASSES = ("Classification", "Class")  # since 0.5, before it
TYPES = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
}  # before 0.3


def read_geojson(path: Path, content: Any) -> list[Source]:
    """The objects of one image: a feature collection, a list of features or a single one.

    Raises: InputError naming the feature.
    """
    found = content.get("features") if isinstance(content, dict) and "features" in content else content
    features = found if isinstance(found, list) else [found]
    shapes: list[Shape] = []
    for row, feature in enumerate(features):
        _add_feature(feature, f"{path}, features[{row}]", shapes)
    return [Source(None, shapes, is_cropped=True)]


def _add_feature(feature: Any, where: str, shapes: list[Shape]) -> None:
    if not isinstance(feature, dict) or not isinstance(feature.get("geometry"), dict):
        raise InputError(f"{where}: expected a feature with a geometry, as QuPath writes it; found {str(feature)[:60]}")
    properties = feature.get("properties") or {}
    if not isinstance(properties, dict):
        raise InputError(f"{where}: properties {str(properties)[:60]!r}; expected an object")
    # Of a cell the nucleus says where it is.
    nucleus = feature.get("nucleusGeometry") or properties.get("nucleusGeometry")
    geometry = nucleus if isinstance(nucleus, dict) else feature["geometry"]
    shapes.append(Shape(_class_of(properties, where), _geometry(geometry, where), where))
    children = properties.get("childObjects") or feature.get("childObjects") or []
    if not isinstance(children, list):
        raise InputError(f"{where}: childObjects {str(children)[:60]!r}; expected a list")
    for row, child in enumerate(children):
        _add_feature(child, f"{where}.childObjects[{row}]", shapes)


def _class_of(properties: dict, where: str) -> str:
    """The class of a feature: a string, or an object with a name (also of older versions) or the parts of one."""
    said = properties.get("classification")
    if isinstance(said, dict):
        said = said.get("name") or said.get("names")
    if isinstance(said, list) and all(isinstance(part, str) for part in said):
        said = ": ".join(said)  # as QuPath shows a derived class
    if said is not None and not isinstance(said, str):
        raise InputError(f"{where}: classification {str(said)[:60]!r}; expected a name")
    return (said or "").strip() or UNCLASSIFIED


def is_annotation(feature: dict) -> bool:
    """Whether a feature is an annotation, not a detection or a cell."""
    properties = feature.get("properties") or {}
    said = properties.get("objectType") or properties.get("object_type") or TYPES.get(str(feature.get("id")))
    return said in (None, "annotation")


def _geometry(geometry: dict, where: str) -> BaseGeometry:
    kind, found = geometry.get("type"), geometry.get("coordinates")
    if kind == "GeometryCollection":
        parts = geometry.get("geometries")
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise InputError(f"{where}: an empty GeometryCollection")
        return shapely.GeometryCollection([_geometry(part, where) for part in parts])
    if not isinstance(found, list):
        raise InputError(f"{where}: geometry {str(kind)[:40]!r} without coordinates")
    if kind == "Point":
        return point_set(pairs([found], where), where)
    if kind == "MultiPoint":
        return point_set(pairs(found, where), where)
    if kind == "LineString":
        points = pairs(found, where)
        return shapely.LineString(points) if len(points) > 1 else point_set(points, where)
    if kind == "Polygon":
        return polygon([pairs(ring, where) for ring in found], where)
    if kind in ("MultiPolygon", "MultiLineString"):
        if not found:
            raise InputError(f"{where}: a {kind} without parts")
        part = "Polygon" if kind == "MultiPolygon" else "LineString"
        return shapely.union_all([_geometry({"type": part, "coordinates": one}, where) for one in found])
    raise InputError(f"{where}: geometry {str(kind)[:40]!r}; expected points, lines or polygons")


def read_measurements(path: Path, text: str) -> list[Source]:
    """The rows of a measurement table with Image, Class (Classification since 0.5) and Centroid X, Y in um or px.

    The unit is um unless the column says px. Raises: InputError naming line and column.
    """
    separator = max("\t,;", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}") from error
    header = [name.strip().strip("\ufeff") for name in rows[0][1]] if rows else []
    axes = {
        found[1].upper(): (place, found[2]) for place, name in enumerate(header) if (found := CENTROID.search(name))
    }
    named = next((name for name in CLASSES if name in header), None)
    if "Image" not in header or named is None or set(axes) != {"X", "Y"}:
        raise InputError(
            f"{path}: expected the columns Image, Class, Centroid X um and Centroid Y um (or px), as QuPath's "
            f"measurement tables have them; found {', '.join(header)[:200]!r}"
        )
    is_um = axes["X"][1].lower() != "px"
    sources: dict[str, Source] = {}
    for line, row in rows[1:]:
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise InputError(f"{where}: {len(row)} cells; expected {len(header)}, as in the header")
        if "Num points" in header and (row[header.index("Num points")].strip() or "1") not in ("1", "1.0"):
            raise InputError(f"{where}: a set of points, of which the table has one centroid; export it as GeoJSON")
        image = row[header.index("Image")].strip()
        if not image:
            raise InputError(f"{where}: Image is empty")
        place = [number(row[axes[axis][0]].strip().replace(",", "."), where) for axis in "XY"]
        shape = Shape(row[header.index(named)].strip() or UNCLASSIFIED, shapely.Point(place), where, is_um=is_um)
        sources.setdefault(image, Source(image, [], is_cropped=True)).shapes.append(shape)
    return list(sources.values())
