"""Detections in the formats other programs read: CSV, a spreadsheet, grand-challenge JSON, QuPath GeoJSON."""

import io
import uuid
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import xlsxwriter

from dasc.errors import InputError
from dasc.files import replacing, spelt_out, write_csv, write_json

COLUMNS = ["image", "x_px", "y_px", "x_um", "y_um", "probability", "mitosis"]
SMALLEST_MM, LARGEST_MM = -0.0075, 10  # the range of points grand-challenge's evaluator accepts
MITOTIC = {"name": "Mitotic figure", "color": [200, 0, 0]}
NON_MITOTIC = {"name": "Non-mitotic figure", "color": [60, 90, 200]}
WIDEST = 40  # characters of a column in counts.xlsx; longer texts are cut off on the screen, not in the file


def write_detections(path: Path, table: pd.DataFrame) -> None:
    """Write detections.csv: image, x_px, y_px, x_um, y_um, probability, mitosis (1 or 0).

    table has these columns; x_um and y_um are NaN, or absent, where um/px is unknown, and stay empty.
    Coordinates are rounded to 3 decimals, probabilities to 6. Raises InputError where the file cannot be written.
    """
    missing = set(COLUMNS) - set(table) - {"x_um", "y_um"}
    if missing:
        raise InputError(f"{path}: detections without {sorted(missing)}, expected {COLUMNS}")
    table = table.reindex(columns=COLUMNS)
    table["mitosis"] = table["mitosis"].astype(int)
    write_csv(path, table.round({name: 6 if name == "probability" else 3 for name in COLUMNS[1:-1]}))


def write_counts(path: Path, table: pd.DataFrame) -> None:
    """Write counts.csv, and the same as a spreadsheet beside it: a row per image.

    Numbers are rounded to 3 decimals, areas to 6. Names in the CSV are as in detections.csv.
    """
    decimals = {name: 6 if name.endswith("_mm2") and "per" not in name else 3 for name in table if name != "um_per_px"}
    table = table.round(decimals)
    write_csv(path, table)
    write_spreadsheet(path.with_suffix(".xlsx"), table)


def write_spreadsheet(path: Path, table: pd.DataFrame) -> None:
    """Write a table as XLSX: one sheet, its header frozen; the same table gives the same bytes.

    Numbers stay numbers in every country's settings, and texts stay texts: one that begins with `=` is no formula.
    """
    content = io.BytesIO()
    with xlsxwriter.Workbook(content, {"in_memory": True}) as book:
        book.set_properties({"created": datetime(1980, 1, 1, tzinfo=UTC)})  # a ZIP's own beginning of time
        sheet, bold = book.add_worksheet(path.stem), book.add_format({"bold": True})
        sheet.freeze_panes(1, 1)
        for column, name in enumerate(table):
            shown = [spelt_out(value) if isinstance(value, str) else value for value in table[name].tolist()]
            sheet.set_column(column, column, min(WIDEST, 2 + max(len(str(value)) for value in [name, *shown])))
            sheet.write_string(0, column, name, bold)
            for row, value in enumerate(shown, 1):
                if pd.isna(value) or value == "":
                    continue
                if isinstance(value, str):
                    sheet.write_string(row, column, value)
                else:
                    sheet.write_number(row, column, value)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())


def write_mitotic_figures(
    path: Path, detections: pd.DataFrame, um_per_px: float | None, threshold: float, smallest: float
) -> None:
    """Write one field's detections as grand-challenge points: millimetres, x then y, z 0.

    detections: x_px, y_px, probability. Written is what reaches `smallest`; at or above `threshold` it is a
    "mitotic figure", below a "non-mitotic figure". Raises InputError without a known um/px, because pixels
    would be read as millimetres, and for a point the evaluator refuses: it takes regions of up to 10 mm.
    """
    if um_per_px is None or not um_per_px > 0:
        raise InputError(f"{path}: um/px is {um_per_px}, the format is in millimetres: give --um_per_px")
    points = []
    written = detections[detections["probability"] >= smallest]
    for x_px, y_px, probability in written[["x_px", "y_px", "probability"]].to_numpy(float).tolist():
        x_mm, y_mm = (round(value * um_per_px / 1000, 6) for value in (x_px, y_px))
        if not all(SMALLEST_MM <= value <= LARGEST_MM for value in (x_mm, y_mm)):
            raise InputError(
                f"{path}: a point at {x_mm:g}, {y_mm:g} mm, expected {SMALLEST_MM} to {LARGEST_MM} mm: "
                "the format is for regions only, not for whole slides"
            )
        name = "mitotic figure" if probability >= threshold else "non-mitotic figure"
        points.append({"name": name, "point": [x_mm, y_mm, 0], "probability": round(probability, 6)})
    content = {"name": "Points of interest", "type": "Multiple points", "points": points}
    write_json(path, content | {"version": {"major": 1, "minor": 0}})


def half_sides(
    detections: pd.DataFrame, width_px: int, height_px: int, um_per_px: float, side_um: float
) -> list[float]:
    """Half the side in px of a square about each detection, less near the image's edge: it lies in the middle."""
    x, y = (detections[axis].to_numpy(float) for axis in ("x_px", "y_px"))
    room = np.minimum(np.minimum(x + 0.5, y + 0.5), np.minimum(width_px - 0.5 - x, height_px - 0.5 - y))
    return np.minimum(room, side_um / um_per_px / 2).tolist()


def write_geojson(
    path: Path, detections: pd.DataFrame, origin_px: tuple[int, int] = (0, 0), halves: list[float] | None = None
) -> None:
    """Write one field's detections as a GeoJSON that QuPath imports with classes and scores.

    detections: image, x_px, y_px, probability, mitosis. QuPath counts from the corner of the first pixel,
    we from its centre, so half a pixel is added. It also cuts off what lies before a slide's scanned area, which
    begins at origin_px. halves: half the sides of squares about them, as annotations, since its grid view shows what
    lies in an annotation; None: points, as detections. The ids are made from image and place: the same table, the same
    bytes.
    """
    columns = ["image", "x_px", "y_px", "probability", "mitosis"]
    features = []
    for number, (image, x_px, y_px, probability, mitosis) in enumerate(
        detections[columns].itertuples(index=False, name=None)
    ):
        place = [round(float(v) - start + 0.5, 3) for v, start in zip((x_px, y_px), origin_px, strict=True)]
        geometry = {"type": "Point", "coordinates": place}
        if halves is not None:
            corners = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
            ring = [
                [round(place[0] + x * halves[number], 3), round(place[1] + y * halves[number], 3)] for x, y in corners
            ]
            geometry = {"type": "Polygon", "coordinates": [ring]}
        properties = {
            "objectType": "detection" if halves is None else "annotation",
            "classification": MITOTIC if mitosis else NON_MITOTIC,
            "measurements": {"Probability": round(float(probability), 6)},
        }
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{spelt_out(str(image))}#{place[0]},{place[1]}")),
                "geometry": geometry,
                "properties": properties,
            }
        )
    write_json(path, {"type": "FeatureCollection", "features": features})
