"""Regions for QuPath, and detections for ASAP and for whatever reads COCO."""

import uuid
from pathlib import Path
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import pandas as pd
import shapely

from dasc.data.regions import Roi, parts_of
from dasc.files import spelt_out, write_json, write_text
from dasc.images.slides import Slide
from dasc.images.tissue import Tissue
from dasc.judge.hotspot import Hotspot
from dasc.report.export import MITOTIC, NON_MITOTIC, half_sides

BOX_UM = 12.5  # side of a detection's box in COCO: 50 px at 0.25 um/px, as the public challenges draw it
COLORS = {"Hotspot": [20, 20, 160], "Tissue": [0, 130, 80], "Region": [200, 150, 0]}


def write_regions(path: Path, slide: Slide, hotspot: Hotspot, tissue: Tissue | None, roi: Roi | None) -> None:
    """Write the hotspot, the tissue of a slide and the region that counted as locked annotations for QuPath."""
    left, top = hotspot.x_px - 0.5, hotspot.y_px - 0.5
    areas = [("Hotspot", shapely.box(left, top, left + hotspot.width_px, top + hotspot.height_px))]
    areas += [] if tissue is None else [("Tissue", part) for part in outline(tissue)]
    areas += [] if roi is None else [("Region", part) for part in parts_of(roi.area)]
    features = []
    for number, (name, area) in enumerate(areas):
        rings = [np.array(ring.coords) + 0.5 - slide.origin_px for ring in (area.exterior, *area.interiors)]
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{spelt_out(slide.path.name)}#{name}{number}")),
                "geometry": {"type": "Polygon", "coordinates": [ring.round(3).tolist() for ring in rings]},
                "properties": {
                    "objectType": "annotation",
                    "name": name,
                    "classification": {"name": name, "color": COLORS[name]},
                    "isLocked": True,
                },
            }
        )
    write_json(path, {"type": "FeatureCollection", "features": features})


def outline(tissue: Tissue) -> list[shapely.Polygon]:
    """The polygons round the tissue, with its holes, in the image's pixels; exact to a quarter of the mask's pixels."""
    # A pixel of the mask becomes 2 x 2, so that what is one pixel wide has a line round it too.
    mask = np.repeat(np.repeat(tissue.mask, 2, axis=0), 2, axis=1).astype(np.uint8)
    lines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rings = [((line[:, 0] + 0.5) / 2 * tissue.pixel_px - 0.5).tolist() for line in lines]
    outer = [number for number in range(len(rings)) if tree[0][number][3] < 0 and len(rings[number]) > 2]
    holes: dict[int, list] = {number: [] for number in outer}
    for number, ring in enumerate(rings):
        if tree[0][number][3] in holes and len(ring) > 2:
            holes[tree[0][number][3]].append(ring)
    polygons = []
    for number in outer:
        polygons += parts_of(shapely.make_valid(shapely.Polygon(rings[number], holes[number])))
    return polygons


def write_asap(path: Path, detections: pd.DataFrame, export: list[str]) -> None:
    """Write one image's detections as ASAP's XML where `export` says so; an earlier run's file goes otherwise.

    detections: x_px, y_px, probability, mitosis. ASAP counts from the corner of the first pixel.
    """
    if "asap" not in export:
        path.unlink(missing_ok=True)
        return
    colors = {kind["name"]: "#" + bytes(kind["color"]).hex().upper() for kind in (MITOTIC, NON_MITOTIC)}
    lines = ['<?xml version="1.0"?>', "<ASAP_Annotations>", "\t<Annotations>"]
    columns = ["x_px", "y_px", "probability", "mitosis"]
    for number, (x, y, probability, mitosis) in enumerate(detections[columns].itertuples(index=False, name=None)):
        group = (MITOTIC if mitosis else NON_MITOTIC)["name"]
        shown = " ".join(
            f"{name}={quoteattr(text)}"
            for name, text in {
                "Name": f"{number + 1}: {probability:.3f}",
                "Type": "Dot",
                "PartOfGroup": group,
                "Color": colors[group],
            }.items()
        )
        place = f'<Coordinate Order="0" X="{x + 0.5:.3f}" Y="{y + 0.5:.3f}" />'
        lines.append(f"\t\t<Annotation {shown}><Coordinates>{place}</Coordinates></Annotation>")
    lines += ["\t</Annotations>", "\t<AnnotationGroups>"]
    for name, color in colors.items():
        group = f'Name={quoteattr(name)} PartOfGroup="None" Color="{color}"'
        lines.append(f"\t\t<Group {group}><Attributes /></Group>")
    write_text(path, "\n".join([*lines, "\t</AnnotationGroups>", "</ASAP_Annotations>"]) + "\n")


def write_coco(path: Path, detections: pd.DataFrame, counts: pd.DataFrame, export: list[str]) -> None:
    """Write the detections of all images as COCO where `export` says so; an earlier run's file goes otherwise.

    detections: image, x_px, y_px, probability, mitosis. counts: image, width_px, height_px, um_per_px. Boxes are x, y,
    width and height in px from the corner of the first pixel, BOX_UM wide about the detection, smaller at the image's
    edge.
    """
    if "coco" not in export:
        path.unlink(missing_ok=True)
        return
    images, boxes = [], []
    for number, (image, width, height, um_per_px) in enumerate(
        counts[["image", "width_px", "height_px", "um_per_px"]].itertuples(index=False, name=None), start=1
    ):
        images.append({"id": number, "file_name": spelt_out(image), "width": int(width), "height": int(height)})
        own = detections[detections["image"] == image]
        halves = half_sides(own, width, height, um_per_px, BOX_UM)
        rows = own[["x_px", "y_px", "probability", "mitosis"]].to_numpy(float).tolist()
        for (x, y, probability, mitosis), reach in zip(rows, halves, strict=True):
            box = [round(value, 3) for value in (x + 0.5 - reach, y + 0.5 - reach, 2 * reach, 2 * reach)]
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": number,
                    "category_id": 1 if mitosis else 2,
                    "bbox": box,
                    "area": round(box[2] * box[3], 3),
                    "segmentation": [],
                    "iscrowd": 0,
                    "score": round(probability, 6),
                }
            )
    names = [{"id": number, "name": kind["name"]} for number, kind in enumerate((MITOTIC, NON_MITOTIC), start=1)]
    write_json(path, {"images": images, "annotations": boxes, "categories": names})
