"""Read annotations of other programs: ASAP, Aperio ImageScope, COCO, SlideRunner."""

import contextlib
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import shapely
from shapely import affinity
from shapely.geometry.base import BaseGeometry

from dasc.data.shapes import UNCLASSIFIED, Shape, Source, number, pairs, point_set, polygon
from dasc.errors import InputError

ELLIPSE, ARROW, RULER, PIN = "2", "3", "4", "5"  # Type of an ImageScope region; 0 and 1 are polygons
SPOT, AREA, POLYGON, SPECIAL_SPOT, CIRCLE = 1, 2, 3, 4, 5  # type of a SlideRunner annotation
DISAGREED = "Disagreed"  # class of a SlideRunner annotation whose readers differ and agreed on none


def read_asap(path: Path, root: Element) -> list[Source]:
    """The objects of one image, each of the group that it is part of."""
    shapes = []
    for row, one in enumerate(root.iter("Annotation")):
        where = f"{path}, annotation {row + 1}"
        corners = sorted(one.iter("Coordinate"), key=lambda at: number(at.get("Order", "0"), where))
        points = [(number(at.get("X"), where), number(at.get("Y"), where)) for at in corners]
        group = one.get("PartOfGroup") or "None"
        name = UNCLASSIFIED if group == "None" else group
        shapes.append(Shape(name, _drawn(points, one.get("Type") not in ("Dot", "PointSet"), where), where))
    return [Source(None, shapes)]


def _drawn(points: list[tuple[float, float]], has_area: bool, where: str) -> BaseGeometry:
    if has_area and len(points) == 2:  # two corners of a rectangle
        return shapely.box(*map(min, *points), *map(max, *points))
    return polygon([points], where) if has_area and len(points) > 2 else point_set(points, where)


def read_imagescope(path: Path, root: Element) -> list[Source]:
    """The objects of one image, each of its layer's name, else the layer's description, else its own text."""
    shapes = []
    for layer, annotation in enumerate(root.iter("Annotation")):
        said = [one.get("Value") for one in annotation.iter("Attribute") if one.get("Name") == "Description"]
        for row, region in enumerate(annotation.iter("Region")):
            where = f"{path}, layer {layer + 1}, region {row + 1}"
            names = [annotation.get("Name"), *said, region.get("Text"), UNCLASSIFIED]
            name = next(name.strip() for name in names if name and name.strip())
            kind = region.get("Type", "0")
            points = [(number(at.get("X"), where), number(at.get("Y"), where)) for at in region.iter("Vertex")]
            if kind in (ARROW, RULER):  # neither an object nor an area: a class of its own, to be named or ignored
                name += " (arrow)" if kind == ARROW else " (ruler)"
            if region.get("NegativeROA") == "1":
                name += " (negative)"
            geometry = _drawn(points, kind not in (ARROW, RULER, PIN), where)
            if kind == ELLIPSE and len(points) == 2:
                geometry = _ellipse(geometry)
            shapes.append(Shape(name, geometry, where))
    return [Source(None, shapes)]


def _ellipse(box: BaseGeometry) -> BaseGeometry:
    left, top, right, bottom = box.bounds
    circle = shapely.Point((left + right) / 2, (top + bottom) / 2).buffer(0.5, quad_segs=32)
    return affinity.scale(circle, right - left, bottom - top)


def is_coco(content: Any) -> bool:
    """Whether a JSON has images, annotations with boxes and categories, as COCO (and MIDOG) have them."""
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def read_coco(path: Path, content: Any, is_asked: bool) -> list[Source]:
    """The boxes x, y, width, height of every image, by the names of their categories.

    is_asked: the user names the format. Otherwise boxes that could be MIDOG's corners x1, y1, x2, y2 are refused.
    """
    if not is_coco(content) or not isinstance(content.get("categories"), list):
        raise InputError(f"{path}: expected a JSON with images, annotations and categories, as COCO has them")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content[key], list) or not all(isinstance(one, dict) for one in content[key]):
            raise InputError(f"{path}: expected a list {key!r} of objects")
    names = {str(one.get("id")): str(one.get("name")) for one in content["categories"]}
    sources, sizes, sure = {}, {}, is_asked
    for row, one in enumerate(content["images"]):
        name, identity = one.get("file_name"), str(one.get("id"))
        if not isinstance(name, str) or not name or identity in sources:
            raise InputError(f"{path}, images[{row}]: expected a file_name and an id of its own, found {str(one)[:80]}")
        sources[identity] = Source(name.replace("\\", "/").rsplit("/", 1)[-1], [])
        sizes[identity] = [number(one.get(side, 1e9), f"{path}, images[{row}]") for side in ("width", "height")]
    for row, one in enumerate(content["annotations"]):
        where, image = f"{path}, annotations[{row}]", str(one.get("image_id"))
        category = str(one.get("category_id"))
        if image not in sources or category not in names:
            raise InputError(f"{where}: image_id {image} or category_id {category} is not among those of the file")
        box = one.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise InputError(f"{where}: bbox {str(box)[:60]}; expected four numbers x, y, width, height")
        x, y, width, height = (number(edge, where) for edge in box)
        if width < 0 or height < 0 or x + width > sizes[image][0] + 1 or y + height > sizes[image][1] + 1:
            raise InputError(
                f"{where}: bbox {box} leaves its image; expected x, y, width, height; for corners x1, y1, x2, y2 use "
                "--dataset midog"
            )
        area = one.get("area")
        sure |= width < x or height < y
        sure |= isinstance(area, int | float) and abs(area - width * height) <= 1 and "segmentation" in one
        sources[image].shapes.append(Shape(names[category], shapely.Point(x + width / 2, y + height / 2), where))
    if not sure and content["annotations"]:
        raise InputError(
            f"{path}: its boxes could be x, y, width, height or x1, y1, x2, y2; give --format coco, or read it as "
            "--dataset midog"
        )
    return list(sources.values())


def read_sliderunner(path: Path) -> list[Source]:
    """The objects of every slide in a database, of the class that the readers agreed on; their votes are kept."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            slides = database.execute("SELECT uid, filename FROM Slides").fetchall()
            names = dict(database.execute("SELECT uid, name FROM Classes").fetchall())
            objects = database.execute("SELECT uid, slide, type, agreedClass, deleted FROM Annotations").fetchall()
            corners = database.execute(
                "SELECT annoId, coordinateX, coordinateY FROM Annotations_coordinates ORDER BY annoId, orderIdx"
            ).fetchall()
            labels = database.execute("SELECT annoId, class FROM Annotations_label ORDER BY uid").fetchall()
    except (sqlite3.Error, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a database of SlideRunner ({error})") from error
    sources = {uid: Source(str(name), [], start=0.0) for uid, name in slides}
    drawn: dict[Any, list] = {}
    for uid, x, y in corners:
        drawn.setdefault(uid, []).append((x, y))
    votes: dict[Any, list[str]] = {}
    for uid, label in labels:
        votes.setdefault(uid, []).append(str(names.get(label, UNCLASSIFIED)))
    for uid, slide, kind, agreed, deleted in objects:
        where = f"{path}, annotation {uid}"
        if deleted:
            continue
        if slide not in sources:
            raise InputError(f"{where}: slide {slide!r} is not in the table Slides")
        given = votes.get(uid, [])
        name = UNCLASSIFIED if not given else given[0] if len(Counter(given)) == 1 else DISAGREED
        points = pairs(drawn.get(uid, []), where)
        geometry = _drawn(points, kind not in (SPOT, SPECIAL_SPOT), where)
        if kind == CIRCLE and len(points) == 2:
            geometry = _ellipse(geometry)
        shape = Shape(str(names.get(agreed, name)) if agreed else name, geometry, where, ";".join(given))
        sources[slide].shapes.append(shape)
    return list(sources.values())
